// The contract between the driver of additive attention's scores (additive.cpp) and its kernels (additive_tile.h), which
// are compiled once per instruction set, as attention_cpu.h says for the attention. All arithmetic is float32.
//
// Names: B batch, L queries, S keys, D features, Dp those rounded up to kPad.
#pragma once

#include "attention_cpu.h"

namespace fastattn {

struct AdditiveProblem {
  int64_t batch, rows, keys, features;
  Tensor4 query;                // (B, 1, L, D)
  Tensor4 key;                  // (B, 1, S, D)
  const float* weight;          // (Dp), zero beyond D
  Tensor4 coverage;             // (B, 1, L, S), stride 0 along L where queries share it; absent without coverage
  const float* coverage_weight; // (Dp), zero beyond D; or null
  const uint8_t* mask;          // (B, S), 1 takes part; or null

  int64_t padded() const { return round_up(features, kPad); }
};

// One task per (batch, tile of keys, tile of queries).
struct AdditiveScores {
  AdditiveProblem problem;
  float* scores;  // (B, L, S), written; -inf where the mask is 0

  static constexpr int64_t kRows = 64, kKeys = 32;  // of a tile

  int64_t row_tiles() const { return (problem.rows + kRows - 1) / kRows; }
  int64_t key_tiles() const { return (problem.keys + kKeys - 1) / kKeys; }
  int64_t tasks() const { return problem.batch * row_tiles() * key_tiles(); }
};

// One task per (batch, split of the keys), which owns the gradients of its keys. What is summed over splits and batches
// goes to partial sums, which the driver adds in a fixed order.
struct AdditiveGradient {
  AdditiveProblem problem;
  const float* dscores;     // (B, L, S)
  float* dquery;            // (splits, B, L, Dp): sums over keys of h, see the kernel; written
  Tensor4 dkey;             // (B, 1, S, D), written
  float* dweight;           // (splits, B, Dp), written
  float* dcoverage_weight;  // (splits, B, Dp): sums of coverage times h, written; or null
  float* dcoverage;         // (B, L, S), written; or null
  int64_t splits;

  int64_t split_keys() const { return round_up((problem.keys + splits - 1) / splits, kPad); }
  int64_t tasks() const { return problem.batch * splits; }
};

// Scratch as in Kernels.
struct AdditiveKernels {
  int64_t (*scores_scratch)(const AdditiveScores&);  // floats
  void (*scores)(const AdditiveScores&, int64_t task, float* scratch);
  int64_t (*gradient_scratch)(const AdditiveGradient&);
  void (*gradient)(const AdditiveGradient&, int64_t task, float* scratch);
};

}  // namespace fastattn
