// The operators of fastattn/kernels/additive/op.py for the CPU: float32, float16 and bfloat16. What every argument and
// result means stands there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastattn {

struct AdditiveArgs {
  at::Tensor query, key, weight;  // (B, Tq, D), (B, Tk, D), (D) of one dtype
  std::optional<at::Tensor> coverage, coverage_weight;  // (B, 1 or Tq, Tk) floating and (D), both or none
  std::optional<at::Tensor> mask;                       // (B, Tk) boolean, true takes part
};

// Scores (B, Tq, Tk) in float32, -inf where the mask is false. Both throw c10::Error unless the arguments fit together.
at::Tensor additive_scores(const AdditiveArgs& args);

// Gradients of query, key and weight; of coverage_weight and, if wanted, coverage, where there is coverage. dscores does
// not count where the mask is false.
using AdditiveGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

AdditiveGradients additive_scores_backward(const at::Tensor& dscores, const AdditiveArgs& args, bool coverage_grad);

}  // namespace fastattn
