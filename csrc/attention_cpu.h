// The contract between the two halves of the CPU attention.
//
// The driver (attention_forward_cpu.cpp, attention_backward_cpu.cpp) checks tensors, allocates and hands out tasks.
// The kernels (forward_tile.h, backward_tile.h, weights_tile.h) do the arithmetic. They are compiled once per
// instruction set, each time in a namespace of its own, see kernels.inc.h, and reach the driver as a table of functions.
//
// Kernels see memory only through the structs below. Nothing here owns anything: all pointers outlive the call.
// All arithmetic is float32; inputs of another type are converted as they are read.
//
// A logsumexp is (2, B, H, L) contiguous: the float32 number, then what its rounding lost. Where a mask adds -1e9 to a
// whole row, the logarithm of the number of its keys is in the second. A row without a key has its sink or, without
// sinks, -inf; and 0.
//
// Names: B batch, H heads, G key heads (H a multiple of G), L rows (queries), S keys, D head dimension.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "panels_cpu.h"
#include "split_cpu.h"

namespace fastattn {

enum class Type : uint8_t { boolean, half, bfloat16, single, twice };

constexpr int64_t element_size(Type type) {
  return type == Type::boolean ? 1 : type == Type::twice ? 8 : type == Type::single ? 4 : 2;
}

// The height of as few tiles as can be, of about the same height, at most `most`: 65 rows are 33 and 32.
constexpr int64_t even_tiles(int64_t rows, int64_t most) {
  const int64_t tiles = rows > most ? (rows + most - 1) / most : 1;
  return rows > 0 ? (rows + tiles - 1) / tiles : 1;
}

// A tensor of four dimensions with any strides, in elements; 0 along an axis that is broadcast.
struct Tensor4 {
  void* data = nullptr;  // null: the tensor is absent
  Type type = Type::single;
  int64_t stride[4] = {0, 0, 0, 0};
};

// Keys come in panels of this many, so that a panel of D x 64 floats stays in the first-level cache.
constexpr int64_t kPanel = 64;
// The keys of a tile are a multiple of this: dropout draws 32 columns at a time.
constexpr int64_t kKeyUnit = 32;
// Rows and keys of one tile of the backward and weights kernels.
constexpr int64_t kTileRows = 96;
constexpr int64_t kTileKeys = 128;

// What decides the probabilities P (B, H, L, S), and the dropout factors applied to them.
struct Problem {
  int64_t batch, heads, key_heads, rows, keys, dim;
  float scale;
  int64_t lower, upper;  // entry (i, j) takes part where lower <= j - i <= upper; clamped to [-(L + S), L + S]
  Tensor4 query;         // (B, H, L, D)
  Tensor4 key;           // (B, G, S, D)
  float softcap;         // a score s becomes softcap * tanh(s / softcap) before anything is added; 0: it stays
  const float* alibi_slopes;  // (B, H): slope * |i + shift - j| is subtracted; or null
  int64_t alibi_batch;        // stride between the slopes of batches, 0 where they share them
  int64_t shift;              // position of row 0 among the keys, for the slopes
  Tensor4 attn_mask;     // (B, H, L, S), boolean (true takes part) or floating (added); may be absent
  const float* key_bias;     // (B, S): the key padding mask as addends, -inf for a masked key; or null
  const int64_t* key_begin;  // (B): the first key that is not masked by padding
  const int64_t* key_end;    // (B): one past the last
  const int32_t* segment_query;  // (B, L) and (B, S): entry (i, j) takes part where the two are equal; both or null
  const int32_t* segment_key;
  const int64_t* segment_begin;  // (B, L): the first key of the row's segment and one past its last; (S, 0) without one
  const int64_t* segment_end;
  uint64_t seed;
  uint32_t drop_below;  // an entry is dropped where the top 24 bits of its random word are below this; 0: no dropout
  float keep_scale;     // 1 / (1 - dropout_p)

