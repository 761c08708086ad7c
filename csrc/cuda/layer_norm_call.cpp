#include "layer_norm_call.h"

#include <ATen/Context.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>

namespace fastattn::cuda {

namespace {

const LayerNormLstmArgs& checked(const LayerNormLstmArgs& args) {
  layer_norm_lstm_shape(args);
  return args;
}

at::Tensor dense(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->contiguous() : at::Tensor(); }

}  // namespace

LayerNormCall::LayerNormCall(const LayerNormLstmArgs& args)
    : plain(plain_args(checked(args))),
      zoneout_h(dense(args.zoneout_h)),
      zoneout_c(dense(args.zoneout_c)),
      keep_h(static_cast<float>(args.keep_h)),
      keep_c(static_cast<float>(args.keep_c)),
      eps(static_cast<float>(args.eps)) {
  if (args.h_mask) h_mask = args.h_mask->to(at::kFloat).contiguous();
  const int64_t each = layer_norm_weights_per_direction(args);
  for (int64_t d = 0; d < shape().directions; ++d) {
    const auto at = [&](int64_t place) { return args.weights[static_cast<size_t>(d * each + place)].contiguous(); };
    vectors.push_back({at(2), at(3), at(4), each == 7 ? at(5) : at::Tensor(), each == 7 ? at(6) : at::Tensor()});
  }
}

void multiply(at::Tensor to, const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() == at::kFloat) {
    at::mm_out(to, a, b);
    return;
  }
#ifdef FASTATTN_EMULATED
  at::mm_out(to, a.to(at::kFloat), b.to(at::kFloat));
#else
  // torch refuses a float32 result where the user asked for float16 sums, which a float16 product then gives.
  if (a.scalar_type() == at::kHalf && at::globalContext().allowFP16AccumulationCuBLAS()) {
    to.copy_(at::mm(a, b));
    return;
  }
  at::mm_out(to, a, b, at::kFloat);  // torch has it on CUDA alone
#endif
}

LayerNormWeights LayerNormCall::weights(int64_t d) const {
  const LayerNormVectors& of = vectors[static_cast<size_t>(d)];
  return {pointer(of.gain_x), pointer(of.gain_h), pointer(of.gain_c), pointer(of.bias), pointer(of.bias_c)};
}

Zoneout LayerNormCall::zoneout(const at::Tensor& mask, float keep, int64_t d) const {
  if (!mask.defined()) return {nullptr, 0, keep};
  return {mask.const_data_ptr<bool>() + d * shape().hidden, shape().directions * shape().hidden, 0.0f};
}

HiddenMask LayerNormCall::mask(int64_t d) const {
  if (!h_mask.defined()) return {};
  const LstmShape& s = shape();
  return {h_mask.const_data_ptr<float>() + d * s.hidden, s.directions * s.hidden, h_mask.size(0) == s.rows};
}

at::Tensor LayerNormCall::first_mask(int64_t d) const {
  if (shape().rows == 0) return at::ones({shape().batch, shape().hidden}, h_mask.options());  // no step reads h0
  if (h_mask.size(0) != shape().rows) return h_mask.select(1, d);
  return (d == 1 ? plain.at_last_steps(h_mask) : h_mask.narrow(0, 0, shape().batch)).select(1, d);
}

LayerNormSaved LayerNormCall::saved(const at::Tensor& tensor, int64_t d) const {
  const int64_t rows = shape().rows, hidden = shape().hidden;
  float* part = tensor.mutable_data_ptr<float>();
  const auto next = [&](int64_t width) {
    float* of_direction = part + d * rows * width;
    part += shape().directions * rows * width;
    return of_direction;
  };
  return {next(4 * hidden), next(4 * hidden), next(4 * hidden), next(hidden), next(hidden), next(3)};
}

Place LayerNormCall::place(int64_t t) const {
  if (t < 0 || t >= shape().steps) return {0, 0};
  return {shape().first[static_cast<size_t>(t)], shape().active[static_cast<size_t>(t)]};
}

}  // namespace fastattn::cuda
