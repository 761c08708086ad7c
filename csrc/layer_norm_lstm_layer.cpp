#include "layer_norm_lstm_layer.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>

namespace fastattn {

// Checked, and on the CPU.
static LstmShape checked_shape(const LayerNormLstmArgs& args) {
  TORCH_CHECK_VALUE(args.input.device().is_cpu(), "input: got device ", args.input.device(), ", expected the CPU");
  return layer_norm_lstm_shape(args);
}

static at::Tensor dense(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->contiguous() : at::Tensor();
}

LayerNormLayer::LayerNormLayer(const LayerNormLstmArgs& args)
    : shape(checked_shape(args)),
      biases(layer_norm_weights_per_direction(args) == 7),
      eps(args.eps),
      h_mask(args.h_mask ? dense_float(*args.h_mask) : at::Tensor()),
      mask_per_step(h_mask.defined() && h_mask.size(0) == shape.rows),
      zoneout_h(dense(args.zoneout_h)),
      zoneout_c(dense(args.zoneout_c)),
      keep_h(static_cast<float>(args.keep_h)),
      keep_c(static_cast<float>(args.keep_c)) {
  const int64_t hidden = shape.hidden, each = weights_per_direction();
  const auto vector = [&](int64_t place, bool gates) {
    const at::Tensor weight = dense_float(args.weights[static_cast<size_t>(place)]);
    if (gates) return gate_blocks(weight, hidden);
    return at::constant_pad_nd(weight, {0, shape.units() - hidden});
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
  const int64_t at = mask_per_step ? shape.row_of(t, row) : row;
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
