// The operators of fastattn/kernels/attention/op.py for the CPU. What every argument and result means stands there.
#pragma once

#include <tuple>

#include "problem.h"

namespace fastattn {

// out (B, H, L, D), logsumexp (2, B, H, L), weights; weights_mode: 0 none (an empty tensor), 1 head average, 2 per head.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const ProblemArgs& args,
    int64_t weights_mode);

at::Tensor attention_weights(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp, const ProblemArgs& args, bool average);

// Five gradients: query, key, value or logsumexp, attn_mask, key_padding_mask; for a mask whose gradient is not wanted
// one unused number, since tensors without storage would count as aliases of each other.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients attention_backward(
    const std::optional<at::Tensor>& grad_out, const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const ProblemArgs& args, bool attn_mask_grad, bool padding_grad);

Gradients attention_weights_backward(
    const at::Tensor& grad_weights, const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
    const ProblemArgs& args, bool average, bool attn_mask_grad, bool padding_grad);

}  // namespace fastattn
