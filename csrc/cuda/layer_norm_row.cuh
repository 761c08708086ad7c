// A row of the batch and the threads that share it: a warp, or a block.
//
// A normalisation sums over a row, so a kernel passes over its row several times. What it knows of a unit is a function
// of the unit (Values), which takes nothing that another thread writes. A thread that has at most UNITS units computes
// each value once and keeps it in registers. With more, UNITS 0, values are computed anew in each pass from what lies
// in memory, so nothing that they are computed from may be written before the last pass.
#pragma once

#include <utility>

#include "cells.cuh"
#include "layer_norm_launch.h"

namespace fastattn::cuda {

// Threads of a block, which has one row or one for each of its warps.
template <int THREADS>
constexpr int kBlockThreads = THREADS == 32 ? 128 : THREADS;
template <int THREADS>
constexpr int kBlockRows = kBlockThreads<THREADS> / THREADS;

template <int THREADS>
FASTATTN_INLINE int64_t row_number() {
  return int64_t{blockIdx.x} * kBlockRows<THREADS> + threadIdx.x / THREADS;
}

// f(u, j) for each unit j of this thread, its u-th.
template <int THREADS, int UNITS, class F>
FASTATTN_INLINE void for_units(int64_t hidden, F f) {
  const int64_t thread = threadIdx.x % THREADS;
  if constexpr (UNITS > 0) {
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
      if (thread + u * THREADS < hidden) f(u, thread + u * THREADS);
  } else {
    for (int64_t j = thread; j < hidden; j += THREADS) f(0, j);
  }
}

// f(u, j) of the same units, computed now or whenever it is asked for.
template <int THREADS, int UNITS, class F>
struct Values {
  using Value = decltype(std::declval<F>()(0, int64_t{}));

  F f;
  Value kept[UNITS];

  FASTATTN_INLINE Values(int64_t hidden, F function) : f(function) {
    for_units<THREADS, UNITS>(hidden, [&](int u, int64_t j) { kept[u] = f(u, j); });
  }
  FASTATTN_INLINE Value operator()(int u, int64_t) const { return kept[u]; }
};

template <int THREADS, class F>
struct Values<THREADS, 0, F> {
  F f;

  FASTATTN_INLINE Values(int64_t, F function) : f(function) {}
  FASTATTN_INLINE auto operator()(int u, int64_t j) const { return f(u, j); }
};

template <int THREADS, int UNITS, class F>
FASTATTN_INLINE Values<THREADS, UNITS, F> values_of(int64_t hidden, F f) {
  return {hidden, f};
}

// Two sums over a row.
struct Pair {
  float first, second;
};

FASTATTN_INLINE Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
FASTATTN_INLINE Pair exchange(Pair x, int distance) {
  return {exchange(x.first, distance), exchange(x.second, distance)};
}

// The sum of the numbers, or pairs, of a row's threads; each gets the same bits, in whatever order the threads run.
template <int THREADS>
struct RowSums {
  static constexpr int kWarps = THREADS / 32;
  // Two sets of the warps' sums in turn: one may be written while others still read the other.
  static constexpr int64_t kSharedBytes = THREADS == 32 ? 0 : 2 * kWarps * int64_t{sizeof(Pair)};

  Pair* shared;
  int turn = 0;

  FASTATTN_INLINE explicit RowSums(unsigned char* memory) : shared(reinterpret_cast<Pair*>(memory)) {}

  template <class V>
  FASTATTN_INLINE V operator()(V own) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) own = own + exchange(own, distance);
    if constexpr (THREADS > 32) {
      V* const sums = reinterpret_cast<V*>(shared + turn * kWarps);
      turn ^= 1;
      if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = own;
      __syncthreads();
      own = sums[0];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) own = own + sums[warp];
    }
    return own;
  }
};

