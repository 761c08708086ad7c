#include "kept_memory.h"

#include <ATen/Context.h>
#include <ATen/ops/from_blob.h>
#include <ATen/native/TensorFactories.h>

#include <array>
#include <atomic>
#include <new>

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
  // The smallest that holds so many bytes, unless more than half of it were not used.
  Block take(size_t bytes) {
    size_t best = count_;
    for (size_t i = 0; i < count_; ++i)
      if (blocks_[i].bytes >= bytes && blocks_[i].bytes / 2 <= bytes &&
          (best == count_ || blocks_[i].bytes < blocks_[best].bytes))
        best = i;
    return best < count_ ? remove(best) : Block{};
  }

  void give(Block block) {
    while (count_ > 0 && (count_ == blocks_.size() || bytes_ + block.bytes > kMostKept)) release(remove(0));
    ASAN_POISON_MEMORY_REGION(block.memory, block.bytes);
    blocks_[count_++] = block;
    bytes_ += block.bytes;
  }

  size_t clear() {
    const size_t bytes = bytes_;
    while (count_ > 0) release(remove(count_ - 1));
    return bytes;
  }

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

// f(kept), by one thread at a time; false where another one holds it for long, as in the child of a fork() whose parent's
// thread did: then memory comes from the C library and goes back there.
template <class F>
bool with_kept(F f) {
  for (int tries = 0; busy.test_and_set(std::memory_order_acquire);)
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
  const bool keep = block.bytes >= kLeastKept && block.bytes <= kMostKept;
  if (!keep || !with_kept([&](Kept& blocks) { blocks.give(block); })) release(block);
}

at::Tensor kept_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  const Block block = take_block(static_cast<size_t>(count) * options.dtype().itemsize());
  at::Tensor tensor = at::from_blob(block.memory, sizes, [block](void*) { give_back(block); }, options);
  if (at::globalContext().deterministicFillUninitializedMemory() && at::globalContext().deterministicAlgorithms())
    at::native::fill_empty_deterministic_(tensor);  // as at::empty does
  return tensor;
}

int64_t release_kept_memory() {
  size_t bytes = 0;
  with_kept([&](Kept& blocks) { bytes = blocks.clear(); });
  return static_cast<int64_t>(bytes);
}

}  // namespace fastattn
