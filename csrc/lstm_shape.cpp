#include "lstm_shape.h"

namespace fastattn {

void check_sizes(const std::string& name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, ": got shape ", tensor.sizes(), ", expected ", shape);
}

void check_place(const std::string& name, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK_VALUE(
      tensor.device() == input.device() && tensor.layout() == at::kStrided, name, ": got a ", tensor.layout(),
      " tensor on ", tensor.device(), ", expected a strided one on input's ", input.device());
}

void check_like(const std::string& name, const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& input) {
  TORCH_CHECK_VALUE(tensor.defined(), name, ": got an undefined tensor");
  check_sizes(name, tensor, shape);
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == input.scalar_type(), name, ": got dtype ", tensor.scalar_type(), ", expected input's ",
      input.scalar_type());
  check_place(name, tensor, input);
}

namespace {

void set_steps(LstmShape& shape, const LstmArgs& args) {
  if (!args.batch_sizes) {
    shape.active.assign(static_cast<size_t>(shape.steps), shape.batch);
  } else {
    const at::Tensor& sizes = *args.batch_sizes;
    TORCH_CHECK_VALUE(
        sizes.dim() == 1 && sizes.size(0) >= 1, "batch_sizes: got shape ", sizes.sizes(), ", expected (T) with T >= 1");
    TORCH_CHECK_TYPE(sizes.scalar_type() == at::kLong, "batch_sizes: got dtype ", sizes.scalar_type(), ", expected int64");
    TORCH_CHECK_VALUE(sizes.device().is_cpu(), "batch_sizes: got device ", sizes.device(), ", expected the CPU");
    const at::Tensor dense = sizes.contiguous();
    const int64_t* size = dense.const_data_ptr<int64_t>();
    shape.steps = dense.size(0);
    shape.active.assign(size, size + shape.steps);
    int64_t most = shape.batch;
    for (int64_t t = 0; t < shape.steps; ++t) {
      TORCH_CHECK_VALUE(
          size[t] >= 1 && size[t] <= most, "batch_sizes: got ", size[t], " at step ", t, ", expected 1 to ", most,
          t == 0 ? " (h0's batch size)" : " (the step before)");
      most = size[t];
    }
    TORCH_CHECK_VALUE(
        size[0] == shape.batch, "batch_sizes: got ", size[0], " at step 0, expected h0's batch size ", shape.batch);
  }
  shape.first.assign(1, 0);
  for (int64_t active : shape.active) shape.first.push_back(shape.first.back() + active);
  shape.active.push_back(0);
  TORCH_CHECK_VALUE(
      shape.first.back() == shape.rows, "input: got ", shape.rows, " rows, expected the sum of batch_sizes, ",
      shape.first.back());
}

// One layer in its directions, a stack of layers in one, or a cell, whose tensors lack the first dimension of a layer's;
// and what the errors say of them.
enum class Kind : uint8_t { layer, stack, cell };

struct Expected {
  const char *input, *h0, *c0, *weights;
};

constexpr Expected expected(Kind kind) {
  switch (kind) {
    case Kind::cell: return {"(B, I)", "(B, H)", "(B, H)", " cell, expected 2 or 4"};
    case Kind::stack: return {"(T, B, I)", "(L, B, H), L at least 1", "(L, B, H)", " layers, expected 2 or 4"};
    default: return {"(T, B, I)", "(D, B, P), D 1 or 2", "(D, B, H)", " directions, expected 2, 3, 4 or 5"};
  }
}

LstmShape shape_of(const LstmArgs& args, Kind kind) {
  const at::Tensor& input = args.input;
  const bool stacked = kind == Kind::stack, cell = kind == Kind::cell;
  LstmShape shape{};
  shape.packed = args.batch_sizes.has_value();
  TORCH_CHECK_VALUE(
      input.dim() == (shape.packed || cell ? 2 : 3), "input: got shape ", input.sizes(), ", expected ",
      shape.packed ? "(N, I) beside batch_sizes" : expected(kind).input);
  const auto type = input.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "input: got dtype ", type,
      ", expected float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(input.layout() == at::kStrided, "input: got a ", input.layout(), " tensor, expected a strided one");
  const int64_t dims = cell ? 2 : 3;
  TORCH_CHECK_VALUE(
      args.h0.dim() == dims && (cell || (args.h0.size(0) >= 1 && (stacked || args.h0.size(0) <= 2))),
      "h0: got shape ", args.h0.sizes(), ", expected ", expected(kind).h0);
  TORCH_CHECK_VALUE(
      args.c0.dim() == dims, "c0: got shape ", args.c0.sizes(), ", expected ", expected(kind).c0);
  const int64_t parts = cell ? 1 : args.h0.size(0);
  shape.directions = stacked ? 1 : parts;
  shape.layers = stacked ? parts : 1;
  shape.batch = args.h0.size(-2);
  shape.state = args.h0.size(-1);
  shape.hidden = args.c0.size(-1);
  shape.inputs = input.size(-1);
  shape.steps = shape.packed ? 0 : cell ? 1 : input.size(0);
  shape.rows = shape.packed ? input.size(0) : shape.steps * input.size(-2);
  TORCH_CHECK_VALUE(shape.hidden >= 1 && shape.state >= 1, "h0, c0: got no hidden units");
  const auto check = [&](const char* name, const at::Tensor& tensor, int64_t first, int64_t features) {
    const int64_t sizes[] = {first, shape.batch, features};
    check_like(name, tensor, at::IntArrayRef(sizes).slice(cell ? 1 : 0), input);
  };
  if (!shape.packed) check("input", input, shape.steps, shape.inputs);
  check("h0", args.h0, parts, shape.state);
  check("c0", args.c0, parts, shape.hidden);
  set_steps(shape, args);

  const int64_t count = static_cast<int64_t>(args.weights.size());
  const int64_t each = count / parts;
  TORCH_CHECK_VALUE(
      count % parts == 0 && each >= 2 && each <= 5 && (kind == Kind::layer || each % 2 == 0), "weights: got ", count,
      " tensors for ", parts, expected(kind).weights, " for each");
  shape.biases = each >= 4;
  shape.projection = each % 2 == 1;
  TORCH_CHECK_VALUE(
      shape.projection || shape.state == shape.hidden, "h0: got ", shape.state, " features, expected c0's ",
      shape.hidden, ", for there is no projection");
  const int64_t gates = 4 * shape.hidden;
  for (int64_t part = 0; part < parts; ++part) {
    const at::Tensor* weight = args.weights.data() + part * each;
    const std::string where = "weights[" + std::to_string(part * each) + " + ";
    check_like(where + "0]", *weight++, {gates, stacked && part > 0 ? shape.hidden : shape.inputs}, input);
    check_like(where + "1]", *weight++, {gates, shape.state}, input);
    if (shape.biases) {
      check_like(where + "2]", *weight++, {gates}, input);
      check_like(where + "3]", *weight++, {gates}, input);
    }
    if (shape.projection)
      check_like(where + std::to_string(each - 1) + "]", *weight, {shape.state, shape.hidden}, input);
  }
  return shape;
}

std::vector<int64_t> out_sizes(const LstmShape& shape, const LstmArgs& args) {
  std::vector<int64_t> sizes(args.input.sizes().begin(), args.input.sizes().end());
  sizes.back() = shape.directions * shape.state;
  return sizes;
}

// What every backward gets; gates are (first, second, 4 Hr), cells (first, second, Hr).
void check_backward(
    const LstmShape& shape, const LstmGradients& grad, const LstmArgs& args, const at::Tensor& gates,
    const at::Tensor& cells, int64_t first, int64_t second) {
  if (grad.out) check_like("grad_out", *grad.out, out_sizes(shape, args), args.input);
  if (grad.h_n) check_like("grad_h_n", *grad.h_n, args.h0.sizes(), args.input);
  if (grad.c_n) check_like("grad_c_n", *grad.c_n, args.c0.sizes(), args.input);
  check_like("gates", gates, {first, second, 4 * shape.units()}, args.input);
  TORCH_CHECK_VALUE(
      cells.scalar_type() == at::kFloat && cells.sizes() == at::IntArrayRef({first, second, shape.units()}) &&
          cells.device() == args.input.device(),
      "cells: got ", cells.scalar_type(), " of shape ", cells.sizes(), " on ", cells.device(), ", expected float32 (",
      first, ", ", second, ", ", shape.units(), ") on ", args.input.device());
  TORCH_CHECK_VALUE(gates.is_contiguous() && cells.is_contiguous(), "gates, cells: expected the forward's own results");
}

}  // namespace

