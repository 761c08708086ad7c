// The contract between the two halves of the CPU LSTM: the driver (lstm_forward_cpu.cpp, lstm_backward_cpu.cpp), which
// checks, allocates, packs and walks over the steps, and the kernels (lstm_tile.h), which do the arithmetic of one step.
// As for the attention the kernels are compiled once per instruction set, and all arithmetic is float32.
//
// Units come in blocks of 16. Hr is H rounded up to 16; what is added has weights, gates and states of zero. A row of
// 4 Hr numbers (sums, gates or their gradients) holds one block after the other, and in a block 16 numbers of each of
// i, f, g, o: one column panel of 64 of the recurrent product is one block, and its gates meet in one register tile.
//
// Nothing here owns anything. Strides are in elements. Names as in lstm.h.
#pragma once

#include "attention_cpu.h"

namespace fastattn {

constexpr int64_t kUnits = 16;                // of a block
constexpr int64_t kGateColumns = 4 * kUnits;  // of a block's panel
static_assert(kGateColumns == kPanelColumns);  // panels_tile.h packs them

// How a product is made, and so what its operands are.
enum class LstmForm : uint8_t {
  panels,  // float32, weights packed into panels
  rows,    // float32, weights as the user has them, of their type below most_half_rows; forward only, for few rows
  split,   // float32 by split_cpu.h: right operands, the panel of 64 columns two blocks of them
  dots,    // bfloat16 with float32 sums, panels of lstm_bf16.h, by VDPBF16PS
  tiles,   // the same by AMX
};

constexpr bool is_half(LstmForm form) { return form >= LstmForm::dots; }

constexpr bool uses_tiles(LstmForm form) { return form == LstmForm::split || form == LstmForm::tiles; }

// Rows of one product at most: their sums, 64 columns each, stay in the first-level cache.
constexpr int64_t kLstmRows = 64;
constexpr int64_t lstm_rows(LstmForm form) {
  return form == LstmForm::split ? 2 * kSplitBlock : form == LstmForm::rows ? kLstmRows : 48;
}

// Rows of a step below which dot products along the rows of a float32 W beat packing a block of it into a panel: on
// Zen 4, with 512 units, 94 against 46 GFLOP/s a core with 4 rows, 97 against 83 with 16, 91 against 94 with 32.
constexpr int64_t kRowsWorthPacking = 17;

// Numbers of a panel (K, 64) of bfloat16, K rounded up to 32.
constexpr int64_t lstm_bf16_panel(int64_t depth) { return round_up(depth, 32) * kGateColumns; }

// One step of one direction for some rows of the batch. Rows count from the first of the call: every pointer with a row
// stride points at its row 0.
struct LstmForwardStep {
  int64_t rows, inputs, hidden, state;  // state is P
  bool descending;        // the last block first
  Reading reading;        // how weights are read
  LstmForm form;
  const float* sums;      // W_ih x + b, gate g of block b at sums_gate * g + sums_block * b; null: computed here
  const void* input;      // (rows, I), bfloat16 where the form is that
  const void* weight_x;   // panels (Hr / 16, I, 64); (4H, I) of weight_type for `rows`, where sums is null
  const float* bias;      // (4H)
  const void* h;          // (rows, P) of the step before, bfloat16 likewise
  void (*wait_for_h)(void* whom);  // called before h is read: what needs x alone is done meanwhile
  void* whom;
  const void* weight_h;   // likewise, P for I
  float* cell;            // (rows, Hr): c_{t-1} on entry, c_t on return
  void* m;                // (rows, H), written: o tanh(c); bfloat16 likewise
  void* gates;            // (rows, 4 Hr) of type gates_type, written; or null
  float* cells;           // (rows, Hr), a copy of c_t; or null
  Type gates_type, weight_type;
  int64_t sums_row, sums_gate, sums_block, input_row, h_row, cell_row, m_row, gates_row, cells_row;
};

// Rows 4 kB apart fall into the same sets of the first-level cache and throw one another out. A left operand is copied
// for that; one whose rows are so many floats longer than a multiple of that is read where it stands. In the backward,
// whose left operand is four times as long, that takes 0.86 to 0.91 of the time of the steps; in the forward nothing.
constexpr int64_t kSpread = kPad;

// One step backward: from dm, the gradient of m = o tanh(c), to that of the sums.
struct LstmBackwardStep {
  int64_t rows, hidden;
  bool descending;       // the last panel first
  Reading reading;       // as above
  LstmForm form;
  // dm = start + product, `depth` long: without a projection start is the gradient of the output, and the product that
  // of the later step's sums with W_hh; with one, start is null and the product that of dh with W_hr.
  const float* start;    // (rows, H) or null
  const float* start2;   // (rows, H), added too; or null
  const void* left;      // (rows, depth), bfloat16 where the form is that; null: no product
  bool spread;           // whether its rows fall into different sets of the cache: see kSpread
  const void* weight;    // panels (Hr / 64 rounded up, depth, 64)
  int64_t depth;
  const void* gates;     // (rows, 4 Hr) of type gates_type
  const float* cells;    // (rows, Hr): c_t
  const float* previous; // (rows, Hr): c_{t-1}
  float* dcell;          // (rows, Hr): gradient of c_t from later steps on entry, of c_{t-1} on return
  void* dsums;           // (rows, 4H), one gate after the other, written; bfloat16 likewise
  float* m;              // (rows, H), written: o tanh(c); or null
  Type gates_type;
  int64_t start_row, start2_row, left_row, gates_row, cells_row, previous_row, dcell_row, dsums_row, m_row;
};

// out (rows, columns) = start + start2 + left (rows, depth) times a matrix in panels of 64 columns.
struct LstmProduct {
  int64_t rows, columns, depth;
  Reading reading;      // as above
  const float* start;   // (rows, columns), or null
  const float* start2;  // likewise
  LstmForm form;
  const void* left;     // bfloat16 where the form is that; null: no product
  bool spread;          // as above
  const void* weight;   // panels (columns / 64 rounded up, depth, 64)
  float* out;
  int64_t start_row, start2_row, left_row, out_row;
};

// scratch: so many floats, aligned, of the calling thread alone, for the sums and the left operands of all products of a
// call, and one panel. `depth` is the sum of the depths of the products; a split operand has 3 halves of a float.
constexpr int64_t lstm_scratch(int64_t depth) {
  return kLstmRows * (kGateColumns + (depth + 8 * kPad) * kSplitParts / 2) + kGateColumns * depth;
}

struct LstmKernels {
  int64_t most_half_rows;  // of a step for which `rows` reads weights of half precision as they are, not as float32
  // One block of W (4 H, K), rows of stride `row`, into its panel (K, 64).
  void (*pack_gates)(const float* weight, int64_t row, int64_t hidden, int64_t depth, int64_t block, float* panel);
  // For `dots` and `tiles`: one block of W (4H, K), and one panel of a matrix (K, columns).
  void (*pack_gates_bf16)(const void* weight, int64_t hidden, int64_t depth, int64_t block, void* panel);
  void (*pack_columns_bf16)(const void* matrix, int64_t depth, int64_t columns, int64_t panel_index, void* panel);
  void (*forward)(const LstmForwardStep&, Range blocks, float* scratch);
  void (*backward)(const LstmBackwardStep&, Range panels, float* scratch);
  void (*product)(const LstmProduct&, Range panels, float* scratch);
};

// Those of the table in use, see instruction_set.h, and how they multiply bfloat16: `panels` if not at all.
const LstmKernels& lstm_kernels();
LstmForm lstm_bf16();

}  // namespace fastattn
