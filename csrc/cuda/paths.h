// Which of its paths the CUDA LSTM takes: the persistent kernels, or step by step; layers side by side, or in turn.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace fastattn::cuda {

// Tests and benchmarks compare the two paths: false leaves the persistent kernels unused.
void allow_persistent(bool allowed);

// Likewise layers side by side and in turn: the most steps of a chunk (waves.h), what is no longer is not cut. Returns
// what it was before.
int64_t set_chunk_steps(int64_t steps);

// Whether the forward and the backward of a call of this size on the current device are one persistent kernel.
std::pair<bool, bool> persistent(
    at::ScalarType type, int64_t directions, int64_t batch, int64_t hidden, bool projection);

// How many layers of a stack the forward and the backward compute side by side; 1: one after the other.
std::pair<int64_t, int64_t> layers_together(
    at::ScalarType type, int64_t layers, int64_t steps, int64_t batch, int64_t hidden);

}  // namespace fastattn::cuda
