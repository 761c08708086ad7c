#include "call.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <atomic>

#include "paths.h"

namespace fastattn::cuda {

namespace {

#ifdef FASTATTN_EMULATED
constexpr auto kDevice = at::kCPU;
#else
constexpr auto kDevice = at::kCUDA;
#endif

std::atomic<bool> persistent_allowed{true};
std::atomic<int64_t> chunk_steps{kChunkSteps};

Element element_of(at::ScalarType type) {
  return type == at::kHalf ? Element::half : type == at::kBFloat16 ? Element::bfloat16 : Element::single;
}

// Checked before a guard switches to the device.
const LstmArgs& on_device(const LstmArgs& args) {
  TORCH_CHECK_VALUE(
      args.input.device().type() == kDevice, "input: got a tensor on ", args.input.device(), ", expected one on ",
      kDevice);
  return args;
}

// tf32 is asked for as cuBLAS asks: it computes the other products of the call.
bool tf32_for(Element type) { return type == Element::single && at::globalContext().allowTF32CuBLAS(); }

bool may_persist(const LstmShape& shape) { return persistent_allowed && !shape.projection && shape.rows > 0; }

// Of the forward and of the backward on the current device.
std::pair<Plan, Plan> plans(at::ScalarType scalar_type, int64_t parts, int64_t batch, int64_t hidden) {
  TORCH_CHECK_VALUE(batch >= 0 && hidden >= 1, "got batch ", batch, ", ", hidden, " hidden units");
  if (!persistent_allowed || batch == 0) return {};
  const Element type = element_of(scalar_type);
  const bool tf32 = tf32_for(type);
  return {plan_forward(type, tf32, parts, batch, hidden), plan_backward(type, tf32, parts, batch, hidden)};
}

}  // namespace

void allow_persistent(bool allowed) { persistent_allowed = allowed; }

int64_t set_chunk_steps(int64_t steps) {
  TORCH_CHECK_VALUE(steps >= 1, "steps: got ", steps, ", expected at least 1");
  return chunk_steps.exchange(steps);
}

std::pair<bool, bool> persistent(
    at::ScalarType scalar_type, int64_t directions, int64_t batch, int64_t hidden, bool projection) {
  TORCH_CHECK_VALUE(directions >= 1 && directions <= 2, "got ", directions, " directions");
  const auto [forward, backward] = plans(scalar_type, directions, batch, hidden);
  return {!projection && forward.unit_blocks > 0, !projection && backward.unit_blocks > 0};
}

std::pair<int64_t, int64_t> layers_together(
    at::ScalarType scalar_type, int64_t layers, int64_t steps, int64_t batch, int64_t hidden) {
  TORCH_CHECK_VALUE(layers >= 1 && steps >= 1, "got ", layers, " layers, ", steps, " steps");
  const auto [forward, backward] = plans(scalar_type, steps > chunk_steps ? layers : 1, batch, hidden);
  return {forward.together, backward.together};
}

Call::Call(const LstmArgs& args, LstmShape (&checked)(const LstmArgs&))
    : shape(checked(on_device(args))),
      type(element_of(args.input.scalar_type())),
      tf32(tf32_for(type)),
      device(args.input.device()),
      stream(current_stream()) {
  const at::Tensor* weight = args.weights.data();
  for (int64_t part = 0; part < shape.directions * shape.layers; ++part) {
    Direction direction;
    direction.w_ih = (weight++)->contiguous();
    direction.w_hh = (weight++)->contiguous();
    if (shape.biases) {
      direction.b_ih = (weight++)->contiguous();
      direction.b_hh = (weight++)->contiguous();
    }
    if (shape.projection) direction.w_hr = (weight++)->contiguous();
    directions.push_back(std::move(direction));
  }
  if (shape.packed) {
    first = at::empty({shape.steps + 1}, args.input.options().dtype(at::kLong));
    upload(shape.first.data(), shape.steps + 1, first.mutable_data_ptr<int64_t>(), stream);
  }
}

Steps Call::steps() const {
  return {shape.steps, shape.batch, first.defined() ? first.const_data_ptr<int64_t>() : nullptr};
}

at::Tensor Call::at_last_steps(const at::Tensor& rows) const {
  if (!shape.packed) return rows.narrow(0, shape.rows - shape.batch, shape.batch);
  std::vector<int64_t> last(static_cast<size_t>(shape.batch));
  for (size_t t = 0; t < static_cast<size_t>(shape.steps); ++t)
    for (int64_t b = shape.active[t + 1]; b < shape.active[t]; ++b)
      last[static_cast<size_t>(b)] = shape.first[t] + b;
  const at::Tensor index = at::empty({shape.batch}, first.options());
  upload(last.data(), shape.batch, index.mutable_data_ptr<int64_t>(), stream);
  return at::index_select(rows, 0, index);
}

Plan forward_plan(const Call& call, int64_t parts) {
  const LstmShape& s = call.shape;
  return may_persist(s) ? plan_forward(call.type, call.tf32, parts, s.batch, s.hidden) : Plan{};
}

Plan backward_plan(const Call& call, int64_t parts) {
  const LstmShape& s = call.shape;
  return may_persist(s) ? plan_backward(call.type, call.tf32, parts, s.batch, s.hidden) : Plan{};
}

int64_t layers_side_by_side(const Call& call) { return call.shape.steps > chunk_steps ? call.shape.layers : 1; }

Waves waves_of(const Call& call, int64_t layers) { return Waves(layers, call.shape.steps, chunk_steps); }

}  // namespace fastattn::cuda
