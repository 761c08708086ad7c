// Layers of a stack side by side: the sequence is cut into chunks of steps, and chunk k of layer l waits only for chunk
// k of the layer below and for chunk k - 1 of its own. All that have what they need are a wave: a product with W_ih for
// each, then one launch of the persistent kernel for all of them. Of three layers, two chunks:
//
//     wave      0     1     2     3
//     layer 0   k 0   k 1
//     layer 1         k 0   k 1
//     layer 2               k 0   k 1
//
// The backward takes the waves from the last to the first: a chunk's G W_ih is what the layer below gets.
//
// How long a chunk is, estimated, not measured, in steps of 2 us (lstm_persistent.cuh): T steps of L layers take L T,
// one layer after another, and T + (L - 1) C + 6 (T / C + L - 1) in waves of C steps. The 6 are 12 us for a wave: three
// to five kernels with 2 to 3 us from one to the next, and 3 us to load up to 64 KiB of weights into each SM. For T =
// 1024 the best C is sqrt(6 T / (L - 1)), 78 for two layers and 45 for four; 64 costs less than 2 % more than either:
// 1190 in place of 2048 steps, and 1330 in place of 4096. The least that is cut, 65 steps of two layers, takes 116
// in place of 130.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastattn::cuda {

constexpr int64_t kChunkSteps = 64;

// Steps `begin` to `end` - 1 of a layer.
struct Chunk {
  int64_t layer, begin, end;
};

class Waves {
 public:
  // Chunks of at most `most` steps, all of one length but the last; at least one step.
  Waves(int64_t layers, int64_t steps, int64_t most)
      : layers_(layers), steps_(steps), chunk_(ceiling(steps, ceiling(steps, most))), chunks_(ceiling(steps, chunk_)) {}

  int64_t count() const { return chunks_ + layers_ - 1; }

  std::vector<Chunk> wave(int64_t number) const {
    std::vector<Chunk> result;
    for (int64_t layer = 0; layer < layers_; ++layer) {
      const int64_t k = number - layer;
      if (k >= 0 && k < chunks_) result.push_back({layer, k * chunk_, std::min(steps_, (k + 1) * chunk_)});
    }
    return result;
  }

 private:
  static int64_t ceiling(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

  int64_t layers_, steps_, chunk_, chunks_;
};

}  // namespace fastattn::cuda
