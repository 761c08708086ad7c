// The checks of the layer-normalised LSTM's operators, for every device.
#pragma once

#include "layer_norm_lstm.h"
#include "lstm_shape.h"

namespace fastattn {

// The plain LSTM's arguments among them: W_ih and W_hh of each direction are its weights.
LstmArgs plain_args(const LayerNormLstmArgs& args);

// Throws c10::ValueError or TypeError, naming the argument, unless everything in `args` fits together.
LstmShape layer_norm_lstm_shape(const LayerNormLstmArgs& args);

inline int64_t layer_norm_weights_per_direction(const LayerNormLstmArgs& args) {
  return static_cast<int64_t>(args.weights.size()) / args.h0.size(0);
}

// Likewise for what a backward gets beside them; the forward of its device saved `floats` numbers.
void check_layer_norm_lstm_backward(
    const LstmShape& shape, const LayerNormLstmGradients& grad, const LayerNormLstmArgs& args, const at::Tensor& out,
    const at::Tensor& saved, int64_t floats);

}  // namespace fastattn
