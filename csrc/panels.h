// Products of float32 matrices by panels_cpu.h, on all threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "panels_cpu.h"

namespace fastattn {

// Whether left (M, K) and right (N, K) have a product that is faster by panels than by torch.
bool worth_panels(const at::Tensor& left, const at::Tensor& right);

// A right operand (N, K), and out (M, N), contiguous, = left (M, K) right^T, plus a bias (N) where it is defined.
struct PanelProductOf {
  at::Tensor out, right, bias;
};

// The products of `left` (M, K) with each of them; float32, K not 0. `add`: to what is in out, without a bias.
void panel_products(const at::Tensor& left, std::initializer_list<PanelProductOf> of, bool add = false);

}  // namespace fastattn
