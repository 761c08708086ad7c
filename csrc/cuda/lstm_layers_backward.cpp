// The backward of a stack of layers on CUDA: side by side where several fit on the device and the sequence is long
// enough to be cut (waves.h), else one after the other. The gradient of a weight is one product either way.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "backward.h"

namespace fastattn {

namespace cuda {

namespace {

using Grads = std::vector<at::Tensor>;

// `layers` in waves; the gradient of the outputs of all but the last is this function's to find. Gradient of the input
// of the first; those of each layer's weights are appended to its `grads`.
at::Tensor side_by_side(
    const Call& call, const Plan& plan, BackwardLayer* layers, const GradStates& grad, Grads* grads) {
  const LstmShape& s = call.shape;
  const int64_t count = grad.h0.size(0);
  const auto options = layers[0].input.options();
  Recurrence recurrence[kMostTogether];
  BackwardCells cells[kMostTogether];
  for (int64_t l = 0; l < count; ++l) {
    recurrence[l].grad_gates = at::empty({s.rows, 4, s.units()}, options);
    if (l + 1 < count) layers[l].grad_out = at::empty({s.rows, s.hidden}, options);
    cells[l] = cells_of(call, layers[l], recurrence[l], 0);
  }
  const BackwardLaunch all = backward_launch(call, plan, grad, layers[0].weights, cells);
  const Waves waves = waves_of(call, count);
  for (int64_t w = waves.count() - 1; w >= 0; --w) {
    PersistentBackward launch = all.args;
    launch.parts = 0;
    for (const Chunk& chunk : waves.wave(w)) {
      BackwardPart& part = launch.part[launch.parts++];
      part = all.args.part[chunk.layer];
      part.begin = chunk.begin;
      part.end = chunk.end;
    }
    persistent_backward(call.type, call.tf32, launch, call.stream);
    for (const Chunk& chunk : waves.wave(w)) {
      if (chunk.layer == 0) continue;
      const auto [first, rows] = rows_of(call, chunk);
      at::Tensor grad_below = layers[chunk.layer - 1].grad_out.narrow(0, first, rows);
      at::mm_out(grad_below, recurrence[chunk.layer].sums(s, first, rows), layers[chunk.layer].weights->w_ih);
    }
  }
  for (int64_t l = 0; l < count; ++l) {
    first_state_gradient(call, recurrence[l], *layers[l].weights, 0, grad.h0[l]);
    const at::Tensor sums = recurrence[l].sums(s, 0, s.rows);
    weight_gradients(call, layers[l], recurrence[l], sums, 0, grads[l]);
  }
  return at::mm(recurrence[0].sums(s, 0, s.rows), layers[0].weights->w_ih);
}

}  // namespace

}  // namespace cuda

LstmBackward lstm_layers_backward_cuda(
    const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out, const at::Tensor& gates,
    const at::Tensor& cells, const at::Tensor& states) {
  const cuda::Call call(args, lstm_layers_shape);
  const LstmShape& s = call.shape;
  check_lstm_layers_backward(s, grad, args, out, gates, cells, states);
  const at::Tensor h0 = args.h0.contiguous(), c0 = args.c0.contiguous(), below = states.contiguous();
  std::vector<cuda::BackwardLayer> layers;
  for (int64_t l = 0; l < s.layers; ++l) {
    const bool last = l + 1 == s.layers;
    layers.push_back(
        {&call.directions[static_cast<size_t>(l)],
         l == 0 ? args.input.reshape({s.rows, s.inputs}) : below[l - 1], h0.narrow(0, l, 1), c0.narrow(0, l, 1),
         last ? cuda::as_rows(call, out) : below[l], gates[l], cells[l],
         last ? cuda::as_rows(call, grad.out) : at::Tensor()});
  }
  const cuda::GradStates grad_states = cuda::grad_states(call, grad, args.input.options());
  std::vector<cuda::Grads> grads(static_cast<size_t>(s.layers));

  const cuda::Plan plan = cuda::backward_plan(call, cuda::layers_side_by_side(call));
  at::Tensor grad_input;
  for (int64_t end = s.layers; end > 0; end -= std::min(plan.together, end)) {
    const int64_t count = std::min(plan.together, end);
    const auto begin = static_cast<size_t>(end - count);
    if (end < s.layers) layers[static_cast<size_t>(end - 1)].grad_out = grad_input;
    const cuda::GradStates of_layers = grad_states.narrow(end - count, count);
    grad_input = count == 1 ? cuda::backward_layer(call, layers[begin], of_layers, grads[begin])
                            : cuda::side_by_side(call, plan, &layers[begin], of_layers, &grads[begin]);
  }
  std::vector<at::Tensor> grad_weights;
  for (const cuda::Grads& of_layer : grads) grad_weights.insert(grad_weights.end(), of_layer.begin(), of_layer.end());
  return {grad_input.view(args.input.sizes()), grad_states.h0, grad_states.c0, grad_weights};
}

}  // namespace fastattn
