// The backward of one layer of the CUDA LSTM, and what a stack of layers side by side shares with it.
#pragma once

#include "call.h"

namespace fastattn::cuda {

// Gradients of the states of some parts: the directions of a layer, or layers of a stack.
struct GradStates {
  at::Tensor h_n, c_n;  // (parts, B, P), (parts, B, H) dense; undefined for zero
  at::Tensor h0, c0;    // likewise, results; hold h_n and c_n at first

  GradStates narrow(int64_t begin, int64_t count) const {
    return {h_n.defined() ? h_n.narrow(0, begin, count) : h_n, c_n.defined() ? c_n.narrow(0, begin, count) : c_n,
            h0.narrow(0, begin, count), c0.narrow(0, begin, count)};
  }
};

// What the forward of one layer read and wrote, and the gradient of its outputs; all dense.
struct BackwardLayer {
  const Direction* weights;  // of each direction
  at::Tensor input;          // (N, I)
  at::Tensor h0, c0;         // (D, B, P), (D, B, H)
  at::Tensor out;            // (N, D P)
  at::Tensor gates, cells;   // (N, D, 4 Hr), (N, D, Hr)
  at::Tensor grad_out;       // (N, D P); undefined for zero
};

// One direction's: G as (N, 4, units), and with a projection dh (N, P) and m (N, H).
struct Recurrence {
  at::Tensor grad_gates, grad_states, unprojected;

  // G of `rows` rows from `first` on as a matrix (rows, 4H).
  at::Tensor sums(const LstmShape& shape, int64_t first, int64_t rows) const;
};

// Gradient of the layer's input; those of its weights are appended to `grads`.
at::Tensor backward_layer(
    const Call& call, const BackwardLayer& layer, const GradStates& grad, std::vector<at::Tensor>& grads);

BackwardCells cells_of(const Call& call, const BackwardLayer& layer, const Recurrence& recurrence, int64_t d);

// A launch of some parts over all steps, with the memory of what its kernel keeps.
struct BackwardLaunch {
  PersistentBackward args{};
  at::Tensor grad_cell, arrivals;
};
BackwardLaunch backward_launch(
    const Call& call, const Plan& plan, const GradStates& grad, const Direction* weights, const BackwardCells* cells);

// After the persistent kernel: the gradient of h0 of direction d, to `grad_h0` (B, H).
void first_state_gradient(
    const Call& call, const Recurrence& recurrence, const Direction& weights, int64_t d, at::Tensor grad_h0);

// Gradients of the weights of direction d, whose G as a matrix is `sums` (N, 4H); appended to `grads`.
void weight_gradients(
    const Call& call, const BackwardLayer& layer, const Recurrence& recurrence, const at::Tensor& sums, int64_t d,
    std::vector<at::Tensor>& grads);

// A call's tensors as the above wants them: the gradients of its states, and rows (N, D P) or nothing.
GradStates grad_states(const Call& call, const LstmGradients& grad, const at::TensorOptions& options);
at::Tensor as_rows(const Call& call, const std::optional<at::Tensor>& tensor);

}  // namespace fastattn::cuda
