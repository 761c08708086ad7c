// What the products of matrices on the CPU share.
#pragma once

#include <cstdint>

namespace fastattn {

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// What may be expected of a second-level cache.
constexpr int64_t kCacheBytes = int64_t{2} << 20;

// A left operand (M, K), or the transpose (N, K) of a right one: element (i, k) is data[i * row + k * column]. One of
// the strides is 1.
struct Operand {
  const float* data;
  int64_t rows, depth;
  int64_t row, column;
};

}  // namespace fastattn
