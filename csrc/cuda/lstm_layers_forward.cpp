// The forward of a stack of layers on CUDA: side by side where several fit on the device and the sequence is long
// enough to be cut (waves.h), else one after the other.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "forward.h"

namespace fastattn {

namespace cuda {

namespace {

// `layers` in waves, the first of them from `input` (N, I).
void side_by_side(
    const Call& call, const Plan& plan, const at::Tensor& input, const States& states, const ForwardLayer* layers) {
  const LstmShape& s = call.shape;
  const int64_t count = states.h0.size(0);
  const Waves waves = waves_of(call, count);
  const int64_t most_rows = rows_of(call, waves.wave(0)[0]).count;  // no chunk has more than the first
  const at::Tensor input_gates = at::empty({count, most_rows, 4 * s.hidden}, input.options());
  ForwardCells cells[kMostTogether];
  for (int64_t l = 0; l < count; ++l) cells[l] = cells_of(call, layers[l], 0);
  const ForwardLaunch all = forward_launch(call, plan, states, layers[0].weights, cells);
  for (int64_t w = 0; w < waves.count(); ++w) {
    PersistentForward launch = all.args;
    launch.parts = 0;
    for (const Chunk& chunk : waves.wave(w)) {
      const auto [first, rows] = rows_of(call, chunk);
      const at::Tensor& from = chunk.layer == 0 ? input : layers[chunk.layer - 1].out;
      at::Tensor sums = input_gates[chunk.layer].narrow(0, 0, rows);
      at::mm_out(sums, from.narrow(0, first, rows), layers[chunk.layer].weights->w_ih.t());
      ForwardPart& part = launch.part[launch.parts++];
      part = all.args.part[chunk.layer];
      part.cells.input_gates = sums.const_data_ptr();
      part.cells.input_row = first;
      part.begin = chunk.begin;
      part.end = chunk.end;
    }
    persistent_forward(call.type, call.tf32, launch, call.stream);
  }
}

}  // namespace

}  // namespace cuda

LstmLayersForward lstm_layers_forward_cuda(const LstmArgs& args, bool save) {
  const cuda::Call call(args, lstm_layers_shape);
  const LstmShape& s = call.shape;
  const auto options = args.input.options();
  const cuda::States states{
      args.h0, args.c0.contiguous(), at::empty({s.layers, s.batch, s.hidden}, options),
      at::empty({s.layers, s.batch, s.hidden}, options)};
  const at::Tensor out = at::empty({s.rows, s.hidden}, options);
  const at::Tensor below = at::empty({s.layers - 1, s.rows, s.hidden}, options);
  const at::Tensor gates = save ? at::empty({s.layers, s.rows, 4 * s.units()}, options) : at::empty({0}, options);
  const at::Tensor cells = save ? at::empty({s.layers, s.rows, s.units()}, options.dtype(at::kFloat))
                                : at::empty({0}, options.dtype(at::kFloat));
  std::vector<cuda::ForwardLayer> layers;
  for (int64_t l = 0; l < s.layers; ++l)
    layers.push_back(
        {&call.directions[static_cast<size_t>(l)], states.narrow(l, 1), l + 1 < s.layers ? below[l] : out,
         save ? gates[l] : gates, save ? cells[l] : cells});

  const at::Tensor input = args.input.reshape({s.rows, s.inputs});
  const cuda::Plan plan = cuda::forward_plan(call, cuda::layers_side_by_side(call));
  for (int64_t l = 0; l < s.layers; l += plan.together) {
    const int64_t count = std::min(plan.together, s.layers - l);
    const at::Tensor& from = l == 0 ? input : layers[static_cast<size_t>(l - 1)].out;
    const cuda::ForwardLayer* first = &layers[static_cast<size_t>(l)];
    if (count == 1)
      cuda::forward_layer(call, from, *first);
    else
      cuda::side_by_side(call, plan, from, states.narrow(l, count), first);
  }
  std::vector<int64_t> sizes(args.input.sizes().begin(), args.input.sizes().end());
  sizes.back() = s.hidden;
  return {out.view(sizes), states.h_n, states.c_n, gates, cells, save ? below : at::empty({0}, options)};
}

}  // namespace fastattn
