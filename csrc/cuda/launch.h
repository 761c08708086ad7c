// What the host hands to the kernels of the CUDA LSTM: plain pointers and sizes, no header of torch or CUDA.
//
// Pointers are to device memory. Everything is queued on `stream` (a cudaStream_t) and returns at once: no launch waits
// for the device, copies from host memory or allocates, so a caller may record a call in a CUDA graph. Names as in
// lstm.h: T steps, B batch, H hidden units, P state, N rows, Hr = H rounded up to 16.
//
//     saved gates   (N, D, Hr, 4)  i, f, g, o of a unit side by side: one load
//     saved cells   (N, D, Hr)     float32
//
// Kernels throw std::runtime_error where the launch fails.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

enum class Element { half, bfloat16, single };

// Where step t stands: rows first[t] to first[t + 1]; without `first` the batch is padded, and first[t] is t B.
struct Steps {
  int64_t count;
  int64_t batch;
  const int64_t* first;  // (T + 1), or null
};

// What the cells of one direction read and write in the forward. Row n of a tensor is at pointer + n * its stride.
struct ForwardCells {
  const void* input_gates;        // (rows, 4H) dense: W_ih x of row input_row and those after it
  const void *bias_ih, *bias_hh;  // (4H), both or none
  void* out;                      // (N, H) at out_stride: m_t
  void* gates;                    // (N, Hr, 4) at gates_stride, null unless saved
  float* cells;                   // (N, Hr) at cells_stride, null unless saved
  int64_t out_stride, gates_stride, cells_stride;
  int64_t hidden, input_row;
};

// And in the backward.
struct BackwardCells {
  const void* grad_out;  // (N, H) at grad_out_stride, or null: of m_t, from outside
  const void* gates;     // as above
  const float* cells;
  const void* c0;    // (B, H) dense
  void* grad_gates;  // (N, 4, unit_stride) dense: of the sums before the activations
  int64_t grad_out_stride, gates_stride, cells_stride;
  int64_t hidden, unit_stride;
};

// One step of one direction: rows first_row to first_row + rows, the same rows of the batch.
struct ForwardStep {
  ForwardCells cells;
  const void* hidden_gates;  // (rows, 4H) dense: W_hh h_{t-1}
  float* cell_state;         // (B, H) dense: c_{t-1}, replaced by c_t
  void* hidden_state;        // (B, H) dense, replaced by m_t; null where there is a projection
  int64_t first_row, rows;
};
void forward_step(Element type, const ForwardStep& step, void* stream);

struct BackwardStep {
  BackwardCells cells;
  const void* grad_state;  // (rows, H) dense: of m_t from the next step, or of h_n
  float* grad_cell;        // (B, H) dense: of c_t, replaced by that of c_{t-1}
  int64_t first_row, rows;
  int64_t previous_row, previous_rows;  // where c_{t-1} of the first rows stands; the others have c0
};
void backward_step(Element type, const BackwardStep& step, void* stream);

// m_t = o tanh(c_t) of `rows` rows, to (N, H) dense: what the gradient of the projection's weights needs.
struct Unprojected {
  const void* gates;
  const float* cells;
  void* out;
  int64_t gates_stride, cells_stride, hidden, rows;
};
void unprojected(Element type, const Unprojected& args, void* stream);

// The factors of what W_hh multiplies: row n of all rows, or row b of the batch for all steps, at factor + its stride.
struct HiddenMask {
  const float* factor;  // null: 1
  int64_t stride;
  bool per_step;
};

// m h_{t-1} of every row, (N, P) dense: from `out` (N, P at out_stride), or h0 (B, P) where the row begins.
struct Previous {
  const void *out, *h0;
  void* result;
  int64_t out_stride, state;
  Steps steps;
  bool reverse;
  HiddenMask mask = {};
};
void previous_states(Element type, const Previous& args, void* stream);

// Write `count` numbers to the device. They travel as arguments of kernels, so `values` may go at once.
void upload(const int64_t* values, int64_t count, int64_t* to, void* stream);

// ---- The persistent kernels (lstm_persistent.cuh): many steps in one launch.

// Most parts side by side: both directions of a layer, or layers of a stack. More than 4 layers are rare.
constexpr int64_t kMostTogether = 4;

// How the work is laid out over the device. A group of blocks owns every `groups`-th row of the batch in one part, and
// shares a barrier; a block of it owns a few units, whose weights it keeps.
struct Plan {
  int64_t unit_blocks = 0;  // blocks of a group; 0: the kernel cannot do it
  int64_t groups = 0;
  int64_t together = 1;  // parts in one launch; the others come after them
};

// A part of a launch: steps `begin` to `end` - 1 of one direction of a layer, or of one layer of a stack. A launch of
// the next steps in its order goes on where this one ended, from what it left in the memory it is given again: exchange
// or grad_gates, cell_state or grad_cell, arrivals.
struct ForwardPart {
  ForwardCells cells;
  const void* weight;  // W_hh (4H, H) dense
  const void* c0;      // (B, H) dense
  void *h_n, *c_n;     // (B, H) dense
  void* exchange;      // (2, B, depth) dense: h of even and of odd steps; at first both hold h0, and 0 beyond H
  float* cell_state;   // (B, H) dense: c between two launches
  uint32_t* arrivals;  // (groups), at first 0
  int64_t begin, end;
  bool reverse;
};

struct PersistentForward {
  ForwardPart part[kMostTogether];
  int64_t parts, groups, unit_blocks, depth;
  Steps steps;  // of the whole sequence
};
// Rows of the exchange are this long: H rounded up to the depth of one block of the product.
int64_t forward_depth(Element type, int64_t hidden);
Plan plan_forward(Element type, bool tf32, int64_t parts, int64_t batch, int64_t hidden);
void persistent_forward(Element type, bool tf32, const PersistentForward& args, void* stream);

struct BackwardPart {
  BackwardCells cells;   // grad_gates with unit_stride Hr: the next step's product reads them there
  const void* weight;    // W_hh (4H, H) dense
  const void* grad_h_n;  // (B, H) dense, or null
  const void* grad_c_n;  // (B, H) dense, or null
  void* grad_c0;         // (B, H) dense
  float* grad_cell;      // (B, H) dense: of c between two launches
  uint32_t* arrivals;    // (groups), at first 0
  int64_t begin, end;
  bool reverse;
};

struct PersistentBackward {
  BackwardPart part[kMostTogether];
  int64_t parts, groups, unit_blocks;
  Steps steps;
};
Plan plan_backward(Element type, bool tf32, int64_t parts, int64_t batch, int64_t hidden);
void persistent_backward(Element type, bool tf32, const PersistentBackward& args, void* stream);

// The stream of torch on the current device (stream.cpp).
void* current_stream();

}  // namespace fastattn::cuda
