// Memory for kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace fastattn {

// Uninitialised numbers at a multiple of 64 bytes.
template <class T>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(int64_t count)
      : memory_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T) + 64, std::align_val_t{64}))) {}
  T* get() const { return memory_.get(); }
  T* operator+(int64_t offset) const { return memory_.get() + offset; }

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory_;
};

using Floats = Aligned<float>;

}  // namespace fastattn
