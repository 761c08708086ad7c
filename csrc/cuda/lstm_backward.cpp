// The backward of the CUDA LSTM, for each direction: the recurrence backwards gives the gradient of the sums before the
// activations, G (N, 4H), by the persistent kernel or step by step; the rest are products over all rows at once:
//
//     dx = G W_ih,   dW_ih = G^T x,   dW_hh = G^T h_{t-1},   db = sum of G's rows,   dW_hr = dh^T m
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "call.h"

namespace fastattn {

using namespace cuda;

namespace {

// The results of the forward and the gradients of them, dense.
struct Backward {
  const LstmArgs& args;
  at::Tensor out, gates, cells;           // (N, D P), (N, D, 4 Hr), (N, D, Hr)
  at::Tensor grad_out, grad_h_n, grad_c_n;  // (N, D P), (D, B, P), (D, B, H); undefined for zero
  at::Tensor c0, h0;
  at::Tensor grad_h0, grad_c0;
};

// One direction's: G as (N, 4, units), and with a projection dh (N, P) and m (N, H).
struct Recurrence {
  at::Tensor grad_gates, grad_states, unprojected;
};

at::Tensor dense(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->contiguous() : at::Tensor(); }

BackwardCells cells_of(const Call& call, const Backward& backward, const Recurrence& recurrence, int64_t d) {
  const LstmShape& s = call.shape;
  BackwardCells cells{};
  if (backward.grad_out.defined() && !s.projection) cells.grad_out = at_column(backward.grad_out, d * s.state);
  cells.grad_out_stride = s.directions * s.state;
  cells.gates = at_column(backward.gates, d * 4 * s.units());
  cells.gates_stride = s.directions * 4 * s.units();
  cells.cells = backward.cells.const_data_ptr<float>() + d * s.units();
  cells.cells_stride = s.directions * s.units();
  cells.c0 = at_column(backward.c0, d * s.batch * s.hidden);
  cells.grad_gates = recurrence.grad_gates.data_ptr();
  cells.hidden = s.hidden;
  cells.unit_stride = recurrence.grad_gates.size(2);
  return cells;
}

// grad_h0 and grad_c0 hold the gradients of h_n and c_n and are the state of the recurrence. Rows join at their last
// step and stay as their first step leaves them.
void step_by_step(const Call& call, const Backward& backward, Recurrence& recurrence, int64_t d) {
  const LstmShape& s = call.shape;
  const Direction& weights = call.directions[static_cast<size_t>(d)];
  const auto options = backward.args.input.options();
  recurrence.grad_gates = at::empty({s.rows, 4, s.hidden}, options);
  const BackwardCells cells = cells_of(call, backward, recurrence, d);
  const at::Tensor grad_gates = recurrence.grad_gates.view({s.rows, 4 * s.hidden});
  const at::Tensor grad_state = backward.grad_h0[d];
  const at::Tensor grad_cell = at::empty({s.batch, s.hidden}, options.dtype(at::kFloat));
  grad_cell.copy_(backward.grad_c0[d]);
  at::Tensor grad_unprojected;
  if (s.projection) {
    recurrence.grad_states = at::empty({s.rows, s.state}, options);
    if (backward.grad_out.defined())
      recurrence.grad_states.copy_(backward.grad_out.narrow(1, d * s.state, s.state));
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
  backward.grad_c0[d].copy_(grad_cell);
  if (s.projection) {
    recurrence.unprojected = at::empty({s.rows, s.hidden}, options);
    const Unprojected again{cells.gates,        cells.cells, recurrence.unprojected.data_ptr(), cells.gates_stride,
                            cells.cells_stride, s.hidden,    s.rows};
    unprojected(call.type, again, call.stream);
  }
}

// Directions `begin` to `begin + count` in one launch, then dh0 as one product.
void persist(
    const Call& call, const Backward& backward, const Plan& plan, Recurrence* recurrence, int64_t begin,
    int64_t count) {
  const LstmShape& s = call.shape;
  const auto options = backward.args.input.options();
  PersistentBackward launch{};
  launch.directions = count;
  launch.groups = plan.groups;
  launch.unit_blocks = plan.unit_blocks;
  launch.steps = call.steps();
  const at::Tensor arrivals = at::zeros({count * plan.groups}, options.dtype(at::kInt));
  launch.arrivals = reinterpret_cast<uint32_t*>(arrivals.mutable_data_ptr<int32_t>());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t d = begin + i, offset = d * s.batch * s.hidden;
    recurrence[d].grad_gates = at::empty({s.rows, 4, s.units()}, options);
    launch.cells[i] = cells_of(call, backward, recurrence[d], d);
    launch.weight[i] = call.directions[static_cast<size_t>(d)].w_hh.const_data_ptr();
    if (backward.grad_h_n.defined()) launch.grad_h_n[i] = at_column(backward.grad_h_n, offset);
    if (backward.grad_c_n.defined()) launch.grad_c_n[i] = at_column(backward.grad_c_n, offset);
    launch.grad_c0[i] = at_column(backward.grad_c0, offset);
    launch.reverse[i] = d == 1;
  }
  persistent_backward(call.type, call.tf32, launch, call.stream);
  for (int64_t d = begin; d < begin + count; ++d) {
    const at::Tensor& rows = recurrence[d].grad_gates;
    const at::Tensor begins = d == 1 ? call.at_last_steps(rows) : rows.narrow(0, 0, s.batch);
    at::Tensor grad_h0 = backward.grad_h0[d];
    at::mm_out(
        grad_h0, begins.narrow(2, 0, s.hidden).reshape({s.batch, 4 * s.hidden}),
        call.directions[static_cast<size_t>(d)].w_hh);
  }
}

// Gradients of one direction's weights, appended to `grads`.
void weight_gradients(
    const Call& call, const Backward& backward, const Recurrence& recurrence, const at::Tensor& input,
    const at::Tensor& grad_sums, int64_t d, std::vector<at::Tensor>& grads) {
  const LstmShape& s = call.shape;
  const at::Tensor previous = at::empty({s.rows, s.state}, input.options());
  const Previous source{at_column(backward.out, d * s.state),
                        at_column(backward.h0, d * s.batch * s.state),
                        previous.data_ptr(),
                        s.directions * s.state,
                        s.state,
                        call.steps(),
                        d == 1};
  previous_states(call.type, source, call.stream);
  grads.push_back(at::mm(grad_sums.t(), input));
  grads.push_back(at::mm(grad_sums.t(), previous));
  if (s.biases) {
    grads.push_back(at::sum(grad_sums, {0}));
    grads.push_back(grads.back().clone());
  }
  if (s.projection) grads.push_back(at::mm(recurrence.grad_states.t(), recurrence.unprojected));
}

}  // namespace

LstmBackward lstm_backward_cuda(
    const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out, const at::Tensor& gates,
    const at::Tensor& cells) {
  const Call call(args);
  const LstmShape& s = call.shape;
  check_lstm_backward(s, grad, args, out, gates, cells);
  const auto options = args.input.options();
  Backward backward{
      args,           out.reshape({s.rows, s.directions * s.state}).contiguous(), gates, cells, dense(grad.out),
      dense(grad.h_n), dense(grad.c_n), args.c0.contiguous(), args.h0.contiguous(), at::Tensor(), at::Tensor()};
  if (backward.grad_out.defined()) backward.grad_out = backward.grad_out.view({s.rows, s.directions * s.state});
  backward.grad_h0 = at::zeros({s.directions, s.batch, s.state}, options);
  backward.grad_c0 = at::zeros({s.directions, s.batch, s.hidden}, options);
  if (grad.h_n) backward.grad_h0.copy_(*grad.h_n);
  if (grad.c_n) backward.grad_c0.copy_(*grad.c_n);

  const Plan plan = backward_plan(call);
  const int64_t together = plan.side_by_side ? s.directions : 1;
  Recurrence recurrence[2];
  for (int64_t d = 0; d < s.directions; d += together) {
    if (plan.unit_blocks > 0)
      persist(call, backward, plan, recurrence, d, together);
    else
      step_by_step(call, backward, recurrence[d], d);
  }

  const at::Tensor input = args.input.reshape({s.rows, s.inputs});
  at::Tensor grad_input;
  std::vector<at::Tensor> grad_weights;
  for (int64_t d = 0; d < s.directions; ++d) {
    const at::Tensor sums = recurrence[d].grad_gates.narrow(2, 0, s.hidden).reshape({s.rows, 4 * s.hidden});
    const at::Tensor& w_ih = call.directions[static_cast<size_t>(d)].w_ih;
    grad_input = d == 0 ? at::mm(sums, w_ih) : at::addmm(grad_input, sums, w_ih);
    weight_gradients(call, backward, recurrence[d], input, sums, d, grad_weights);
  }
  return {grad_input.view(args.input.sizes()), backward.grad_h0, backward.grad_c0, grad_weights};
}

}  // namespace fastattn
