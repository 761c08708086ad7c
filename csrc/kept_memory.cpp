#include "kept_memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/CPUAllocator.h>

#include <array>
#include <atomic>
#include <cstring>
#include <new>
#include <thread>

#include "huge_pages.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) static_cast<void>(0)
#endif

namespace fastattn {

namespace {

constexpr std::align_val_t kAlignment{64};
// Smaller blocks stay with the C library, which keeps them itself.
constexpr size_t kLeastKept = size_t{128} << 10;
// From here on huge pages are asked for: the addresses of 4 kB pages fall out of the processor. With bfloat16 weights of
// 1,024 units, 8 MB twice, a layer of 8 rows takes 0.90 of the time.
constexpr size_t kManyPages = size_t{4} << 20;

void release(Block block) noexcept { ::operator delete(block.memory, kAlignment); }

// Blocks in the order in which they came.
class Kept {
 public:
  // The smallest that holds so many bytes and no more than an eighth beyond: a tensor may live long.
  Block take(size_t bytes) {
    size_t best = count_;
    for (size_t i = 0; i < count_; ++i)
      if (blocks_[i].bytes >= bytes && blocks_[i].bytes - bytes <= bytes / 8 &&
          (best == count_ || blocks_[i].bytes < blocks_[best].bytes))
        best = i;
    return best < count_ ? remove(best) : Block{};
  }

  // The block that has to go before this one is kept, or none.
  Block give(Block block) {
    if (count_ == blocks_.size() || bytes_ + block.bytes > kMostKept) return remove(0);
    ASAN_POISON_MEMORY_REGION(block.memory, block.bytes);
    blocks_[count_++] = block;
    bytes_ += block.bytes;
    return {};
  }

  Block oldest() { return count_ > 0 ? remove(0) : Block{}; }

 private:
  Block remove(size_t index) {
    const Block block = blocks_[index];
    for (size_t i = index; i + 1 < count_; ++i) blocks_[i] = blocks_[i + 1];
    --count_;
    bytes_ -= block.bytes;
    ASAN_UNPOISON_MEMORY_REGION(block.memory, block.bytes);
    return block;
  }

  std::array<Block, 64> blocks_{};
  size_t count_ = 0, bytes_ = 0;
};

Kept kept;
std::atomic_flag busy = ATOMIC_FLAG_INIT;

// f(kept), by one thread at a time, which takes less than a microsecond; false where another one holds it for long, as in
// the child of a fork() whose parent's thread did: then memory comes from the C library and goes back there.
template <class F>
bool with_kept(F f) {
  for (int tries = 0; busy.test_and_set(std::memory_order_acquire); std::this_thread::yield())
    if (++tries == 1000) return false;
  f(kept);
  busy.clear(std::memory_order_release);
  return true;
}

}  // namespace

Block take_block(size_t bytes) {
  Block block;
  if (bytes >= kLeastKept) with_kept([&](Kept& blocks) { block = blocks.take(bytes); });
  if (block.memory) return block;
  block = {::operator new(bytes, kAlignment), bytes};
  if (bytes >= kManyPages) ask_for_huge_pages(block.memory, bytes);
  return block;
}

void give_back(Block block) noexcept {
  if (!block.memory) return;
  if (block.bytes < kLeastKept || block.bytes > kMostKept) return release(block);
  while (true) {
    Block before;
    if (!with_kept([&](Kept& blocks) { before = blocks.give(block); })) return release(block);
    if (!before.memory) return;
    release(before);
  }
}

namespace {

// For storages of torch, which so can be resized, and whose profiler sees them. The block's own size stands before the
// numbers: torch copies on write only storages whose context is their memory.
class KeptAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const Block block = take_block(kBefore + bytes);
    std::memcpy(block.memory, &block.bytes, sizeof block.bytes);
    void* memory = static_cast<char*>(block.memory) + kBefore;
    c10::profiledCPUMemoryReporter().New(memory, block.bytes);
    return {memory, memory, &free, at::kCPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static constexpr size_t kBefore = static_cast<size_t>(kAlignment);

  static void free(void* memory) {
    c10::profiledCPUMemoryReporter().Delete(memory);
    Block block{static_cast<char*>(memory) - kBefore, 0};
    std::memcpy(&block.bytes, block.memory, sizeof block.bytes);
    give_back(block);
  }
};

}  // namespace

at::Tensor kept_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static KeptAllocator* allocator = new KeptAllocator;  // tensors may outlive what is destroyed at exit
  at::Tensor tensor = at::detail::empty_generic(
      sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), at::typeMetaToScalarType(options.dtype()),
      at::MemoryFormat::Contiguous);
  if (at::globalContext().deterministicFillUninitializedMemory() && at::globalContext().deterministicAlgorithms())
    at::native::fill_empty_deterministic_(tensor);  // as at::empty does
  return tensor;
}

int64_t release_kept_memory() {
  for (size_t bytes = 0;;) {
    Block block;
    with_kept([&](Kept& blocks) { block = blocks.oldest(); });
    if (!block.memory) return static_cast<int64_t>(bytes);
    bytes += block.bytes;
    release(block);
  }
}

}  // namespace fastattn
