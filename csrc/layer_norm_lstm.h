// The operators of fastattn/kernels/layer_norm_lstm/op.py for the CPU and for CUDA; what arguments and results mean
// stands there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastattn {

struct LayerNormLstmArgs {
  at::Tensor input;                       // (T, B, I), or packed (N, I)
  std::optional<at::Tensor> batch_sizes;  // (T), int64
  at::Tensor h0, c0;                      // (D, B, H)
  std::vector<at::Tensor> weights;        // 5 per direction, or 7 with biases
  std::optional<at::Tensor> h_mask;       // (B, D, H) or (N, D, H), floating
  std::optional<at::Tensor> zoneout_h, zoneout_c;  // (N, D, H), boolean
  double keep_h = 0.0, keep_c = 0.0, eps = 0.0;
};

// out, cells, h_n, c_n; and what the backward needs, empty (0) unless `save`: float32, for D directions, N rows, one
// after the other, where Hr is H on CUDA and on the CPU H rounded up to a multiple of 16,
//
//     the normalised products of input and of hidden state and the gates, (D, N, 4Hr) each,
//     c_t and the normalised c', (D, N, Hr) each, and the three inverse deviations, (D, N, 3).
//
// In which order the 4Hr numbers of a row stand is known to the device's own backward alone.
using LayerNormLstmForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Gradients of input (empty (0) unless `input_grad`), h0, c0 and each of the weights.
using LayerNormLstmBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

// A gradient that is absent is zero.
struct LayerNormLstmGradients {
  std::optional<at::Tensor> out, cells, h_n, c_n;
};

// Throw c10::Error (ValueError, TypeError in Python) for whatever does not fit, before anything is computed.
LayerNormLstmForward layer_norm_lstm_forward_cpu(const LayerNormLstmArgs& args, bool save, bool all_cells);
LayerNormLstmForward layer_norm_lstm_forward_cuda(const LayerNormLstmArgs& args, bool save, bool all_cells);
LayerNormLstmBackward layer_norm_lstm_backward_cpu(
    const LayerNormLstmGradients& grad, const LayerNormLstmArgs& args, const at::Tensor& out, const at::Tensor& saved,
    bool input_grad);
LayerNormLstmBackward layer_norm_lstm_backward_cuda(
    const LayerNormLstmGradients& grad, const LayerNormLstmArgs& args, const at::Tensor& out, const at::Tensor& saved,
    bool input_grad);

}  // namespace fastattn
