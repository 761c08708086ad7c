// The forward of the CUDA LSTM, for each direction: W_ih x as one product over all rows, then the recurrence, either
// the persistent kernel over the whole sequence or, step by step, one product and one kernel for the cells.
//
// The step-by-step path costs two launches and the host's time for them at each step; torch.cuda.graph around the
// call removes that. It is not recorded in here: a graph holds the addresses of one call, and recording takes longer
// than the call.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "forward.h"

namespace fastattn {

namespace cuda {

ForwardCells cells_of(const Call& call, const ForwardLayer& layer, int64_t d) {
  const LstmShape& s = call.shape;
  const Direction& weights = layer.weights[d];
  ForwardCells cells{};
  cells.bias_ih = pointer(weights.b_ih);
  cells.bias_hh = pointer(weights.b_hh);
  cells.out = at_column(layer.out, d * s.state);
  cells.out_stride = s.directions * s.state;
  if (layer.gates.numel() > 0) {
    cells.gates = at_column(layer.gates, d * 4 * s.units());
    cells.cells = layer.cells.mutable_data_ptr<float>() + d * s.units();
  }
  cells.gates_stride = s.directions * 4 * s.units();
  cells.cells_stride = s.directions * s.units();
  cells.hidden = s.hidden;
  return cells;
}

ForwardLaunch forward_launch(
    const Call& call, const Plan& plan, const States& states, const Direction* weights, const ForwardCells* cells) {
  const LstmShape& s = call.shape;
  const int64_t parts = states.h0.size(0), state = s.batch * s.hidden;
  ForwardLaunch launch;
  lay_out(launch, call, plan, parts, weights, cells);
  launch.args.depth = forward_depth(call.type, s.hidden);
  const auto options = states.h0.options();
  launch.exchange = at::zeros({parts, 2, s.batch, launch.args.depth}, options);
  launch.exchange.narrow(3, 0, s.hidden).copy_(states.h0.unsqueeze(1));
  launch.cell_state = at::empty({parts, s.batch, s.hidden}, options.dtype(at::kFloat));
  for (int64_t i = 0; i < parts; ++i) {
    ForwardPart& part = launch.args.part[i];
    part.c0 = at_column(states.c0, i * state);
    part.h_n = at_column(states.h_n, i * state);
    part.c_n = at_column(states.c_n, i * state);
    part.exchange = at_column(launch.exchange, i * 2 * s.batch * launch.args.depth);
    part.cell_state = launch.cell_state.mutable_data_ptr<float>() + i * state;
  }
  return launch;
}

namespace {

// h_n holds h0 and is the state of the recurrence: a row stays as its last step leaves it.
void step_by_step(const Call& call, const ForwardLayer& layer, ForwardCells cells, int64_t d) {
  const LstmShape& s = call.shape;
  const Direction& weights = layer.weights[d];
  const States& states = layer.states;
  const auto options = layer.out.options();
  const at::Tensor hidden_gates = at::empty({s.batch, 4 * s.hidden}, options);
  const at::Tensor cell_state = at::empty({s.batch, s.hidden}, options.dtype(at::kFloat));
  cell_state.copy_(states.c0[d]);
  const at::Tensor hidden_state = states.h_n[d], out = layer.out.narrow(1, d * s.state, s.state);
  at::Tensor unprojected;
  if (s.projection) {
    unprojected = at::empty({s.rows, s.hidden}, options);
    cells.out = unprojected.data_ptr();
    cells.out_stride = s.hidden;
  }
  for (int64_t step = 0; step < s.steps; ++step) {
    const auto t = static_cast<size_t>(call.step(d, step));
    const int64_t first = s.first[t], rows = s.active[t];
    at::Tensor state = hidden_state.narrow(0, 0, rows), sums = hidden_gates.narrow(0, 0, rows);
    at::mm_out(sums, state, weights.w_hh.t());
    void* next = s.projection ? nullptr : hidden_state.data_ptr();
    forward_step(
        call.type, {cells, sums.const_data_ptr(), cell_state.mutable_data_ptr<float>(), next, first, rows},
        call.stream);
    if (s.projection) {
      at::mm_out(state, unprojected.narrow(0, first, rows), weights.w_hr.t());
      out.narrow(0, first, rows).copy_(state);
    }
  }
  states.c_n[d].copy_(cell_state);
}

}  // namespace

void forward_layer(const Call& call, const at::Tensor& input, const ForwardLayer& layer) {
  const LstmShape& s = call.shape;
  layer.states.h_n.copy_(layer.states.h0);
  at::Tensor input_gates[2];
  ForwardCells cells[2];
  for (int64_t d = 0; d < s.directions; ++d) {
    input_gates[d] = at::mm(input, layer.weights[d].w_ih.t());
    cells[d] = cells_of(call, layer, d);
    cells[d].input_gates = input_gates[d].const_data_ptr();
  }
  const Plan plan = forward_plan(call, s.directions);
  for (int64_t d = 0; d < s.directions; d += plan.together) {
    if (plan.unit_blocks == 0) {
      step_by_step(call, layer, cells[d], d);
      continue;
    }
    ForwardLaunch launch =
        forward_launch(call, plan, layer.states.narrow(d, plan.together), layer.weights + d, cells + d);
    launch.args.part[plan.together - 1].reverse = d + plan.together == 2;
    persistent_forward(call.type, call.tf32, launch.args, call.stream);
  }
}

}  // namespace cuda

LstmForward lstm_forward_cuda(const LstmArgs& args, bool save) {
  const cuda::Call call(args);
  const LstmShape& s = call.shape;
  const auto options = args.input.options();
  const cuda::States states{
      args.h0, args.c0.contiguous(), at::empty({s.directions, s.batch, s.state}, options),
      at::empty({s.directions, s.batch, s.hidden}, options)};
  const cuda::ForwardLayer layer{
      call.directions.data(), states, at::empty({s.rows, s.directions * s.state}, options),
      save ? at::empty({s.rows, s.directions, 4 * s.units()}, options) : at::empty({0}, options),
      save ? at::empty({s.rows, s.directions, s.units()}, options.dtype(at::kFloat))
           : at::empty({0}, options.dtype(at::kFloat))};
  cuda::forward_layer(call, args.input.reshape({s.rows, s.inputs}), layer);
  std::vector<int64_t> sizes(args.input.sizes().begin(), args.input.sizes().end());
  sizes.back() = s.directions * s.state;
  return {layer.out.view(sizes), states.h_n, states.c_n, layer.gates, layer.cells};
}

}  // namespace fastattn
