// The forward of the CUDA LSTM, for each direction: W_ih x as one product over all rows, then the recurrence, either
// the persistent kernel over the whole sequence or, step by step, one product and one kernel for the cells.
//
// The step-by-step path costs two launches and the host's time for them at each step; torch.cuda.graph around the
// call removes that. It is not recorded in here: a graph holds the addresses of one call, and recording takes longer
// than the call.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "call.h"

namespace fastattn {

using namespace cuda;

namespace {

struct Results {
  at::Tensor out, h_n, c_n, gates, cells;
};

ForwardCells cells_of(const Call& call, const Results& results, const at::Tensor& input_gates, int64_t d) {
  const LstmShape& s = call.shape;
  const Direction& weights = call.directions[static_cast<size_t>(d)];
  ForwardCells cells{};
  cells.input_gates = input_gates.const_data_ptr();
  cells.bias_ih = pointer(weights.b_ih);
  cells.bias_hh = pointer(weights.b_hh);
  cells.out = at_column(results.out, d * s.state);
  cells.out_stride = s.directions * s.state;
  if (results.gates.numel() > 0) {
    cells.gates = at_column(results.gates, d * 4 * s.units());
    cells.cells = results.cells.mutable_data_ptr<float>() + d * s.units();
  }
  cells.gates_stride = s.directions * 4 * s.units();
  cells.cells_stride = s.directions * s.units();
  cells.hidden = s.hidden;
  return cells;
}

// h_n holds h0 and is the state of the recurrence: a row stays as its last step leaves it.
void step_by_step(const Call& call, const LstmArgs& args, const Results& results, ForwardCells cells, int64_t d) {
  const LstmShape& s = call.shape;
  const Direction& weights = call.directions[static_cast<size_t>(d)];
  const at::Tensor hidden_gates = at::empty({s.batch, 4 * s.hidden}, args.input.options());
  const at::Tensor cell_state = at::empty({s.batch, s.hidden}, args.input.options().dtype(at::kFloat));
  cell_state.copy_(args.c0[d]);
  const at::Tensor hidden_state = results.h_n[d], out = results.out.narrow(1, d * s.state, s.state);
  at::Tensor unprojected;
  if (s.projection) {
    unprojected = at::empty({s.rows, s.hidden}, args.input.options());
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
  results.c_n[d].copy_(cell_state);
}

// Directions `begin` to `begin + count` in one launch.
void persist(
    const Call& call, const LstmArgs& args, const Results& results, const Plan& plan, const ForwardCells* cells,
    int64_t begin, int64_t count) {
  const LstmShape& s = call.shape;
  PersistentForward launch{};
  launch.directions = count;
  launch.groups = plan.groups;
  launch.unit_blocks = plan.unit_blocks;
  launch.depth = forward_depth(call.type, s.hidden);
  launch.steps = call.steps();
  const at::Tensor exchange = at::zeros({count, 2, s.batch, launch.depth}, args.input.options());
  exchange.narrow(3, 0, s.hidden).copy_(args.h0.narrow(0, begin, count).unsqueeze(1));
  const at::Tensor arrivals = at::zeros({count * plan.groups}, args.input.options().dtype(at::kInt));
  launch.arrivals = reinterpret_cast<uint32_t*>(arrivals.mutable_data_ptr<int32_t>());
  const at::Tensor c0 = args.c0.contiguous();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t d = begin + i;
    launch.cells[i] = cells[d];
    launch.weight[i] = call.directions[static_cast<size_t>(d)].w_hh.const_data_ptr();
    launch.c0[i] = at_column(c0, d * s.batch * s.hidden);
    launch.h_n[i] = at_column(results.h_n, d * s.batch * s.hidden);
    launch.c_n[i] = at_column(results.c_n, d * s.batch * s.hidden);
    launch.reverse[i] = d == 1;
    launch.exchange[i] = at_column(exchange, i * 2 * s.batch * launch.depth);
  }
  persistent_forward(call.type, call.tf32, launch, call.stream);
}

}  // namespace

LstmForward lstm_forward_cuda(const LstmArgs& args, bool save) {
  const Call call(args);
  const LstmShape& s = call.shape;
  const auto options = args.input.options();
  Results results;
  results.out = at::empty({s.rows, s.directions * s.state}, options);
  results.h_n = at::empty({s.directions, s.batch, s.state}, options);
  results.h_n.copy_(args.h0);
  results.c_n = at::empty({s.directions, s.batch, s.hidden}, options);
  results.gates =
      save ? at::empty({s.rows, s.directions, 4 * s.units()}, options) : at::empty({0}, options);
  results.cells = save ? at::empty({s.rows, s.directions, s.units()}, options.dtype(at::kFloat))
                       : at::empty({0}, options.dtype(at::kFloat));

  const at::Tensor input = args.input.reshape({s.rows, s.inputs});
  at::Tensor input_gates[2];
  ForwardCells cells[2];
  for (int64_t d = 0; d < s.directions; ++d) {
    input_gates[d] = at::mm(input, call.directions[static_cast<size_t>(d)].w_ih.t());
    cells[d] = cells_of(call, results, input_gates[d], d);
  }
  const Plan plan = forward_plan(call);
  const int64_t together = plan.side_by_side ? s.directions : 1;
  for (int64_t d = 0; d < s.directions; d += together) {
    if (plan.unit_blocks > 0)
      persist(call, args, results, plan, cells, d, together);
    else
      step_by_step(call, args, results, cells[d], d);
  }
  std::vector<int64_t> sizes(args.input.sizes().begin(), args.input.sizes().end());
  sizes.back() = s.directions * s.state;
  return {results.out.view(sizes), results.h_n, results.c_n, results.gates, results.cells};
}

}  // namespace fastattn
