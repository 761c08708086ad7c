// From tensors to the structs of attention_cpu.h: the checks, and what both forward and backward need.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "attention_cpu.h"
#include "tasks.h"

namespace fastattn {

// The arguments that every operator of fastattn/kernels/attention/op.py shares, in its order.
struct ProblemArgs {
  std::optional<at::Tensor> attn_mask;         // (B, H, L, S) after broadcasting; bool (true takes part) or floating
  std::optional<at::Tensor> key_padding_mask;  // (B, S), bool (true takes part) or floating
  std::optional<at::Tensor> alibi_slopes;      // (B or 1, H) float
  std::optional<at::Tensor> segment_query, segment_key;  // (B, L) and (B, S), int32 or int64 alike; both or none
  std::optional<at::Tensor> seed;                        // (1), int64; read where dropout_p > 0
  double dropout_p = 0.0;
  double scale = 1.0;
  double softcap = 0.0;
  int64_t shift = 0;
  std::optional<int64_t> lower, upper;

  // What a query that stands at key 0 sees: keys from -left to right.
  void see(std::optional<int64_t> left, std::optional<int64_t> right) {
    if (left) lower = -std::max(*left, -std::numeric_limits<int64_t>::max());
    upper = right;
  }
};

// A Problem and the memory its pointers refer to.
struct OwnedProblem {
  Problem problem;
  std::vector<int64_t> key_begin, key_end;
  at::Tensor key_bias;
  at::Tensor alibi_slopes, segment_query, segment_key, segment_begin, segment_end;

  // Throws c10::Error unless query (B, H, L, D), key (B, G, S, D) and the arguments fit together. Where `cached` keys of
  // a sequence are said, key is a cache: its first and third dimensions may be anything.
  OwnedProblem(
      const at::Tensor& query, const at::Tensor& key, const ProblemArgs& args, std::optional<int64_t> cached = {});
};

// (2, B, H, L), see attention_cpu.h.
inline std::array<int64_t, 4> logsumexp_shape(const Problem& p) { return {2, p.batch, p.heads, p.rows}; }

// The tensor's memory and strides; axes of size 1 get stride 0, so that they broadcast.
Tensor4 tensor4(const at::Tensor& tensor);

// That tensor without the rows before `row`, which the third axis counts.
Tensor4 from_row(Tensor4 tensor, int64_t row);

// The numbers of an int32 or int64 tensor on the CPU; throws for another.
std::vector<int64_t> integers(const char* name, const at::Tensor& tensor);

// The sum of (splits, ...) over the splits, in their order, in the place of the first.
at::Tensor add_splits(const at::Tensor& parts);

// Throws unless `tensor` is on the CPU and has that shape and type; `name` is what the message calls it.
void check_tensor(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, at::ScalarType type);

// Throws unless `tensor` has that shape and a type that load_rows reads.
void check_floating(const char* name, const at::Tensor& tensor, at::IntArrayRef shape);

// An uninitialised (B, H, L, D) laid out as (B, L, H, D): merging the heads afterwards is a view.
at::Tensor empty_heads_last(const at::Tensor& like);

}  // namespace fastattn
