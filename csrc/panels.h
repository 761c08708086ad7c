// Products of float32 matrices by panels_cpu.h, on all threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "panels_cpu.h"

namespace fastattn {

// Whether left (M, K) and right (N, K) have a product that is faster by panels than by torch.
bool worth_panels(const at::Tensor& left, const at::Tensor& right);

// out (M, N), contiguous, = left (M, K) right (N, K)^T, plus a bias (N) where it is defined; float32, K not 0. `add`: to
// what is in out, without a bias.
void panel_product(
    const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias, bool add = false);

}  // namespace fastattn
