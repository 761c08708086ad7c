// Products of float32 matrices by split_cpu.h: which tensors may be taken, and large products on all threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "split_cpu.h"

namespace fastattn {

// Whether products of the tensor with others that split lose nothing by that: it is float32, its numbers are finite and at
// most 2^62 in size, so that no product overflows, and the largest is at least 2^-40, or all are 0: the smallest parts of
// the largest products are then far above 2^-126, below which AMX takes numbers for 0.
bool splits(const at::Tensor& tensor);

// Whether left (M, K) and right (N, K) have a product that may be split and is faster so than by torch.
bool can_split(const at::Tensor& left, const at::Tensor& right);

// out (M, N), contiguous, = left (M, K) right (N, K)^T, plus a bias (N) where it is defined, for such operands.
void split_product(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias);

}  // namespace fastattn
