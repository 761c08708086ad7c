// Python's view of the operators; positional, called by fastattn/kernels/attention/extension.py only.
#include <torch/csrc/utils/pybind.h>

#include "attention.h"
#include "instruction_set.h"

namespace {

using fastattn::ProblemArgs;
using MaybeTensor = std::optional<at::Tensor>;
using MaybeInt = std::optional<int64_t>;
using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;

auto attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const MaybeTensor& attn_mask,
    const MaybeTensor& key_padding_mask, int64_t seed, double dropout_p, double scale, MaybeInt lower, MaybeInt upper,
    int64_t weights_mode) {
  const ProblemArgs args{attn_mask, key_padding_mask, seed, dropout_p, scale, lower, upper};
  return fastattn::attention_forward(query, key, value, args, weights_mode);
}

auto attention_backward(
    const MaybeTensor& grad_out, const MaybeTensor& grad_logsumexp, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& logsumexp, const MaybeTensor& attn_mask,
    const MaybeTensor& key_padding_mask, int64_t seed, double dropout_p, double scale, MaybeInt lower, MaybeInt upper,
    bool attn_mask_grad, bool padding_grad) {
  const ProblemArgs args{attn_mask, key_padding_mask, seed, dropout_p, scale, lower, upper};
  return fastattn::attention_backward(
      grad_out, grad_logsumexp, query, key, value, out, logsumexp, args, attn_mask_grad, padding_grad);
}

auto attention_weights(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp, const MaybeTensor& attn_mask,
    const MaybeTensor& key_padding_mask, int64_t seed, double dropout_p, double scale, MaybeInt lower, MaybeInt upper,
    bool average) {
  const ProblemArgs args{attn_mask, key_padding_mask, seed, dropout_p, scale, lower, upper};
  return fastattn::attention_weights(query, key, logsumexp, args, average);
}

auto attention_weights_backward(
    const at::Tensor& grad_weights, const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
    const MaybeTensor& attn_mask, const MaybeTensor& key_padding_mask, int64_t seed, double dropout_p, double scale,
    MaybeInt lower, MaybeInt upper, bool average, bool attn_mask_grad, bool padding_grad) {
  const ProblemArgs args{attn_mask, key_padding_mask, seed, dropout_p, scale, lower, upper};
  return fastattn::attention_weights_backward(
      grad_weights, query, key, logsumexp, args, average, attn_mask_grad, padding_grad);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("attention_forward", &attention_forward, NoGil());
  m.def("attention_backward", &attention_backward, NoGil());
  m.def("attention_weights", &attention_weights, NoGil());
  m.def("attention_weights_backward", &attention_weights_backward, NoGil());
  m.def("instruction_sets", &fastattn::instruction_sets);
  m.def("use_instruction_set", &fastattn::use_instruction_set);
}
