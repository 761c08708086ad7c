// Products of float32 matrices by split_cpu.h: which tensors may be taken, and large products on all threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <new>

#include "split_cpu.h"

namespace fastattn {

// Uninitialised bfloat16 at a multiple of 64 bytes.
class SplitMemory {
 public:
  explicit SplitMemory(int64_t numbers)
      : memory_(static_cast<uint16_t*>(
            ::operator new(static_cast<size_t>(numbers) * sizeof(uint16_t) + 64, std::align_val_t{64}))) {}
  uint16_t* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(uint16_t* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<uint16_t, Free> memory_;
};

// Whether products of the tensor with others that split lose nothing by that: it is float32, its numbers are finite and at
// most 2^62 in size, so that no product overflows, and the largest is at least 2^-40, or all are 0: the smallest parts of
// the largest products are then far above 2^-126, below which AMX takes numbers for 0.
bool splits(const at::Tensor& tensor);

// out (M, N), rows of stride out_row, = left (M, K) right (K, N), plus a bias per column where there is one; `right` is
// given as its transpose (N, K). Both are packed here.
void split_matmul(
    const SplitOperand& left, const SplitOperand& right, const float* bias, float* out, int64_t out_row);

// left (M, K) right (K, N), of any type; by torch's product where splitting is not possible or not worth it.
at::Tensor split_mm(const at::Tensor& left, const at::Tensor& right);

// input (M, K) weight (N, K)^T + bias (N), likewise.
at::Tensor split_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace fastattn
