// What the forward and the backward of the layer-normalised CUDA LSTM share: the plain LSTM's call, and the rest dense.
#pragma once

#include "../layer_norm_lstm_shape.h"
#include "call.h"
#include "layer_norm_launch.h"

namespace fastattn::cuda {

// Of one direction; biases undefined where the layer has none.
struct LayerNormVectors {
  at::Tensor gain_x, gain_h, gain_c, bias, bias_c;
};

// Numbers that the forward saves.
inline int64_t saved_floats(const LstmShape& shape) { return shape.directions * shape.rows * (14 * shape.hidden + 3); }

// to = a b in float32, from whatever dtype.
void multiply(at::Tensor to, const at::Tensor& a, const at::Tensor& b);

// Rows of all rows.
struct Place {
  int64_t first, rows;
};

struct LayerNormCall {
  // Throws as layer_norm_lstm.h says, before any launch.
  explicit LayerNormCall(const LayerNormLstmArgs& args);

  Call plain;
  std::vector<LayerNormVectors> vectors;
  at::Tensor h_mask;                // float32 (B, D, H) or (N, D, H), or undefined
  at::Tensor zoneout_h, zoneout_c;  // boolean (N, D, H), or undefined
  float keep_h, keep_c, eps;

  const LstmShape& shape() const { return plain.shape; }
  LayerNormWeights weights(int64_t d) const;
  Zoneout hidden_zoneout(int64_t d) const { return zoneout(zoneout_h, keep_h, d); }
  Zoneout cell_zoneout(int64_t d) const { return zoneout(zoneout_c, keep_c, d); }
  HiddenMask mask(int64_t d) const;
  // The factors of h0, (B, H) float32; only where there is a mask.
  at::Tensor first_mask(int64_t d) const;
  LayerNormSaved saved(const at::Tensor& tensor, int64_t d) const;
  // The rows of step t; none before the first step and after the last.
  Place place(int64_t t) const;

 private:
  Zoneout zoneout(const at::Tensor& mask, float keep, int64_t d) const;
};

}  // namespace fastattn::cuda
