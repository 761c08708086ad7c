// The contract between the driver of the CPU's layer-normalised LSTM (layer_norm_lstm_forward_cpu.cpp and its backward)
// and its kernels (layer_norm_lstm_tile.h): the recurrent product is that of lstm_cpu.h, what follows it row by row is
// here. Blocks of units, Hr and the order of a row of 4 Hr numbers are those of lstm_cpu.h; numbers of added units in
// gains, biases and states are zero. All arithmetic is float32.
#pragma once

#include "attention_cpu.h"

namespace fastattn {

// Rows of the batch that add their parameter gradients to one partial sum. Groups begin at multiples of it, so what is
// added in which order does not depend on the number of threads.
constexpr int64_t kPartialRows = 4;

// (4Hr) each, but gain_c and bias_c (Hr).
struct LayerNormWeights {
  const float *gain_x, *gain_h, *bias, *gain_c, *bias_c;
};

// Zoneout of one state: a mask (rows, H), or null and the probability whose expectation is taken.
struct Zoneout {
  const bool* mask;
  float keep;
};

// What the backward needs of some rows: see layer_norm_lstm.h.
struct LayerNormSaved {
  float *gates, *cells, *normal_c, *deviations;  // rows of 4Hr, Hr, Hr and 3
};

// Pointers stand at the first of the rows; strides in elements. Rows of x, h products, and of what is saved are dense.
struct LayerNormForwardStep {
  int64_t rows, hidden;
  float eps;
  LayerNormWeights weights;
  Zoneout zoneout_h, zoneout_c;
  float *product_x, *product_h;  // (rows, 4Hr) W_ih x and W_hh h_{t-1}; with `save` normalised on return
  float* h;                      // (rows, H): h_{t-1} on entry, h_t on return
  float* cell;                   // (rows, Hr): c_{t-1} on entry, c_t on return
  float* out;                    // (rows, H): h_t, written
  float* all_cells;              // (rows, H): c_t, written; or null
  bool save;
  LayerNormSaved saved;  // written with `save`
  int64_t out_row, zoneout_row;
};

struct LayerNormBackwardStep {
  int64_t rows, hidden;
  int64_t first;  // the row of the batch that row 0 is
  LayerNormWeights weights;
  Zoneout zoneout_h, zoneout_c;
  const float* grad_out;    // (rows, H) or null
  const float* grad_cells;  // (rows, H) or null
  const float* product;     // (rows, Hr): what reaches h_t through W_hh from the next step
  const float *normal_x, *normal_h;  // (rows, 4Hr)
  LayerNormSaved saved;
  const float* previous;  // (rows, Hr): c_{t-1}
  float* dh;              // (rows, Hr): what reaches h_t otherwise on entry, h_{t-1} through zoneout on return
  float* dcell;           // (rows, Hr): gradient of c_t from later steps on entry, of c_{t-1} on return
  float *dproduct_x, *dproduct_h;  // (rows, 4Hr), written
  // (B / kPartialRows rounded up, 14Hr), added to: gradients of gain_x, gain_h, bias (4Hr each), gain_c, bias_c (Hr).
  float* partial;
  int64_t grad_row, zoneout_row;
};

struct LayerNormLstmKernels {
  // scratch: 2 Hr floats of the calling thread alone.
  void (*forward)(const LayerNormForwardStep&, float* scratch);
  void (*backward)(const LayerNormBackwardStep&, float* scratch);
};

// Those of the table in use, see instruction_set.h.
const LayerNormLstmKernels& layer_norm_lstm_kernels();

}  // namespace fastattn
