// What the products of matrices on the CPU share.
#pragma once

#include <cstdint>

namespace fastattn {

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The share of part `part` of `parts` in [0, count).
constexpr Range share(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Scratch rows are padded with zeros to a multiple of this, the widest vector.
constexpr int64_t kPad = 16;

// What may be expected of a second-level cache.
constexpr int64_t kCacheBytes = int64_t{2} << 20;

// Of the third-level cache that the cores of this machine, or some of them, share; 32 MB where nothing says.
int64_t third_level_bytes();

// A left operand (M, K), or the transpose (N, K) of a right one: element (i, k) is data[i * row + k * column]. One of
// the strides is 1.
struct Operand {
  const float* data;
  int64_t rows, depth;
  int64_t row, column;
};

}  // namespace fastattn
