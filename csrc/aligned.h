// Memory for kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "huge_pages.h"

namespace fastattn {

// From here on the addresses of the pages, 4 kB each, fall out of the processor: with huge ones bfloat16 weights of 1,024
// units, 8 MB twice, take 0.90 of the time at 8 rows; nothing is gained with 4 MB.
constexpr size_t kManyPages = size_t{8} << 20;

// Uninitialised numbers at a multiple of 64 bytes.
template <class T>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(int64_t count)
      : memory_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T) + 64, std::align_val_t{64}))) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes >= kManyPages) ask_for_huge_pages(memory_.get(), bytes);
  }
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
