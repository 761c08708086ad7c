// The LSTM operators of fastattn/kernels/lstm/op.py: every tensor's shape and lifetime, for the CPU and for CUDA.
//
// One call is one layer in D directions (1, or 2: the second reads the sequence from its end). The layer is torch's:
//
//     i, f, g, o = sigmoid, sigmoid, tanh, sigmoid (W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
//     c_t = f c_{t-1} + i g,    m_t = o tanh(c_t),    h_t = W_hr m_t, or m_t without a projection
//
// Names: T steps, B batch, I input features, H hidden units, P = projection size or H, N rows of all steps together.
// A padded batch is (T, B, ...), N = T B. A packed one is (N, ...): step after step, step t holding the first
// batch_sizes[t] rows of the batch, N = sum(batch_sizes). Both are the same memory where all lengths are T.
//
// Tensors are inputs, never written, or results that the call allocates; all outlive it, none is kept. All floating
// tensors of a call share one dtype and device; strides are free.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastattn {

struct LstmArgs {
  at::Tensor input;                       // (T, B, I), or packed (N, I)
  std::optional<at::Tensor> batch_sizes;  // (T), int64 on the CPU, never increasing, each >= 1; for packed input only
  at::Tensor h0;                          // (D, B, P)
  at::Tensor c0;                          // (D, B, H)
  // Per direction W_ih (4H, I), W_hh (4H, P), then where there are biases b_ih (4H), b_hh (4H), then where there is a
  // projection W_hr (P, H): 2, 3, 4 or 5 tensors, gates in the order i, f, g, o.
  std::vector<at::Tensor> weights;
};

// out (T, B, D P) or (N, D P), h_n (D, B, P), c_n (D, B, H); and what the backward needs, empty (0) unless `save`:
// gates (N, D, 4 Hr) in the dtype of the input, cells (N, D, Hr) float32, Hr = H rounded up to 16. What stands where in
// the two is known to the device's own backward alone.
using LstmForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of input, h0, c0, and of each of the weights.
using LstmBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

// Throw c10::Error (ValueError, TypeError in Python) for whatever does not fit the above, before anything is computed.
LstmForward lstm_forward_cpu(const LstmArgs& args, bool save);
LstmForward lstm_forward_cuda(const LstmArgs& args, bool save);

// A gradient that is absent is zero. out, gates and cells are the forward's results with `save`.
struct LstmGradients {
  std::optional<at::Tensor> out, h_n, c_n;  // shapes of the results of the same name
};

// Whether the gradients of the input and of the weights are wanted; others are left undefined.
struct LstmWanted {
  bool input = true, weights = true;
};
LstmBackward lstm_backward_cpu(
    const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out, const at::Tensor& gates,
    const at::Tensor& cells, LstmWanted wanted);

// A cell is one step in one direction without a projection and without the dimensions of length one: input (B, I), h0 and
// c0 (B, H). h_1, c_1, and gates and cells as above, undefined unless `save`.
using LstmCellForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LstmCellForward lstm_cell_forward_cpu(const LstmArgs& args, bool save);

// The backward of such a step, a cell's or a layer's, but for the gradients of the weights: gradients of the input where
// `input_grad`, of h0, c0, and of the sums W_ih x + b_ih + W_hh h + b_hh (B, 4H), float32 or, where the input is that,
// bfloat16. Calls that share their weights so have one product for each gradient of them. The gradients of a cell's
// results are grad.h_n and grad.c_n.
using LstmStepBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LstmStepBackward lstm_step_backward_cpu(
    const LstmGradients& grad, const LstmArgs& args, const at::Tensor& gates, const at::Tensor& cells, bool input_grad);

LstmBackward lstm_backward_cuda(
    const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out, const at::Tensor& gates,
    const at::Tensor& cells);

// A stack of L layers in one direction without projections, each reading the outputs of the one below. Here h0, c0, h_n
// and c_n are (L, B, H), and the weights stand layer after layer, W_ih (4H, I) in the first and (4H, H) in the others.
// out, h_n, c_n, and for the backward, empty (0) unless `save`: gates (L, N, 4 Hr), cells (L, N, Hr) and the outputs of
// all layers but the last, states (L - 1, N, H).
using LstmLayersForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LstmLayersForward lstm_layers_forward_cuda(const LstmArgs& args, bool save);
LstmBackward lstm_layers_backward_cuda(
    const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out, const at::Tensor& gates,
    const at::Tensor& cells, const at::Tensor& states);

}  // namespace fastattn
