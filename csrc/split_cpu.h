// Products of float32 matrices on bfloat16 matrix units: the contract between drivers and kernels, as attention_cpu.h.
//
// A float32 x is the sum of three bfloat16, x = x1 + x2 + x3 with |x2| <= 2^-8 |x| and |x3| <= 2^-16 |x|, so
//
//     x y = x1 y1 + (x1 y2 + x2 y1) + (x1 y3 + x2 y2 + x3 y1) + less than 2^-23 |x y|
//
// (Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations",
// 2019). A product of two bfloat16 is exact in float32, and the sums are float32: the six products lose what one product
// of float32 loses by its own rounding. AMX makes sixteen of them in the time that a core's vector units take for one.
//
// The sum holds for finite x of a size between 2^-102 and 2^126, and AMX takes what is below 2^-126 for 0: splits() says
// which tensors fit. A state or gradient that fades below 2^-80 within a recurrence keeps fewer digits; an infinity that
// arises there becomes NaN.
//
// An operand is packed in blocks: 32 rows of a left operand (M, K), 32 columns of a right one (K, N), zeros beyond them.
// A block is (3 parts, K / 32 rounded up, 2, 512 numbers), the parts from large to small; 512 numbers are one tile of
// AMX: 16 rows of 32 consecutive k, or 16 pairs of consecutive k of 16 columns, tile[k / 2][column][k % 2].
#pragma once

#include "operand.h"

namespace fastattn {

constexpr int64_t kSplitParts = 3, kSplitBlock = 32, kSplitDepth = 32;
constexpr int64_t kSplitTile = 16 * kSplitDepth;

constexpr int64_t split_blocks(int64_t rows) { return (rows + kSplitBlock - 1) / kSplitBlock; }

constexpr int64_t split_depth(int64_t depth) { return (depth + kSplitDepth - 1) / kSplitDepth; }

// Numbers of a block for products of that depth.
constexpr int64_t split_block(int64_t depth) { return kSplitParts * split_depth(depth) * 2 * kSplitTile; }

// Where half a block begins in an operand of that depth.
constexpr int64_t split_half(int64_t half, int64_t depth) { return half / 2 * split_block(depth) + half % 2 * kSplitTile; }

// out (rows, columns) = left times right.
struct SplitProduct {
  int64_t rows, columns, depth;
  const uint16_t *left, *right;
  float* out;
  int64_t out_row;
};

struct SplitKernels {
  // 16 rows of an operand, rows 16 * half on, to the first tile of that half of a block: the even halves of a packed
  // operand begin its blocks, the odd ones stand a tile behind.
  void (*pack_left)(const Operand&, int64_t half, uint16_t* to);
  void (*pack_right)(const Operand&, int64_t half, uint16_t* to);
  // Plus a bias (columns), unless it is null. For an `out` larger than the caches; best where the left operand stays in
  // the second-level one.
  void (*product)(const SplitProduct&, const float* bias);
  // The bits of the largest of the sizes of `count` numbers; NaN is the largest of all.
  uint32_t (*largest)(const float*, int64_t count);
};

const SplitKernels& split_kernels();

// Whether the instruction set in use makes such products: by AMX, or for tests by the emulation.
bool has_split_products();

}  // namespace fastattn
