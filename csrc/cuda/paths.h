// Which of its two paths the CUDA LSTM takes: the persistent kernels, or step by step.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace fastattn::cuda {

// Tests and benchmarks compare the two paths: false leaves the persistent kernels unused.
void allow_persistent(bool allowed);

// Whether the forward and the backward of a call of this size on the current device are one persistent kernel.
std::pair<bool, bool> persistent(
    at::ScalarType type, int64_t directions, int64_t batch, int64_t hidden, bool projection);

}  // namespace fastattn::cuda
