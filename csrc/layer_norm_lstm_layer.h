// What the forward and the backward of the CPU's layer-normalised LSTM share.
#pragma once

#include "layer_norm_lstm_cpu.h"
#include "layer_norm_lstm_shape.h"
#include "lstm_layer.h"

namespace fastattn {

// Float32 gains and biases of one direction in the order of the kernels.
struct LayerNormDirection {
  at::Tensor gain_x, gain_h, bias, gain_c, bias_c;

  LayerNormWeights pointers() const;
};

// A call, checked, and what both ways need of it. Throws as layer_norm_lstm.h says.
struct LayerNormLayer {
  LstmShape shape;
  bool biases;
  double eps;
  std::vector<LayerNormDirection> directions;
  at::Tensor h_mask;                // float32 (B, D, H) or (N, D, H), or undefined
  bool mask_per_step;
  at::Tensor zoneout_h, zoneout_c;  // boolean (N, D, H), or undefined
  float keep_h, keep_c;

  explicit LayerNormLayer(const LayerNormLstmArgs& args);

  int64_t columns() const { return 4 * shape.units(); }
  int64_t weights_per_direction() const { return biases ? 7 : 5; }
  // A single step multiplies with the weights as they are and reorders the products: packing or reordering weights for
  // so few products takes longer than the products.
  bool single_step() const { return shape.steps == 1; }
  // W_ih and W_hh, float32 (4H, ...).
  at::Tensor weight_x(const LayerNormLstmArgs& args, int64_t d) const {
    return dense_float(args.weights[static_cast<size_t>(d * weights_per_direction())]);
  }
  at::Tensor weight_h(const LayerNormLstmArgs& args, int64_t d) const {
    return dense_float(args.weights[static_cast<size_t>(d * weights_per_direction() + 1)]);
  }
  int64_t saved_floats() const { return shape.directions * shape.rows * (14 * shape.units() + 3); }
  // Rows of `rows` that step t has.
  Range active(Range rows, int64_t t) const { return {rows.begin, std::min(rows.end, shape.rows_at(t))}; }
  // The zoneout of rows from `row` of all steps on.
  Zoneout hidden_zoneout(int64_t d, int64_t row) const { return zoneout(zoneout_h, keep_h, d, row); }
  Zoneout cell_zoneout(int64_t d, int64_t row) const { return zoneout(zoneout_c, keep_c, d, row); }
  // The factors of W_hh's input (H) for one row of the batch at step t; only where there is a mask.
  const float* mask(int64_t t, int64_t row, int64_t d) const;

 private:
  Zoneout zoneout(const at::Tensor& mask, float keep, int64_t d, int64_t row) const;
};

// Where the parts of `saved` stand, for direction d.
struct LayerNormParts {
  float *normal_x, *normal_h;  // (N, 4Hr)
  LayerNormSaved rest;

  LayerNormParts(const LayerNormLayer& layer, float* saved, int64_t d);
  LayerNormSaved rest_at(int64_t row, int64_t units) const {
    return {rest.gates + row * 4 * units, rest.cells + row * units, rest.normal_c + row * units,
            rest.deviations + row * 3};
  }
};

// The rows of a part with its ends moved to multiples of kPartialRows; and a member's share of such rows, likewise.
Range whole_groups(Range rows, int64_t batch);
Range row_share(Range rows, int64_t member, int64_t members);

}  // namespace fastattn
