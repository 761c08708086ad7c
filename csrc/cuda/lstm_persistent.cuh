// The product at the heart of the persistent kernels, whose recurrent weights stay on the SMs for a whole launch.
//
// One launch computes all steps, or where layers run side by side (waves.h) a chunk of them. A block owns a few units
// of one direction or layer and loads its rows of W_hh once. At each step it multiplies them with the state of every
// row of its group of the batch, adds the sums of its warps in shared memory, computes its cells, writes their state to
// global memory, and waits at a barrier until the other blocks of the group have done so. Blocks of different groups
// never wait for one another; rows that have ended cost nothing.
//
// The product is W (units, depth) state^T (depth, rows) in tiles of 16 x 8 of the tensor cores. The warps share the
// depth: warp w has the blocks w, w + 8, ... of 64 bytes of each row, so that each state is loaded once per block.
// A lane loads 16 adjacent bytes, which are its operands in two consecutive mma instructions: the order of the depth
// within a block is a permutation, the same for weights and state.
//
// float32 runs as tf32 where torch allows it, else as three tf32 products of the upper and lower halves of both
// operands, which leaves errors of 2**-22 of a product.
//
// The floor on an H100 SXM (132 SMs; L2 about 5.5 TB/s and 0.3 us away; 990 bf16 TFLOP/s), estimated, not measured, for
// H = 1024, B = 16, bf16, one direction, per step:
//
//     barrier        0.6 us  one trip to the L2 cache to arrive, one or two to see it
//     state          1.1 us  0.3 us to the first byte; 128 blocks read (16, 1024) forward: 4.2 MB
//                    1.8 us  backward: 64 blocks for each of two groups read (8, 4096): 8.4 MB
//     tensor cores   0.2 us  0.13 GFLOP at 60 % of the peak, what mma.sync reaches on Hopper
//     weights        0 us    8.4 MB: 64 KiB (backward 128 KiB) of each SM's registers and shared memory, read once;
//                            step by step they come from the L2 cache each time, 1.5 us, beside two launches
//
// In float32 everything but the barrier doubles or more. The backward then keeps up to 256 KiB of weights in a block,
// 192 of them in shared memory: more than sm_80 has, which beyond H = 512 goes step by step.
#pragma once

#include "cells.cuh"

namespace fastattn::cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// More rows than this in a group, and the step-by-step products use the device better.
constexpr int64_t kMaxGroupRows = 128;

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements in a lane's load
template <class T>
constexpr int kDepth = 4 * kVector<T>;  // depth of a block of the product

// A lane's weights: rows lane / 4 of 2 TILES octets of rows, in each of the warp's BLOCKS blocks. As many as leave room
// for the rest of the kernel stay in registers, 80 of 255, or 64 beside three products for one; the others in shared
// memory, each where its thread alone looks.
template <bool EXACT, int TILES, int BLOCKS>
struct Weights {
  static constexpr int kOctets = 2 * TILES;
  static constexpr int kMost = (EXACT ? 64 : 80) / (4 * kOctets);
  static constexpr int kKept = BLOCKS < kMost ? BLOCKS : kMost;
  static constexpr int64_t kSharedBytes = int64_t{BLOCKS - kKept} * kOctets * kThreads * 16;

  Vector16 kept[kKept][kOctets];
  Vector16* shared;

  FASTATTN_INLINE void set(int block, int octet, const Vector16& v) {
    if (block < kKept)
      kept[block][octet] = v;
    else
      shared[((block - kKept) * kOctets + octet) * kThreads + threadIdx.x] = v;
  }
  FASTATTN_INLINE Vector16 get(int block, int octet) const {
    if (block < kKept) return kept[block][octet];
    return shared[((block - kKept) * kOctets + octet) * kThreads + threadIdx.x];
  }
};

// The bits of elements 0 to count - 1 at p, 0 for the rest of a vector; float32 rounded to tf32 unless EXACT.
template <class T, bool EXACT>
FASTATTN_INLINE Vector16 gather(const T* p, int64_t stride, int64_t count) {
  Vector16 result{};
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    if constexpr (sizeof(T) == 4) {
      const float x = e < count ? p[e * stride] : 0.0f;
      result.word[e] = EXACT ? float_to_bits(x) : to_tf32(x);
    } else {
      const uint32_t bits = e < count ? reinterpret_cast<const uint16_t*>(p)[e * stride] : 0u;
      result.word[e / 2] |= bits << (e % 2 * 16);
    }
  }
  return result;
}

// The place in the depth of this lane's vector in block `block` of its warp.
template <class T>
FASTATTN_INLINE int depth_of(int block) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return (block * kWarps + warp) * kDepth<T> + lane % 4 * kVector<T>;
}

// Split anew at every use: kept for all steps, the halves of the weights would take twice their registers.
struct Split {
  uint32_t upper, lower;
};
FASTATTN_INLINE Split split(uint32_t bits) {
  opaque(bits);
  const uint32_t upper = to_tf32(bits_to_float(bits));
  return {upper, to_tf32(bits_to_float(bits) - bits_to_float(upper))};
}