LstmShape lstm_shape(const LstmArgs& args) { return shape_of(args, Kind::layer); }

LstmShape lstm_layers_shape(const LstmArgs& args) { return shape_of(args, Kind::stack); }

LstmShape lstm_cell_shape(const LstmArgs& args) { return shape_of(args, Kind::cell); }

void check_lstm_backward(
    const LstmShape& shape, const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out,
    const at::Tensor& gates, const at::Tensor& cells) {
  check_like("out", out, out_sizes(shape, args), args.input);
  check_backward(shape, grad, args, gates, cells, shape.rows, shape.directions);
}

void check_lstm_step_backward(
    const LstmShape& shape, const LstmGradients& grad, const LstmArgs& args, const at::Tensor& gates,
    const at::Tensor& cells) {
  TORCH_CHECK_VALUE(
      shape.steps == 1 && shape.directions == 1 && !shape.projection && !shape.packed, "input: got ", shape.steps,
      " steps in ", shape.directions, " directions", shape.projection ? " with a projection" : "",
      shape.packed ? ", packed" : "", ", expected one padded step in one direction without a projection");
  check_backward(shape, grad, args, gates, cells, shape.rows, shape.directions);
}

void check_lstm_layers_backward(
    const LstmShape& shape, const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out,
    const at::Tensor& gates, const at::Tensor& cells, const at::Tensor& states) {
  check_like("out", out, out_sizes(shape, args), args.input);
  check_backward(shape, grad, args, gates, cells, shape.layers, shape.rows);
  check_like("states", states, {shape.layers - 1, shape.rows, shape.hidden}, args.input);
}

}  // namespace fastattn
