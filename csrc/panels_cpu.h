// Products of float32 matrices in float32 instructions: the contract between drivers and kernels, as attention_cpu.h.
//
// The right operand (K, N) is packed into panels of 64 columns, (N / 64 rounded up, K, 64), zeros beyond the columns; so
// many rows of the left one are multiplied with one panel after the other. Where the left one has no more rows than those
// of one task, each part of a panel is packed by who multiplies it, or read as it is.
#pragma once

#include <algorithm>

#include "operand.h"

namespace fastattn {

constexpr int64_t kPanelColumns = 64;
// Most rows of a task, a multiple of the heights of register tiles, and depth at a time: 192 kB of the left operand and
// 256 kB of a panel stay in a second-level cache.
constexpr int64_t kPanelRows = 48, kPanelDepth = 1024;

constexpr int64_t panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

// How the rows of packed operands come from beyond the second-level cache.
struct Reading {
  bool ahead;  // each block asks for a part of the rows that follow its own
  int64_t whole;  // up to so many rows of the left operand are one block over the whole depth, which asks for its own
};

// One right operand and where its product goes: out (M, N) = left times right, plus a bias (N) unless it is null.
struct PanelTerm {
  Operand right;        // the transpose (N, K)
  int64_t first_panel;  // panels of the terms before
  const float* bias;
  float* out;
  int64_t out_row;
  bool around;          // whether out is written around the caches, as it is larger than they are
};

// The term whose panel it is, which must be there. Static, for each instruction set has a copy: see kernels.inc.h.
static constexpr const PanelTerm& term_of(const PanelTerm* terms, int64_t panel) {
  while (panel >= terms->first_panel + panels(terms->right.rows)) ++terms;
  return *terms;
}

// Rows [first, first + rows), those that there are, of the products of one left operand with several right ones, whose
// panels are counted on from one to the next: the left operand is copied once for all.
struct PanelProduct {
  Operand left;
  int64_t rows;         // of a task, at most kPanelRows
  const PanelTerm* terms;
  const float* packed;  // all panels; or null: they are made of each term's `right`
  Reading reading;
  bool add;             // whether it is added to what is in out
};

// Floats, as in attention_cpu.h: the rows of the left operand, their sums with one panel, and one that is made there.
constexpr int64_t panel_scratch(int64_t depth, bool packed) {
  const int64_t here = std::min(depth, kPanelDepth);
  return kPanelRows * (here + 2 * kPad + kPanelColumns) + (packed ? 0 : here * kPanelColumns);
}

struct PanelKernels {
  // One panel of the operand whose transpose is given.
  void (*pack)(const Operand&, int64_t panel, float* to);
  void (*product)(const PanelProduct&, int64_t first, Range panels, float* scratch);
};

const PanelKernels& panel_kernels();

// Which such products are chosen before torch's, which call MKL: those of processors of AMD with AVX-512, where MKL has
// kernels for AVX2 alone. From Zen 5 on the units are as wide as the registers, and the products twice as fast; on Zen 4
// an instruction of AVX-512 takes the time of two of AVX2.
enum class Panels { none, large, most };

Panels preferred_panels();

// How packed operands of so many bytes are read. Zen 5 does well without asking where they fit into its third-level cache:
// that takes 1.02 times as long for 32 rows of the left operand; for larger ones 0.9. Whole blocks of 1 to 8 rows take 0.94
// to 0.97 of the time of a step of 512 units there, 0.78 to 0.92 of 1,024. On Zen 4 those of one row take 0.87 and 0.70 to
// 0.86, those of 4 to 8 as long, of 12 1.05 times as long. On Intel's processors they are not measured.
Reading panel_reading(int64_t bytes);

}  // namespace fastattn
