// The operators of csrc/lstm.h that run on the emulated device, as torch.ops.fastattn_emulated.
#include <torch/library.h>

#include "cuda/launch.h"
#include "cuda/paths.h"
#include "cuda_emulator.h"
#include "lstm.h"

namespace fastattn::cuda {

void* current_stream() { return nullptr; }

}  // namespace fastattn::cuda

namespace {

using fastattn::LstmArgs;
using Optional = std::optional<at::Tensor>;

fastattn::LstmForward forward(
    const at::Tensor& input, const Optional& batch_sizes, const at::Tensor& h0, const at::Tensor& c0,
    at::TensorList weights, bool save) {
  return fastattn::lstm_forward_cuda({input, batch_sizes, h0, c0, weights.vec()}, save);
}

fastattn::LstmBackward backward(
    const Optional& grad_out, const Optional& grad_h_n, const Optional& grad_c_n, const at::Tensor& input,
    const Optional& batch_sizes, const at::Tensor& h0, const at::Tensor& c0, at::TensorList weights,
    const at::Tensor& out, const at::Tensor& gates, const at::Tensor& cells) {
  return fastattn::lstm_backward_cuda(
      {grad_out, grad_h_n, grad_c_n}, {input, batch_sizes, h0, c0, weights.vec()}, out, gates, cells);
}

fastattn::LstmLayersForward layers_forward(
    const at::Tensor& input, const Optional& batch_sizes, const at::Tensor& h0, const at::Tensor& c0,
    at::TensorList weights, bool save) {
  return fastattn::lstm_layers_forward_cuda({input, batch_sizes, h0, c0, weights.vec()}, save);
}

fastattn::LstmBackward layers_backward(
    const Optional& grad_out, const Optional& grad_h_n, const Optional& grad_c_n, const at::Tensor& input,
    const Optional& batch_sizes, const at::Tensor& h0, const at::Tensor& c0, at::TensorList weights,
    const at::Tensor& out, const at::Tensor& gates, const at::Tensor& cells, const at::Tensor& states) {
  return fastattn::lstm_layers_backward_cuda(
      {grad_out, grad_h_n, grad_c_n}, {input, batch_sizes, h0, c0, weights.vec()}, out, gates, cells, states);
}

int64_t launches() { return emulator::launches; }

std::tuple<int64_t, int64_t> layers_together(
    at::ScalarType type, int64_t layers, int64_t steps, int64_t batch, int64_t hidden) {
  const auto [forward, backward] = fastattn::cuda::layers_together(type, layers, steps, batch, hidden);
  return {forward, backward};
}

// blocks_at_once 0: the persistent kernels are not used.
void device(int64_t blocks_at_once, int64_t schedule) {
  fastattn::cuda::allow_persistent(blocks_at_once > 0);
  emulator::blocks_at_once = blocks_at_once;
  emulator::schedule = static_cast<emulator::Schedule>(schedule);
}

}  // namespace

TORCH_LIBRARY(fastattn_emulated, m) {
  m.def(
      "forward(Tensor input, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, bool save) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      forward);
  m.def(
      "backward(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? batch_sizes, Tensor h0, "
      "Tensor c0, Tensor[] weights, Tensor out, Tensor gates, Tensor cells) -> (Tensor, Tensor, Tensor, Tensor[])",
      backward);
  m.def(
      "layers_forward(Tensor input, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, bool save) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      layers_forward);
  m.def(
      "layers_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? batch_sizes, "
      "Tensor h0, Tensor c0, Tensor[] weights, Tensor out, Tensor gates, Tensor cells, Tensor states) "
      "-> (Tensor, Tensor, Tensor, Tensor[])",
      layers_backward);
  m.def("chunk_steps(int steps) -> int", fastattn::cuda::set_chunk_steps);
  m.def(
      "layers_together(ScalarType type, int layers, int steps, int batch, int hidden) -> (int, int)", layers_together);
  m.def("launches() -> int", launches);
  m.def("device(int blocks_at_once, int schedule) -> ()", device);
}
