// Large memory that a call allocates.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn {

// Asks for huge pages in memory that is written whole: the C library returns large blocks to the system when they are
// freed, so that a call meets every page for the first time. A request only; failing, it does nothing.
inline void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline at::Tensor with_huge_pages(at::Tensor tensor) {
  ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

}  // namespace fastattn
