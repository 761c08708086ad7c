// Products of matrices on the CPU: the fastest of split.h, panels.h and torch's.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace fastattn {

// left (M, K) right (K, N), of any type.
at::Tensor mm(const at::Tensor& left, const at::Tensor& right);

// left times each of two, of which by panels the left one is read once.
std::pair<at::Tensor, at::Tensor> mm_both(const at::Tensor& left, const at::Tensor& first, const at::Tensor& second);

// One product to `out` (M, N), contiguous and of the operands' type.
void mm_out(at::Tensor& out, const at::Tensor& left, const at::Tensor& right);

// Adds left (M, K) right (K, N) to `out` (M, N), contiguous and of their type; makes it where it is not defined.
void add_mm(at::Tensor& out, const at::Tensor& left, const at::Tensor& right);

// input (M, K) weight (N, K)^T + bias (N), likewise.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);

// Rows of the left operand from which some of these products are not torch's with the instruction set in use; the largest
// number where all are.
int64_t least_rows_of_own_products();

}  // namespace fastattn
