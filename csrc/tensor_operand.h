// Tensors as operands of products, and how many threads make one.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "operand.h"
#include "team.h"

namespace fastattn {

// The LSTM computes in the child of a fork, too.
inline int64_t team_size() { return forked() ? 1 : at::get_num_threads(); }

// Whether the numbers are float32 in the CPU's memory, as they are: those of a negative view have the other sign there.
inline bool has_floats(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat && tensor.device().is_cpu() && tensor.layout() == at::kStrided &&
         !tensor.is_neg();
}

// The tensor, or a copy, that is dense as a whole or a matrix dense along an axis.
inline at::Tensor dense_along_an_axis(const at::Tensor& tensor) {
  const bool rows = tensor.dim() == 2 && (tensor.stride(0) == 1 || tensor.stride(1) == 1);
  return rows || tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
}

inline Operand operand_of(const at::Tensor& rows) {
  return {rows.const_data_ptr<float>(), rows.size(0), rows.size(1), rows.stride(0), rows.stride(1)};
}

}  // namespace fastattn