  int64_t group() const { return heads / key_heads; }
  int64_t padded_dim() const { return round_up(dim, kPad); }
  int64_t padded_keys() const { return round_up(keys, kPanel); }
};

enum class WeightsMode : uint8_t { none, mean, per_head };

// Tasks: forward_pack, one per plane, which is a (batch, key head); then forward_tile, one per (batch, row tile) with all
// heads where the weights are averaged, else one per (batch, head, row tile). No two tasks write the same memory. Only
// some planes need be packed at a time: those from first_plane on.
struct Forward {
  Problem problem;
  Tensor4 value;        // (B, G, S, D)
  const float* sinks;   // (H): the score of one more key, whose value is 0 and whose weight is not returned; or null
  int64_t first_plane;
  float* packed_key;    // (planes, S / kPanel, D, kPanel), the keys transposed panel by panel; written by forward_pack
  float* packed_value;  // (planes, S rounded up to kPanel, padded_dim); written by forward_pack
  Tensor4 out;          // (B, H, L, D), written
  float* logsumexp;     // (2, B, H, L), written
  WeightsMode mode;
  Tensor4 weights;    // (B, 1, L, S) or (B, H, L, S) contiguous, written
  int64_t tile_rows;  // rows of one task

  int64_t tiles() const { return (problem.rows + tile_rows - 1) / tile_rows; }
  // The planes whose tasks are one after another and need no others, and how many those tasks are.
  int64_t unit_planes() const { return mode == WeightsMode::mean ? problem.key_heads : 1; }
  int64_t unit_tasks() const { return tiles() * (mode == WeightsMode::mean ? 1 : problem.group()); }

  float* plane_key(int64_t plane) const {
    return packed_key + (plane - first_plane) * problem.padded_keys() * problem.dim;
  }
  float* plane_value(int64_t plane) const {
    return packed_value + (plane - first_plane) * problem.padded_keys() * problem.padded_dim();
  }
};

// Attention that reads keys and values where they are, block by block into the first-level cache. Forward packs them
// first, which pays where several tiles of rows read them: transposing a block takes a twentieth of the time of 64 rows.
//
// direct_tile has one task per (batch, key head, run of heads of its group, row tile, split of the keys). With several
// splits the tasks leave partial results, and direct_join has one task per (batch, head, row tile).
struct Direct {
  Problem problem;      // of a cache: keys is the room of a sequence, and lower, upper and shift are those of one token
  Tensor4 value;        // (B, G, S, D)
  const float* sinks;   // as in Forward
  Tensor4 out;          // (B, H, L, D), written
  float* logsumexp;     // (2, B, H, L), written
  const int64_t* lengths;  // a cache: (B), tokens of each sequence, its last row stands at the last one; or null
  const int64_t* table;    // pages: (B, table_row), then key and value are (pages, G, page_size, D); or null
  int64_t table_row, page_size;  // page_size is a multiple of kPad
  int64_t tile_rows;    // rows of a head in one task
  int64_t tile_heads;   // heads of a task, at most
  int64_t split_keys;   // keys of one split, a multiple of kPanel
  float* partial;       // (splits, B, H, L, partial_row): sums of exp(score - maximum) V, maximum, sum; if splits > 1

  int64_t tiles() const { return (problem.rows + tile_rows - 1) / tile_rows; }
  int64_t runs() const { return (problem.group() + tile_heads - 1) / tile_heads; }
  int64_t splits() const { return problem.keys > split_keys ? (problem.keys + split_keys - 1) / split_keys : 1; }
  int64_t tasks() const { return problem.batch * problem.key_heads * runs() * tiles() * splits(); }
  int64_t joins() const { return splits() > 1 ? problem.batch * problem.heads * tiles() : 0; }
  int64_t partial_row() const { return problem.padded_dim() + kPad; }
};

// The weights from the logsumexp; tasks as forward_tile's.
struct Weights {
  Problem problem;
  const float* packed_key;  // as in Forward
  const float* logsumexp;   // (2, B, H, L)
  WeightsMode mode;         // mean or per_head
  Tensor4 weights;          // as in Forward

