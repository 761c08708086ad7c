// Products of float32 matrices by split_cpu.h: which tensors may be taken, and large products on all threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "split_cpu.h"

namespace fastattn {

// Whether products of the tensor with others that split lose nothing by that: it is float32, its numbers are finite and at
// most 2^62 in size, so that no product overflows, and the largest is at least 2^-40, or all are 0: the smallest parts of
// the largest products are then far above 2^-126, below which AMX takes numbers for 0.
bool splits(const at::Tensor& tensor);

// left (M, K) right (K, N), of any type; by torch's product where splitting is not possible or not worth it.
at::Tensor split_mm(const at::Tensor& left, const at::Tensor& right);

// input (M, K) weight (N, K)^T + bias (N), likewise.
at::Tensor split_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace fastattn
