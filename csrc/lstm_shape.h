// The sizes of an LSTM call and where its steps stand; the checks of the operators, for every device.
#pragma once

#include <string>
#include <vector>

#include "lstm.h"

namespace fastattn {

struct LstmShape {
  int64_t steps, batch, inputs, hidden, state;  // T, B, I, H, P
  int64_t directions, layers, rows;             // D, 1 or L of a stack, N
  bool biases, projection, packed;
  std::vector<int64_t> active;  // (T + 1): rows of the batch that step t has; 0 at T
  std::vector<int64_t> first;   // (T + 1): the row of the input at which step t begins

  // Rows of step t, none at -1 and T; and where row `row` of the batch stands in the input at step t.
  int64_t rows_at(int64_t t) const { return t < 0 ? 0 : active[static_cast<size_t>(t)]; }
  int64_t row_of(int64_t t, int64_t row) const { return first[static_cast<size_t>(t)] + row; }
  int64_t units() const { return (hidden + 15) / 16 * 16; }  // Hr
  int64_t weights_per_direction() const { return 2 + (biases ? 2 : 0) + (projection ? 1 : 0); }
};

// Each throws c10::ValueError or TypeError, naming the tensor, unless it has this shape; lies strided on the input's
// device; or both, in the input's dtype.
void check_sizes(const std::string& name, const at::Tensor& tensor, at::IntArrayRef shape);
void check_place(const std::string& name, const at::Tensor& tensor, const at::Tensor& input);
void check_like(const std::string& name, const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& input);

// Throws c10::ValueError or TypeError, naming the argument, unless everything in `args` fits together.
LstmShape lstm_shape(const LstmArgs& args);

// Likewise for a stack of layers, and for a cell.
LstmShape lstm_layers_shape(const LstmArgs& args);
LstmShape lstm_cell_shape(const LstmArgs& args);

// Likewise for what a backward gets beside them; that of a step gets no out.
void check_lstm_backward(
    const LstmShape& shape, const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out,
    const at::Tensor& gates, const at::Tensor& cells);
void check_lstm_step_backward(
    const LstmShape& shape, const LstmGradients& grad, const LstmArgs& args, const at::Tensor& gates,
    const at::Tensor& cells);
void check_lstm_layers_backward(
    const LstmShape& shape, const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out,
    const at::Tensor& gates, const at::Tensor& cells, const at::Tensor& states);

}  // namespace fastattn