// sum[c][tile] += the warp's share of weights x rows 8 c to 8 c + 7. Lane (r, s) = (lane / 4, lane % 4) of the result
// holds row r of the tile's first octet for rows 8 c + 2 s and 8 c + 2 s + 1, then of its second octet.
// Rows from `count` on, and the depth from `depth` on, read as 0.
template <class T, bool EXACT, int TILES, int BLOCKS, int COLUMNS>
FASTATTN_INLINE void multiply(
    const Weights<EXACT, TILES, BLOCKS>& weights, const T* rows, int64_t stride, int count, int depth,
    float (&sum)[COLUMNS][TILES][4]) {
  const int row = threadIdx.x % 32 / 4;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    const int k = depth_of<T>(block);
    Vector16 state[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
      state[c] = load_from_blocks(rows + (8 * c + row) * stride + k, k < depth && 8 * c + row < count);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const Vector16 first = weights.get(block, 2 * tile), second = weights.get(block, 2 * tile + 1);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if constexpr (EXACT) {
          const Split a0 = split(first.word[i]), a1 = split(second.word[i]);
          const Split a2 = split(first.word[i + 1]), a3 = split(second.word[i + 1]);
#pragma unroll
          for (int c = 0; c < COLUMNS; ++c) {
            const Split b0 = split(state[c].word[i]), b1 = split(state[c].word[i + 1]);
            float(&to)[4] = sum[c][tile];
            mma<T>(to, a0.lower, a1.lower, a2.lower, a3.lower, b0.upper, b1.upper);
            mma<T>(to, a0.upper, a1.upper, a2.upper, a3.upper, b0.lower, b1.lower);
            mma<T>(to, a0.upper, a1.upper, a2.upper, a3.upper, b0.upper, b1.upper);
          }
        } else {
#pragma unroll
          for (int c = 0; c < COLUMNS; ++c) {
            uint32_t b0 = state[c].word[i], b1 = state[c].word[i + 1];
            if constexpr (sizeof(T) == 4) {
              b0 = to_tf32(bits_to_float(b0));
              b1 = to_tf32(bits_to_float(b1));
            }
            mma<T>(sum[c][tile], first.word[i], second.word[i], first.word[i + 1], second.word[i + 1], b0, b1);
          }
        }
      }
    }
  }
}

// ---- Who owns what.

// Row i of a group is row group + i groups of the batch: rows are sorted by length, so all groups end about together.
struct Owner {
  int part, group, unit_block;
};

template <class Args>
FASTATTN_INLINE Owner owner(const Args& a) {
  const int block = blockIdx.x, units = static_cast<int>(a.unit_blocks), groups = static_cast<int>(a.groups);
  return {block / units / groups, block / units % groups, block % units};
}

// How many rows of a group step t has, given how many rows of the batch it has.
FASTATTN_INLINE int group_rows(int rows, int group, int groups) {
  return rows <= group ? 0 : (rows - group + groups - 1) / groups;
}

// The steps in which a group has any row: the first ones, as steps never grow.
FASTATTN_INLINE int group_steps(const Steps& steps, int group) {
  int begin = 0, end = static_cast<int>(steps.count);  // [0, begin) have, [end, T) have not
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (rows_of(steps, middle) > group)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// A group's share of a launch: of its `steps` steps, counted in the order in which it computes them, these.
struct Turns {
  int begin, end;
};

template <class Part>
FASTATTN_INLINE Turns turns_of(const Part& part, int steps, bool last_step_first) {
  const int begin = part.begin < steps ? static_cast<int>(part.begin) : steps;
  const int end = part.end < steps ? static_cast<int>(part.end) : steps;
  return last_step_first ? Turns{steps - end, steps - begin} : Turns{begin, end};
}

// A kernel and its shared memory; no kernel where the weights are too many.
template <class Args>
struct Launch {
  Kernel<Args> kernel = nullptr;
  int64_t shared_bytes = 0;
};

// The layout on the current device: as few launches as hold all parts, or more where that leaves each group fewer rows
// than are too many.
template <class Args>
Plan plan_for(const Launch<Args>& launch, int64_t parts, int64_t batch, int64_t unit_blocks) {
  const int64_t at_once = launch.kernel ? blocks_at_once(launch.kernel, kThreads, launch.shared_bytes) : 0;
  const int64_t useful = (batch + 7) / 8;  // the tensor cores take 8 rows at a time
  for (int64_t launches = 1; launches <= parts; ++launches) {
    const int64_t together = (parts + launches - 1) / launches, groups = at_once / (together * unit_blocks);
    if (together > kMostTogether || groups == 0) continue;
    const Plan plan{unit_blocks, groups < useful ? groups : useful, together};
    if ((batch + plan.groups - 1) / plan.groups <= kMaxGroupRows) return plan;
  }
  return {};
}

}  // namespace fastattn::cuda
