// Memory for kernels.
#pragma once

#include <cstdint>
#include <utility>

#include "kept_memory.h"

namespace fastattn {

// Uninitialised numbers at a multiple of 64 bytes.
template <class T>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(int64_t count) : block_(take_block(static_cast<size_t>(count) * sizeof(T) + 64)) {}
  Aligned(Aligned&& other) noexcept : block_(std::exchange(other.block_, {})) {}
  Aligned& operator=(Aligned&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Aligned() { give_back(block_); }
  T* get() const { return static_cast<T*>(block_.memory); }
  T* operator+(int64_t offset) const { return get() + offset; }

 private:
  Block block_;
};

using Floats = Aligned<float>;

}  // namespace fastattn
