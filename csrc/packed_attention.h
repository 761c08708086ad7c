// The operators of fastattn/kernels/attention/packed_op.py for the CPU. What arguments and results mean stands there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastattn {

// Where sequences packed one behind another stand, and which keys a query sees.
struct PackedArgs {
  at::Tensor cu_seq_q, cu_seq_k;        // (N + 1), int32 or int64
  std::optional<at::Tensor> seqused_k;  // (N), keys of each sequence that take part
  int64_t max_q = 0, max_k = 0;
  double scale = 1.0;
  std::optional<int64_t> left, right;
};

// out (Tq, H, D) and logsumexp (2, H, Tq). Both throw c10::Error unless the arguments fit together and the boundaries
// ascend from 0 to the tokens there are.
std::tuple<at::Tensor, at::Tensor> packed_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const PackedArgs& args);

// Gradients of query, key and value.
std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    const std::optional<at::Tensor>& grad_out, const std::optional<at::Tensor>& grad_logsumexp,
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const PackedArgs& args);

}  // namespace fastattn
