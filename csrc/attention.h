// The operators of fastattn/kernels/attention/op.py for the CPU. What every argument and result means stands there.
#pragma once

#include <tuple>
#include <vector>

#include "problem.h"

namespace fastattn {

// out (B, H, L, D), logsumexp (2, B, H, L), weights; weights_mode: 0 none (an empty tensor), 1 head average, 2 per head.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& sinks,
    const ProblemArgs& args, int64_t weights_mode);

at::Tensor attention_weights(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp, const ProblemArgs& args, bool average);

// Gradients of query, key, value or logsumexp, and those wanted of attn_mask and key_padding_mask, in that order.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

Gradients attention_backward(
    const std::optional<at::Tensor>& grad_out, const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const ProblemArgs& args, bool attn_mask_grad, bool padding_grad);

Gradients attention_weights_backward(
    const at::Tensor& grad_weights, const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
    const ProblemArgs& args, bool average, bool attn_mask_grad, bool padding_grad);

}  // namespace fastattn
