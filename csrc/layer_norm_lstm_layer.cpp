#include "layer_norm_lstm_layer.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>

#include <string>

namespace fastattn {

// What is checked as the plain LSTM's.
static LstmArgs plain(const LayerNormLstmArgs& args) {
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

static void check_cpu(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(
      tensor.device().is_cpu() && tensor.layout() == at::kStrided, name, ": got a ", tensor.layout(), " tensor on ",
      tensor.device(), ", expected a strided one on the CPU");
}

static at::Tensor checked_zoneout(
    const char* name, const std::optional<at::Tensor>& mask, double keep, const LstmShape& shape) {
  TORCH_CHECK_VALUE(keep >= 0.0 && keep <= 1.0, name, ": got the probability ", keep, ", allowed is [0, 1]");
  if (!mask) return {};
  check_cpu(name, *mask);
  const std::vector<int64_t> expected{shape.rows, shape.directions, shape.hidden};
  TORCH_CHECK_VALUE(mask->sizes() == expected, name, ": got shape ", mask->sizes(), ", expected ", expected);
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, name, ": got dtype ", mask->scalar_type(), ", expected bool");
  return mask->contiguous();
}

static at::Tensor checked_h_mask(const std::optional<at::Tensor>& mask, const LstmShape& shape) {
  if (!mask) return {};
  check_cpu("h_mask", *mask);
  TORCH_CHECK_VALUE(
      mask->dim() == 3 && (mask->size(0) == shape.batch || mask->size(0) == shape.rows) &&
          mask->size(1) == shape.directions && mask->size(2) == shape.hidden,
      "h_mask: got shape ", mask->sizes(), ", expected (", shape.batch, " or ", shape.rows, ", ", shape.directions,
      ", ", shape.hidden, ")");
  TORCH_CHECK_TYPE(
      at::isFloatingType(mask->scalar_type()), "h_mask: got dtype ", mask->scalar_type(), ", expected a float type");
  return dense_float(*mask);
}

LayerNormLayer::LayerNormLayer(const LayerNormLstmArgs& args)
    : shape(lstm_shape(plain(args))),
      biases(static_cast<int64_t>(args.weights.size()) == 7 * shape.directions),
      eps(args.eps),
      h_mask(checked_h_mask(args.h_mask, shape)),
      mask_per_step(h_mask.defined() && h_mask.size(0) == shape.rows),
      zoneout_h(checked_zoneout("zoneout_h", args.zoneout_h, args.keep_h, shape)),
      zoneout_c(checked_zoneout("zoneout_c", args.zoneout_c, args.keep_c, shape)),
      keep_h(static_cast<float>(args.keep_h)),
      keep_c(static_cast<float>(args.keep_c)) {
  check_cpu("input", args.input);
  TORCH_CHECK_VALUE(eps > 0.0, "eps: got ", eps, ", expected a positive number");
  const int64_t hidden = shape.hidden, each = weights_per_direction();
  const auto vector = [&](int64_t place, bool gates) {
    const at::Tensor& weight = args.weights[static_cast<size_t>(place)];
    const std::string name = "weights[" + std::to_string(place) + "]";
    const int64_t size = gates ? 4 * hidden : hidden;
    check_cpu(name.c_str(), weight);
    TORCH_CHECK_VALUE(
        weight.dim() == 1 && weight.size(0) == size, name, ": got shape ", weight.sizes(), ", expected (", size, ")");
    TORCH_CHECK_TYPE(
        weight.scalar_type() == args.input.scalar_type(), name, ": got dtype ", weight.scalar_type(),
        ", expected input's ", args.input.scalar_type());
    if (gates) return gate_rows(dense_float(weight), hidden).view({-1});
    return at::constant_pad_nd(dense_float(weight), {0, shape.units() - hidden});
  };
  const at::Tensor none = at::zeros({columns()}, args.input.options().dtype(at::kFloat));
  for (int64_t d = 0; d < shape.directions; ++d) {
    const int64_t at = d * each;
    directions.push_back(
        {vector(at + 2, true), vector(at + 3, true), biases ? vector(at + 5, true) : none, vector(at + 4, false),
         biases ? vector(at + 6, false) : none});
  }
}

LayerNormWeights LayerNormDirection::pointers() const {
  return {gain_x.const_data_ptr<float>(), gain_h.const_data_ptr<float>(), bias.const_data_ptr<float>(),
          gain_c.const_data_ptr<float>(), bias_c.const_data_ptr<float>()};
}

const float* LayerNormLayer::mask(int64_t t, int64_t row, int64_t d) const {
  const int64_t at = mask_per_step ? row_of(t, row) : row;
  return h_mask.const_data_ptr<float>() + (at * shape.directions + d) * shape.hidden;
}

Zoneout LayerNormLayer::zoneout(const at::Tensor& mask, float keep, int64_t d, int64_t row) const {
  if (!mask.defined()) return {nullptr, keep};
  return {mask.const_data_ptr<bool>() + (row * shape.directions + d) * shape.hidden, 0.0f};
}

LayerNormParts::LayerNormParts(const LayerNormLayer& layer, float* saved, int64_t d) {
  const int64_t rows = layer.shape.rows, units = layer.shape.units(), count = layer.shape.directions * rows;
  const auto next = [&](int64_t width) {
    float* part = saved + d * rows * width;
    saved += count * width;
    return part;
  };
  normal_x = next(4 * units);
  normal_h = next(4 * units);
  rest.gates = next(4 * units);
  rest.cells = next(units);
  rest.normal_c = next(units);
  rest.deviations = next(3);
}

at::Tensor gate_columns(const at::Tensor& product, int64_t hidden) {
  const int64_t rows = product.size(0), units = round_up(hidden, kUnits);
  const at::Tensor gates = at::constant_pad_nd(product.view({rows, 4, hidden}), {0, units - hidden});
  return gates.view({rows, 4, units / kUnits, kUnits}).transpose(1, 2).reshape({rows, 4 * units});
}

at::Tensor from_gate_columns(const at::Tensor& product, int64_t hidden) {
  const int64_t rows = product.size(0), units = round_up(hidden, kUnits);
  const at::Tensor gates = product.view({rows, units / kUnits, 4, kUnits}).transpose(1, 2);
  return gates.reshape({rows, 4, units}).narrow(2, 0, hidden).reshape({rows, 4 * hidden});
}

Range whole_groups(Range rows, int64_t batch) {
  const auto moved = [batch](int64_t end) {
    return end == batch ? batch : (end + kPartialRows / 2) / kPartialRows * kPartialRows;
  };
  return {std::min(moved(rows.begin), batch), std::min(moved(rows.end), batch)};
}

Range row_share(Range rows, int64_t member, int64_t members) {
  const Range groups = share((rows.end - rows.begin + kPartialRows - 1) / kPartialRows, member, members);
  return {std::min(rows.end, rows.begin + groups.begin * kPartialRows),
          std::min(rows.end, rows.begin + groups.end * kPartialRows)};
}

}  // namespace fastattn
