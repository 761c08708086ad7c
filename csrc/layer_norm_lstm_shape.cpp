#include "layer_norm_lstm_shape.h"

namespace fastattn {

namespace {

void check_zoneout(
    const char* name, const std::optional<at::Tensor>& mask, double keep, const LstmShape& shape,
    const at::Tensor& input) {
  TORCH_CHECK_VALUE(keep >= 0.0 && keep <= 1.0, name, ": got the probability ", keep, ", allowed is [0, 1]");
  if (!mask) return;
  check_sizes(name, *mask, {shape.rows, shape.directions, shape.hidden});
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, name, ": got dtype ", mask->scalar_type(), ", expected bool");
  check_place(name, *mask, input);
}

void check_h_mask(const std::optional<at::Tensor>& mask, const LstmShape& shape, const at::Tensor& input) {
  if (!mask) return;
  TORCH_CHECK_VALUE(
      mask->dim() == 3 && (mask->size(0) == shape.batch || mask->size(0) == shape.rows) &&
          mask->size(1) == shape.directions && mask->size(2) == shape.hidden,
      "h_mask: got shape ", mask->sizes(), ", expected (", shape.batch, " or ", shape.rows, ", ", shape.directions,
      ", ", shape.hidden, ")");
  TORCH_CHECK_TYPE(
      at::isFloatingType(mask->scalar_type()), "h_mask: got dtype ", mask->scalar_type(), ", expected a float type");
  check_place("h_mask", *mask, input);
}

// The gains and biases; W_ih and W_hh are checked as the plain LSTM's.
void check_vectors(const LayerNormLstmArgs& args, const LstmShape& shape) {
  const int64_t each = layer_norm_weights_per_direction(args), gates = 4 * shape.hidden;
  for (int64_t d = 0; d < shape.directions; ++d)
    for (int64_t i = 2; i < each; ++i) {
      const bool of_cell = i == 4 || i == 6;
      check_like(
          "weights[" + std::to_string(d * each + i) + "]", args.weights[static_cast<size_t>(d * each + i)],
          {of_cell ? shape.hidden : gates}, args.input);
    }
}

}  // namespace

LstmArgs plain_args(const LayerNormLstmArgs& args) {
  const int64_t count = static_cast<int64_t>(args.weights.size());
  const int64_t directions = args.h0.dim() == 3 && args.h0.size(0) == 2 ? 2 : 1, each = count / directions;
  TORCH_CHECK_VALUE(
      count % directions == 0 && (each == 5 || each == 7), "weights: got ", count, " tensors for ", directions,
      " directions, expected 5 or 7 for each");
  LstmArgs result{args.input, args.batch_sizes, args.h0, args.c0, {}};
  for (int64_t d = 0; d < directions; ++d)
    for (int64_t i = 0; i < 2; ++i) result.weights.push_back(args.weights[static_cast<size_t>(d * each + i)]);
  return result;
}

LstmShape layer_norm_lstm_shape(const LayerNormLstmArgs& args) {
  const LstmShape shape = lstm_shape(plain_args(args));
  check_h_mask(args.h_mask, shape, args.input);
  check_zoneout("zoneout_h", args.zoneout_h, args.keep_h, shape, args.input);
  check_zoneout("zoneout_c", args.zoneout_c, args.keep_c, shape, args.input);
  TORCH_CHECK_VALUE(
      static_cast<float>(args.eps) > 0.0f, "eps: got ", args.eps, ", expected a positive number, in float32 too");
  check_vectors(args, shape);
  return shape;
}

void check_layer_norm_lstm_backward(
    const LstmShape& shape, const LayerNormLstmGradients& grad, const LayerNormLstmArgs& args, const at::Tensor& out,
    const at::Tensor& saved, int64_t floats) {
  std::vector<int64_t> sizes(args.input.sizes().begin(), args.input.sizes().end());
  sizes.back() = shape.directions * shape.hidden;
  check_like("out", out, sizes, args.input);
  if (grad.out) check_like("grad_out", *grad.out, sizes, args.input);
  if (grad.cells) check_like("grad_cells", *grad.cells, sizes, args.input);
  if (grad.h_n) check_like("grad_h_n", *grad.h_n, args.h0.sizes(), args.input);
  if (grad.c_n) check_like("grad_c_n", *grad.c_n, args.c0.sizes(), args.input);
  TORCH_CHECK_VALUE(
      saved.scalar_type() == at::kFloat && saved.device() == args.input.device() && saved.dim() == 1 &&
          saved.is_contiguous() && saved.size(0) == floats &&
          reinterpret_cast<uintptr_t>(saved.const_data_ptr()) % 16 == 0,  // four floats are read at once
      "saved: got ", saved.scalar_type(), " of shape ", saved.sizes(), " on ", saved.device(),
      ", expected the forward's own result");
}

}  // namespace fastattn
