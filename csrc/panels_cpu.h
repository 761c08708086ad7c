// Products of float32 matrices in float32 instructions: the contract between drivers and kernels, as attention_cpu.h.
//
// The right operand (K, N) is packed into panels of 64 columns, (N / 64 rounded up, K, 64), zeros beyond the columns; so
// many rows of the left one are multiplied with one panel after the other.
#pragma once

#include "operand.h"

namespace fastattn {

constexpr int64_t kPanelColumns = 64;
// Rows of a task, a multiple of the heights of register tiles, and depth at a time: 192 kB of the left operand and 256 kB
// of a panel stay in a second-level cache.
constexpr int64_t kPanelRows = 48, kPanelDepth = 1024;

constexpr int64_t panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

// Rows [first, first + kPanelRows) of out (M, N) = left times right, plus a bias (N) unless it is null.
struct PanelProduct {
  Operand left;
  int64_t columns;
  const float* right;
  const float* bias;
  float* out;
  int64_t out_row;
  bool around;  // whether out is written around the caches, as it is larger than they are
};

// Floats, as in attention_cpu.h: the rows of the left operand, and their sums with one panel.
constexpr int64_t panel_scratch() { return kPanelRows * (kPanelDepth + 32 + kPanelColumns); }

struct PanelKernels {
  // One panel of the operand whose transpose is given.
  void (*pack)(const Operand&, int64_t panel, float* to);
  void (*product)(const PanelProduct&, int64_t first, Range panels, float* scratch);
};

const PanelKernels& panel_kernels();

// Whether such products are chosen before torch's, which call MKL: on processors of AMD with AVX-512. There MKL has
// kernels for AVX2 alone.
bool prefers_panels();

}  // namespace fastattn