// The four gates of a unit at a time: the formulas of layer_norm_cell.h take them as they take a number.
FASTATTN_INLINE Gates<float> operator-(const Gates<float>& a, const Gates<float>& b) {
  return {a.i - b.i, a.f - b.f, a.g - b.g, a.o - b.o};
}
FASTATTN_INLINE Gates<float> operator*(const Gates<float>& a, const Gates<float>& b) {
  return {a.i * b.i, a.f * b.f, a.g * b.g, a.o * b.o};
}
FASTATTN_INLINE Gates<float> operator-(const Gates<float>& a, float b) { return {a.i - b, a.f - b, a.g - b, a.o - b}; }
FASTATTN_INLINE Gates<float> operator*(const Gates<float>& a, float b) { return {a.i * b, a.f * b, a.g * b, a.o * b}; }
FASTATTN_INLINE Gates<float> operator*(float a, const Gates<float>& b) { return b * a; }

FASTATTN_INLINE float total(float x) { return x; }
FASTATTN_INLINE float total(const Gates<float>& x) { return x.i + x.f + x.g + x.o; }

// Of x(u, j), `count` numbers in all.
template <int THREADS, int UNITS, class F>
FASTATTN_INLINE Moments moments(RowSums<THREADS>& sums, int64_t hidden, float count, float eps, const F& x) {
  float sum = 0.0f;
  for_units<THREADS, UNITS>(hidden, [&](int u, int64_t j) { sum += total(x(u, j)); });
  const float mean = sums(sum) / count;
  float square = 0.0f;
  for_units<THREADS, UNITS>(hidden, [&](int u, int64_t j) {
    const auto distance = x(u, j) - mean;
    square += total(distance * distance);
  });
  return moments_of(mean, sums(square), count, eps);
}

// mean(dn) and mean(dn n) of the pairs (dn, dn n) that f(u, j) gives.
template <int THREADS, int UNITS, class F>
FASTATTN_INLINE Means means(RowSums<THREADS>& sums, int64_t hidden, float count, const F& f) {
  Pair own{0.0f, 0.0f};
  for_units<THREADS, UNITS>(hidden, [&](int u, int64_t j) { own = own + f(u, j); });
  const Pair whole = sums(own);
  return {whole.first / count, whole.second / count};
}

// The numbers of one unit in a row of (4H): the counterpart of four_rows.
template <class T>
FASTATTN_INLINE void put_four_rows(void* to, int64_t index, int64_t hidden, const Gates<float>& x) {
  put<T>(to, index, x.i);
  put<T>(to, index + hidden, x.f);
  put<T>(to, index + 2 * hidden, x.g);
  put<T>(to, index + 3 * hidden, x.o);
}

// ---- For the host.

template <class TYPE, int THREADS, int UNITS>
struct RowShape {
  using T = TYPE;
  static constexpr int kThreads = THREADS, kUnits = UNITS, kMost = THREADS * UNITS;
};

template <class Shape, class Args, class F>
void launch_shape(const Args& args, void* stream, F kernel_of) {
  constexpr int rows = kBlockRows<Shape::kThreads>;
  launch_blocks<Args>(
      kernel_of(Shape{}), (args.rows + rows - 1) / rows, kBlockThreads<Shape::kThreads>,
      RowSums<Shape::kThreads>::kSharedBytes, args, stream);
}

template <class T, class Args, class F>
void launch_units(const Args& args, void* stream, F kernel_of) {
  using Warp = RowShape<T, 32, 4>;
  using Block = RowShape<T, 256, 4>;
  if (args.hidden <= Warp::kMost) return launch_shape<Warp>(args, stream, kernel_of);
  if (args.hidden <= Block::kMost) return launch_shape<Block>(args, stream, kernel_of);
  launch_shape<RowShape<T, 512, 0>>(args, stream, kernel_of);
}

// The kernel that kernel_of(RowShape) gives, for all rows; no launch where there are none.
template <class Args, class F>
void launch_rows(Element type, const Args& args, void* stream, F kernel_of) {
  if (args.rows == 0) return;
  switch (type) {
    case Element::half: return launch_units<half>(args, stream, kernel_of);
    case Element::bfloat16: return launch_units<bfloat16>(args, stream, kernel_of);
    default: return launch_units<float>(args, stream, kernel_of);
  }
}

}  // namespace fastattn::cuda
