// What the host hands to the kernels of the layer-normalised CUDA LSTM; names and promises as in launch.h, equations as
// in layer_norm_cell.h and lstm_cell.h. A call is
//
//     forward   n_x of all rows in one launch (normalise_inputs); then for each step W_hh (m h_{t-1}), a product of the
//               caller, and one launch for all that follows it (layer_norm_forward_step)
//     backward  for each step one launch to the gradients of the sums and of W_hh (m h_{t-1})
//               (layer_norm_backward_step), and a product of the caller through W_hh; then, of all rows in one launch
//               each, the gradient of W_ih x (input_gradients) and the column sums that are the gradients of gains and
//               biases (column_sums)
//
// Products that a kernel reads are float32: a normalisation divides by their deviation, small or large, and so makes
// much of a rounding. Gradients that a product reads are in the dtype of the call, as its other operand is. In float16
// that of W_hh (m h_{t-1}) can overflow at a first step from h = 0, where 1 / sqrt(eps), 316, multiplies it: a loss
// scale then has to be smaller by as much, or the dtype bfloat16.
//
// What the backward needs is float32, for each direction dense in itself:
//
//     n_x, n_h, gates (N, H, 4)  i, f, g, o of a unit side by side
//     c_t, n_c        (N, H)
//     r_x, r_h, r_c   (N, 3)     the inverse deviations
#pragma once

#include "launch.h"

namespace fastattn::cuda {

struct LayerNormSaved {
  float *normal_x, *normal_h, *gates, *cells, *normal_c, *deviations;
};

// In the dtype of the call, dense.
struct LayerNormWeights {
  const void *gain_x, *gain_h, *gain_c;  // (4H), (4H), (H)
  const void *bias, *bias_c;             // (4H), (H); both or none
};

// Of one state: a mask, row n at mask + n * stride, or null and the probability whose expectation is taken.
struct Zoneout {
  const bool* mask;
  int64_t stride;
  float keep;
};

// W_ih x of all rows to n_x and r_x.
struct NormaliseInputs {
  const float* product;  // (N, 4H) dense
  float* normal_x;       // (N, H, 4)
  float* deviations;     // (N, 3): r_x is the first; or null
  int64_t rows, hidden;
  float eps;
};
void normalise_inputs(const NormaliseInputs& args, void* stream);

// One step of one direction: rows first_row to first_row + rows, the same rows of the batch.
struct LayerNormForwardStep {
  LayerNormWeights weights;
  Zoneout zoneout_h, zoneout_c;
  HiddenMask mask;
  LayerNormSaved saved;  // of all rows; but for normal_x null unless saved
  const float* product;  // (rows, 4H) dense: W_hh (m h_{t-1})
  void* hidden_state;    // (B, H) dense: h_{t-1}, replaced by h_t
  void* next_input;      // (B, H) dense: m h_t for the next step, written where there is a mask
  float* cell_state;     // (B, H) dense: c_{t-1}, replaced by c_t
  void *out, *cells;     // (N, H) at out_stride: h_t and c_t; cells may be null
  int64_t out_stride, hidden, first_row, rows;
  int64_t next_row, next_rows;  // where the next step's rows stand
  float eps;
};
void layer_norm_forward_step(Element type, const LayerNormForwardStep& step, void* stream);

struct LayerNormBackwardStep {
  LayerNormWeights weights;
  Zoneout zoneout_h, zoneout_c;
  HiddenMask mask;
  LayerNormSaved saved;
  const void *grad_out, *grad_cells;  // (N, H) at grad_stride, or null: of h_t and c_t, from outside
  const float* grad_input;            // (B, H) dense: of m h_t, from the step computed before this one
  const void* c0;                     // (B, H) dense
  float* grad_hidden;                 // (B, H) dense: of h_t otherwise, replaced by that of h_{t-1} through zoneout
  float* grad_cell;                   // (B, H) dense: of c_t, replaced by that of c_{t-1}
  float* grad_sums;                   // (N, H, 4): of the sums that the gates are activated from
  float* grad_squashed;               // (N, H): of u = gain_c n_c + bias_c
  void* grad_product;                 // (N, 4H) dense: of W_hh (m h_{t-1})
  int64_t grad_stride, hidden, first_row, rows;
  int64_t later_row, later_rows;        // where the rows of the step computed before this one stand
  int64_t previous_row, previous_rows;  // where c_{t-1} of the first rows stands; the others have c0
};
void layer_norm_backward_step(Element type, const LayerNormBackwardStep& step, void* stream);

// From the gradient of the sums to that of W_ih x, of all rows.
struct InputGradients {
  const void* gain_x;
  const float *grad_sums, *normal_x, *deviations;
  void* grad_product;  // (N, 4H) dense
  int64_t rows, hidden;
};
void input_gradients(Element type, const InputGradients& args, void* stream);

// Sums over the rows of a chunk, in the order of the rows: chunk k has the rows from k * kChunkRows.
constexpr int64_t kChunkRows = 32;

struct ColumnSums {
  const float *grad_sums, *grad_squashed;
  LayerNormSaved saved;
  float* result;  // (chunks, 14, H): of gain_x, gain_h, bias (4 each), gain_c, bias_c
  int64_t rows, hidden;
};
void column_sums(const ColumnSums& args, void* stream);

}  // namespace fastattn::cuda
