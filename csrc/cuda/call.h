// What the forward and the backward of the CUDA LSTM share: the call's sizes, dense weights, steps on the device.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "../lstm.h"
#include "../lstm_shape.h"
#include "launch.h"
#include "waves.h"

namespace fastattn::cuda {

// The weights of one direction, dense; undefined where the layer has none.
struct Direction {
  at::Tensor w_ih, w_hh, b_ih, b_hh, w_hr;
};

struct Call {
  explicit Call(const LstmArgs& args, LstmShape (&checked)(const LstmArgs&) = lstm_shape);

  LstmShape shape;
  Element type;
  bool tf32;
  c10::OptionalDeviceGuard device;
  // Every result is written as it stands: below autograd, and no autocast picks another dtype.
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  void* stream;
  std::vector<Direction> directions;  // of a stack, each layer's one
  at::Tensor first;  // of packed input: shape.first on the device

  Steps steps() const;
  // The step that direction d computes as its s-th.
  int64_t step(int64_t d, int64_t s) const { return d == 1 ? shape.steps - 1 - s : s; }
  // Of `rows`, (N, ...), those of the last step of each row of the batch: (B, ...).
  at::Tensor at_last_steps(const at::Tensor& rows) const;
};

// How the persistent kernels do so many parts of a call, directions or layers; without unit_blocks where they may not
// or cannot.
Plan forward_plan(const Call& call, int64_t parts);
Plan backward_plan(const Call& call, int64_t parts);

// Layers that may run side by side: all of a stack whose sequence is long enough to be cut, else one.
int64_t layers_side_by_side(const Call& call);

// The waves of so many of them.
Waves waves_of(const Call& call, int64_t layers);

// Where the rows of a chunk stand among all rows.
struct ChunkRows {
  int64_t first, count;
};
inline ChunkRows rows_of(const Call& call, const Chunk& chunk) {
  const std::vector<int64_t>& first = call.shape.first;
  const int64_t begin = first[static_cast<size_t>(chunk.begin)];
  return {begin, first[static_cast<size_t>(chunk.end)] - begin};
}

// What a launch of the forward and of the backward say alike: its parts over all steps, each with a group's arrivals.
template <class Launch, class Cells>
void lay_out(
    Launch& launch, const Call& call, const Plan& plan, int64_t parts, const Direction* weights, const Cells* cells) {
  launch.args.parts = parts;
  launch.args.groups = plan.groups;
  launch.args.unit_blocks = plan.unit_blocks;
  launch.args.steps = call.steps();
  launch.arrivals = at::zeros({parts, plan.groups}, weights->w_hh.options().dtype(at::kInt));
  auto* arrivals = reinterpret_cast<uint32_t*>(launch.arrivals.template mutable_data_ptr<int32_t>());
  for (int64_t i = 0; i < parts; ++i) {
    auto& part = launch.args.part[i];
    part.cells = cells[i];
    part.weight = weights[i].w_hh.const_data_ptr();
    part.arrivals = arrivals + i * plan.groups;
    part.end = call.shape.steps;
  }
}

// A kernel's view of a tensor that may be absent.
inline const void* pointer(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

// Pointer to column `column` of row 0 of a dense matrix.
inline void* at_column(const at::Tensor& tensor, int64_t column) {
  return static_cast<char*>(tensor.data_ptr()) + column * tensor.element_size();
}

}  // namespace fastattn::cuda
