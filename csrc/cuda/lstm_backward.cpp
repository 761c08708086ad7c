// The backward of the CUDA LSTM, for each direction: the recurrence backwards gives the gradient of the sums before the
// activations, G (N, 4H), by the persistent kernel or step by step; the rest are products over all rows at once:
//
//     dx = G W_ih,   dW_ih = G^T x,   dW_hh = G^T h_{t-1},   db = sum of G's rows,   dW_hr = dh^T m
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "backward.h"

namespace fastattn {

namespace cuda {

at::Tensor Recurrence::sums(const LstmShape& shape, int64_t first, int64_t rows) const {
  return grad_gates.narrow(0, first, rows).narrow(2, 0, shape.hidden).reshape({rows, 4 * shape.hidden});
}

BackwardCells cells_of(const Call& call, const BackwardLayer& layer, const Recurrence& recurrence, int64_t d) {
  const LstmShape& s = call.shape;
  BackwardCells cells{};
  if (layer.grad_out.defined() && !s.projection) cells.grad_out = at_column(layer.grad_out, d * s.state);
  cells.grad_out_stride = s.directions * s.state;
  cells.gates = at_column(layer.gates, d * 4 * s.units());
  cells.gates_stride = s.directions * 4 * s.units();
  cells.cells = layer.cells.const_data_ptr<float>() + d * s.units();
  cells.cells_stride = s.directions * s.units();
  cells.c0 = at_column(layer.c0, d * s.batch * s.hidden);
  cells.grad_gates = recurrence.grad_gates.data_ptr();
  cells.hidden = s.hidden;
  cells.unit_stride = recurrence.grad_gates.size(2);
  return cells;
}

BackwardLaunch backward_launch(
    const Call& call, const Plan& plan, const GradStates& grad, const Direction* weights, const BackwardCells* cells) {
  const LstmShape& s = call.shape;
  const int64_t parts = grad.h0.size(0), state = s.batch * s.hidden;
  BackwardLaunch launch;
  lay_out(launch, call, plan, parts, weights, cells);
  launch.grad_cell = at::empty({parts, s.batch, s.hidden}, grad.h0.options().dtype(at::kFloat));
  for (int64_t i = 0; i < parts; ++i) {
    BackwardPart& part = launch.args.part[i];
    if (grad.h_n.defined()) part.grad_h_n = at_column(grad.h_n, i * state);
    if (grad.c_n.defined()) part.grad_c_n = at_column(grad.c_n, i * state);
    part.grad_c0 = at_column(grad.c0, i * state);
    part.grad_cell = launch.grad_cell.mutable_data_ptr<float>() + i * state;
  }
  return launch;
}

void first_state_gradient(
    const Call& call, const Recurrence& recurrence, const Direction& weights, int64_t d, at::Tensor grad_h0) {
  const LstmShape& s = call.shape;
  const at::Tensor& rows = recurrence.grad_gates;
  const at::Tensor begins = d == 1 ? call.at_last_steps(rows) : rows.narrow(0, 0, s.batch);
  at::mm_out(grad_h0, begins.narrow(2, 0, s.hidden).reshape({s.batch, 4 * s.hidden}), weights.w_hh);
}

void weight_gradients(
    const Call& call, const BackwardLayer& layer, const Recurrence& recurrence, const at::Tensor& sums, int64_t d,
    std::vector<at::Tensor>& grads) {
  const LstmShape& s = call.shape;
  const at::Tensor previous = at::empty({s.rows, s.state}, layer.input.options());
  const Previous source{at_column(layer.out, d * s.state),
                        at_column(layer.h0, d * s.batch * s.state),
                        previous.data_ptr(),
                        s.directions * s.state,
                        s.state,
                        call.steps(),
                        d == 1};
  previous_states(call.type, source, call.stream);
  grads.push_back(at::mm(sums.t(), layer.input));
  grads.push_back(at::mm(sums.t(), previous));
  if (s.biases) {
    grads.push_back(at::sum(sums, {0}));
    grads.push_back(grads.back().clone());
  }
  if (s.projection) grads.push_back(at::mm(recurrence.grad_states.t(), recurrence.unprojected));
}

namespace {

at::Tensor dense(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->contiguous() : at::Tensor(); }

// The gradients of h0 and c0 hold those of h_n and c_n and are the state of the recurrence. Rows join at their last
// step and stay as their first step leaves them.
void step_by_step(
    const Call& call, const BackwardLayer& layer, const GradStates& grad, Recurrence& recurrence, int64_t d) {
  const LstmShape& s = call.shape;
  const Direction& weights = layer.weights[d];
  const auto options = layer.input.options();
  recurrence.grad_gates = at::empty({s.rows, 4, s.hidden}, options);
  const BackwardCells cells = cells_of(call, layer, recurrence, d);
  const at::Tensor grad_gates = recurrence.grad_gates.view({s.rows, 4 * s.hidden});
  const at::Tensor grad_state = grad.h0[d];
  const at::Tensor grad_cell = at::empty({s.batch, s.hidden}, options.dtype(at::kFloat));
  grad_cell.copy_(grad.c0[d]);
  at::Tensor grad_unprojected;
  if (s.projection) {
    recurrence.grad_states = at::empty({s.rows, s.state}, options);
    if (layer.grad_out.defined())
      recurrence.grad_states.copy_(layer.grad_out.narrow(1, d * s.state, s.state));
    else
      recurrence.grad_states.zero_();
    grad_unprojected = at::empty({s.batch, s.hidden}, options);
  }
  for (int64_t step = s.steps - 1; step >= 0; --step) {
    const int64_t t = call.step(d, step), before = d == 1 ? t + 1 : t - 1;
    const int64_t first = s.first[static_cast<size_t>(t)], rows = s.active[static_cast<size_t>(t)];
    const bool begins = before < 0 || before >= s.steps;
    at::Tensor state = grad_state.narrow(0, 0, rows);
    if (s.projection) {
      at::Tensor total = recurrence.grad_states.narrow(0, first, rows);
      total.add_(state);
      at::Tensor rows_unprojected = grad_unprojected.narrow(0, 0, rows);
      at::mm_out(rows_unprojected, total, weights.w_hr);
    }
    BackwardStep launch{};
    launch.cells = cells;
    launch.grad_state = s.projection ? grad_unprojected.const_data_ptr() : state.const_data_ptr();
    launch.grad_cell = grad_cell.mutable_data_ptr<float>();
    launch.first_row = first;
    launch.rows = rows;
    launch.previous_row = begins ? 0 : s.first[static_cast<size_t>(before)];
    launch.previous_rows = begins ? 0 : s.active[static_cast<size_t>(before)];
    backward_step(call.type, launch, call.stream);
    at::mm_out(state, grad_gates.narrow(0, first, rows), weights.w_hh);
  }
  grad.c0[d].copy_(grad_cell);
  if (s.projection) {
    recurrence.unprojected = at::empty({s.rows, s.hidden}, options);
    const Unprojected again{cells.gates,        cells.cells, recurrence.unprojected.data_ptr(), cells.gates_stride,
                            cells.cells_stride, s.hidden,    s.rows};
    unprojected(call.type, again, call.stream);
  }
}

}  // namespace

at::Tensor backward_layer(
    const Call& call, const BackwardLayer& layer, const GradStates& grad, std::vector<at::Tensor>& grads) {
  const LstmShape& s = call.shape;
  const Plan plan = backward_plan(call, s.directions);
  Recurrence recurrence[2];
  for (int64_t begin = 0; begin < s.directions; begin += plan.together) {
    if (plan.unit_blocks == 0) {
      step_by_step(call, layer, grad, recurrence[begin], begin);
      continue;
    }
    const int64_t end = begin + plan.together;
    BackwardCells cells[2];
    for (int64_t d = begin; d < end; ++d) {
      recurrence[d].grad_gates = at::empty({s.rows, 4, s.units()}, layer.input.options());
      cells[d] = cells_of(call, layer, recurrence[d], d);
    }
    BackwardLaunch launch =
        backward_launch(call, plan, grad.narrow(begin, plan.together), layer.weights + begin, cells + begin);
    launch.args.part[plan.together - 1].reverse = end == 2;
    persistent_backward(call.type, call.tf32, launch.args, call.stream);
    for (int64_t d = begin; d < end; ++d)
      first_state_gradient(call, recurrence[d], layer.weights[d], d, grad.h0[d]);
  }

  at::Tensor grad_input;
  for (int64_t d = 0; d < s.directions; ++d) {
    const at::Tensor sums = recurrence[d].sums(s, 0, s.rows);
    const at::Tensor& w_ih = layer.weights[d].w_ih;
    grad_input = d == 0 ? at::mm(sums, w_ih) : at::addmm(grad_input, sums, w_ih);
    weight_gradients(call, layer, recurrence[d], sums, d, grads);
  }
  return grad_input;
}

GradStates grad_states(const Call& call, const LstmGradients& grad, const at::TensorOptions& options) {
  const LstmShape& s = call.shape;
  const int64_t parts = s.directions * s.layers;
  GradStates states{
      dense(grad.h_n), dense(grad.c_n), at::zeros({parts, s.batch, s.state}, options),
      at::zeros({parts, s.batch, s.hidden}, options)};
  if (grad.h_n) states.h0.copy_(*grad.h_n);
  if (grad.c_n) states.c0.copy_(*grad.c_n);
  return states;
}

at::Tensor as_rows(const Call& call, const std::optional<at::Tensor>& tensor) {
  const LstmShape& s = call.shape;
  return tensor ? tensor->reshape({s.rows, s.directions * s.state}).contiguous() : at::Tensor();
}

}  // namespace cuda

LstmBackward lstm_backward_cuda(
    const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out, const at::Tensor& gates,
    const at::Tensor& cells) {
  const cuda::Call call(args);
  const LstmShape& s = call.shape;
  check_lstm_backward(s, grad, args, out, gates, cells);
  const cuda::BackwardLayer layer{
      call.directions.data(), args.input.reshape({s.rows, s.inputs}), args.h0.contiguous(), args.c0.contiguous(),
      cuda::as_rows(call, out), gates, cells, cuda::as_rows(call, grad.out)};
  const cuda::GradStates states = cuda::grad_states(call, grad, args.input.options());
  std::vector<at::Tensor> grad_weights;
  const at::Tensor grad_input = cuda::backward_layer(call, layer, states, grad_weights);
  return {grad_input.view(args.input.sizes()), states.h0, states.c0, grad_weights};
}

}  // namespace fastattn
