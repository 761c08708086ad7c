// The operators of csrc/layer_norm_lstm.h on the emulated device, beside those of lstm.cpp.
#include <torch/library.h>

#include "layer_norm_lstm.h"

namespace {

using Optional = std::optional<at::Tensor>;

fastattn::LayerNormLstmArgs arguments(
    const at::Tensor& input, const Optional& batch_sizes, const at::Tensor& h0, const at::Tensor& c0,
    at::TensorList weights, const Optional& h_mask, const Optional& zoneout_h, const Optional& zoneout_c, double keep_h,
    double keep_c, double eps) {
  return {input, batch_sizes, h0, c0, weights.vec(), h_mask, zoneout_h, zoneout_c, keep_h, keep_c, eps};
}

fastattn::LayerNormLstmForward forward(
    const at::Tensor& input, const Optional& batch_sizes, const at::Tensor& h0, const at::Tensor& c0,
    at::TensorList weights, const Optional& h_mask, const Optional& zoneout_h, const Optional& zoneout_c, double keep_h,
    double keep_c, double eps, bool save, bool all_cells) {
  return fastattn::layer_norm_lstm_forward_cuda(
      arguments(input, batch_sizes, h0, c0, weights, h_mask, zoneout_h, zoneout_c, keep_h, keep_c, eps), save,
      all_cells);
}

fastattn::LayerNormLstmBackward backward(
    const Optional& grad_out, const Optional& grad_cells, const Optional& grad_h_n, const Optional& grad_c_n,
    const at::Tensor& out, const at::Tensor& saved, const at::Tensor& input, const Optional& batch_sizes,
    const at::Tensor& h0, const at::Tensor& c0, at::TensorList weights, const Optional& h_mask,
    const Optional& zoneout_h, const Optional& zoneout_c, double keep_h, double keep_c, double eps, bool input_grad) {
  return fastattn::layer_norm_lstm_backward_cuda(
      {grad_out, grad_cells, grad_h_n, grad_c_n},
      arguments(input, batch_sizes, h0, c0, weights, h_mask, zoneout_h, zoneout_c, keep_h, keep_c, eps), out, saved,
      input_grad);
}

}  // namespace

#define PROBLEM                                                                                                  \
  "Tensor input, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, Tensor? h_mask, Tensor? zoneout_h, " \
  "Tensor? zoneout_c, float keep_h, float keep_c, float eps, "

TORCH_LIBRARY_FRAGMENT(fastattn_emulated, m) {
  m.def(
      "layer_norm_forward(" PROBLEM "bool save, bool all_cells) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", forward);
  m.def(
      "layer_norm_backward(Tensor? grad_out, Tensor? grad_cells, Tensor? grad_h_n, Tensor? grad_c_n, Tensor out, "
      "Tensor saved, " PROBLEM "bool input_grad) -> (Tensor, Tensor, Tensor, Tensor[])",
      backward);
}