  int64_t tiles() const { return (problem.rows + kTileRows - 1) / kTileRows; }
  int64_t tasks() const { return problem.batch * tiles() * (mode == WeightsMode::mean ? 1 : problem.heads); }
};

// Splits of the keys for so many sets, see Backward: tasks enough for the cores of a small machine even for one head; more
// would cost memory for partial sums.
constexpr int64_t backward_splits(int64_t sets, int64_t keys) {
  constexpr int64_t tasks = 16, least_keys = 256;
  if (sets < 1 || sets >= tasks || keys <= least_keys) return 1;
  const int64_t most = (keys + least_keys - 1) / least_keys;
  return tasks / sets < most ? tasks / sets : most;
}

// Gradients of the attention, or of the weights (then grad_weights is there, and value, out, grad_out and
// grad_logsumexp are not).
//
// One task owns a set of (batch, key head) pairs and a range of keys. A pair belongs to one set; pairs that share a
// slice of a mask whose gradient is wanted are in the same set, so that no two tasks write the same memory. The ranges
// ("splits") exist so that few pairs still make enough tasks; what must be summed over them goes to partial sums that
// the driver adds in a fixed order. Sets and splits depend on shapes alone, never on the number of threads.
struct Backward {
  Problem problem;
  Tensor4 value;            // (B, G, S, D) or absent
  Tensor4 out;              // (B, H, L, D) or absent
  Tensor4 grad_out;         // (B, H, L, D) or absent; then out and value are absent too
  Tensor4 grad_weights;     // (B, H, L, S), broadcast over heads for averaged weights, or absent
  float grad_weights_scale; // 1, or 1 / H for averaged weights
  const float* logsumexp;   // (2, B, H, L)
  const float* grad_logsumexp;  // (B, H, L) contiguous, or null
  Tensor4 dquery;           // (B, H, L, D); with several splits the float32 partial sums (splits, B, H, L, D)
  int64_t dquery_split;     // stride between the splits' partial sums
  Tensor4 dkey, dvalue;     // (B, G, S, D); dvalue may be absent
  float* dlogsumexp;        // (splits, B, H, L) contiguous, or null; only for the weights
  float* dpadding;          // (B, G, S) contiguous partial sums over the heads of a group and the rows, or null
  Tensor4 dmask;            // float32, zero-filled by the driver, stride 0 along broadcast axes; or absent
  bool mask_over_batch;     // dmask is shared by all batches
  bool mask_over_heads;     // dmask is shared by all heads
  int64_t splits;

  int64_t sets() const {
    return (mask_over_batch ? 1 : problem.batch) * (mask_over_heads ? 1 : problem.key_heads);
  }
  int64_t tasks() const { return sets() * splits; }
  int64_t split_keys() const {  // keys of one split, a multiple of kPanel
    return round_up((problem.keys + splits - 1) / splits, kPanel);
  }
};

struct AdditiveKernels;       // additive_cpu.h
struct LstmKernels;           // lstm_cpu.h
struct LayerNormLstmKernels;  // layer_norm_lstm_cpu.h

// The functions of one instruction set. Scratch is 64-byte aligned, uninitialised, private to the running task.
struct Kernels {
  const char* name;
  void (*forward_pack)(const Forward&, int64_t task);
  int64_t (*forward_scratch)(const Forward&);  // floats
  void (*forward_tile)(const Forward&, int64_t task, float* scratch);
  int64_t (*direct_scratch)(const Direct&);
  void (*direct_tile)(const Direct&, int64_t task, float* scratch);
  void (*direct_join)(const Direct&, int64_t task);
  void (*weights_pack)(const Weights&, float* packed_key, int64_t task);
  int64_t (*weights_scratch)(const Weights&);
  void (*weights_tile)(const Weights&, int64_t task, float* scratch);
  int64_t (*backward_scratch)(const Backward&);
  void (*backward_task)(const Backward&, int64_t task, float* scratch);
  const AdditiveKernels* additive;
  const LstmKernels* lstm;
  const LayerNormLstmKernels* layer_norm_lstm;
  const SplitKernels* split;
  const PanelKernels* panels;
};

// The table for this processor, or the one chosen by use_instruction_set.
const Kernels& kernels();

}  // namespace fastattn
