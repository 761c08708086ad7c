// Large tensors that a call allocates.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn {

// Asks for huge pages in memory that is written whole: the C library returns large blocks to the system when they are
// freed, so that a call meets every page for the first time. A request only; failing, it does nothing.
inline at::Tensor with_huge_pages(at::Tensor tensor) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace fastattn
