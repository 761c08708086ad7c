// The driver of the forward and of the weights from the logsumexp: checks, allocation, tasks.
#include "attention.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "attend.h"
#include "huge_pages.h"

namespace fastattn {

// Rows of a forward task: measured. With weights for many keys the exponentials of a tile leave the second-level cache
// whatever its height, and higher tiles read the packed keys and values less often.
static int64_t forward_rows(WeightsMode mode, const Problem& p) {
  return even_tiles(p.rows, mode != WeightsMode::none && p.keys > 2048 ? 96 : 64);
}

static at::Tensor empty_weights(const Problem& p, WeightsMode mode, const at::Tensor& query) {
  switch (mode) {
    case WeightsMode::none: return at::empty({0}, query.options());
    case WeightsMode::mean: return with_huge_pages(at::empty({p.batch, p.rows, p.keys}, query.options()));
    default: return with_huge_pages(at::empty({p.batch, p.heads, p.rows, p.keys}, query.options()));
  }
}

static Tensor4 weights4(const at::Tensor& weights, WeightsMode mode) {
  if (mode == WeightsMode::none) return {};
  return tensor4(mode == WeightsMode::mean ? weights.unsqueeze(1) : weights);
}

// Numbers that are packed at a time, if that gives every thread a plane. All at once are 1.5 times as slow where they are
// many: memory is new to the process each time, and comes back from beyond the caches.
constexpr int64_t kPackedNumbers = int64_t{1} << 18;

static void attend_in_panels(Forward f) {
  const Problem& p = f.problem;
  f.tile_rows = forward_rows(f.mode, p);
  const int64_t planes = f.unit_planes(), units = p.batch * p.key_heads / planes;
  const int64_t key = planes * p.padded_keys() * p.dim, value = planes * p.padded_keys() * p.padded_dim();
  const int64_t least = (at::get_num_threads() + planes - 1) / planes;
  const int64_t wave = std::clamp(kPackedNumbers / std::max<int64_t>(1, key + value), std::min(least, units), units);
  const Floats packed_key(wave * key), packed_value(wave * value);
  f.packed_key = packed_key.get();
  f.packed_value = packed_value.get();
  const Kernels& k = kernels();
  const int64_t scratch_floats = k.forward_scratch(f);
  for (int64_t unit = 0, here; unit < units; unit += here) {
    here = std::min(wave, units - unit);
    f.first_plane = unit * planes;
    run_tasks(here * planes, 0, [&](int64_t task, float*) { k.forward_pack(f, f.first_plane + task); });
    run_tasks(here * f.unit_tasks(), scratch_floats, [&](int64_t task, float* scratch) {
      k.forward_tile(f, unit * f.unit_tasks() + task, scratch);
    });
  }
}

void attend(const Forward& f) {
  if (f.mode != WeightsMode::none || f.problem.drop_below || f.problem.rows > kDirectRows) return attend_in_panels(f);
  Direct direct{};
  direct.problem = f.problem;
  direct.value = f.value;
  direct.sinks = f.sinks;
  direct.out = f.out;
  direct.logsumexp = f.logsumexp;
  attend_directly(direct);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& sinks,
    const ProblemArgs& args, int64_t weights_mode) {
  const OwnedProblem owned(query, key, args);
  check_tensor("value", value, key.sizes(), query.scalar_type());
  if (sinks) check_floating("sinks", *sinks, {owned.problem.heads});
  TORCH_CHECK_VALUE(weights_mode >= 0 && weights_mode <= 2, "weights_mode: got ", weights_mode, ", expected 0, 1, 2");

  Forward f{};
  f.problem = owned.problem;
  const Problem& p = f.problem;
  f.mode = static_cast<WeightsMode>(weights_mode);
  at::Tensor out = empty_heads_last(query);
  at::Tensor logsumexp = at::empty(logsumexp_shape(p), query.options().dtype(at::kFloat));
  at::Tensor weights = empty_weights(p, f.mode, query);
  if (p.heads == 0) return {out, logsumexp, weights.zero_()};
  at::Tensor dense_sinks;
  if (sinks) {
    dense_sinks = sinks->to(at::kFloat).contiguous();
    f.sinks = dense_sinks.const_data_ptr<float>();
  }
  f.value = tensor4(value);
  f.out = tensor4(out);
  f.logsumexp = logsumexp.data_ptr<float>();
  f.weights = weights4(weights, f.mode);
  attend(f);
  return {out, logsumexp, weights};
}

at::Tensor attention_weights(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp, const ProblemArgs& args,
    bool average) {
  const OwnedProblem owned(query, key, args);
  check_tensor("logsumexp", logsumexp, logsumexp_shape(owned.problem), at::kFloat);

  Weights w{};
  w.problem = owned.problem;
  const Problem& p = w.problem;
  w.mode = average ? WeightsMode::mean : WeightsMode::per_head;
  at::Tensor weights = empty_weights(p, w.mode, query);
  if (p.heads == 0) return weights.zero_();
  const int64_t planes = p.batch * p.key_heads;
  const at::Tensor packed_key = at::empty({planes, p.padded_keys(), p.dim}, at::kFloat);
  const at::Tensor dense_logsumexp = logsumexp.contiguous();
  w.packed_key = packed_key.data_ptr<float>();
  w.logsumexp = dense_logsumexp.const_data_ptr<float>();
  w.weights = weights4(weights, w.mode);

  const Kernels& k = kernels();
  run_tasks(planes, 0, [&](int64_t task, float*) { k.weights_pack(w, packed_key.data_ptr<float>(), task); });
  run_tasks(w.tasks(), k.weights_scratch(w), [&](int64_t task, float* scratch) { k.weights_tile(w, task, scratch); });
  return weights;
}

}  // namespace fastattn
