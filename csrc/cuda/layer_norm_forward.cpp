// The forward of the layer-normalised CUDA LSTM, for each direction: W_ih x as one product and its normalisation in one
// launch over all rows; then at each step W_hh (m h_{t-1}), a product, and one launch for all that follows it. The host
// asks for both of them at each step: see lstm_forward.cpp for torch.cuda.graph.
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include "layer_norm_call.h"

namespace fastattn {

using namespace cuda;

namespace {

struct Results {
  at::Tensor out, cells, h_n, c_n, saved;  // (N, D H), the same or empty, (D, B, H), the same, flat or empty
};

// Where the normalised input of direction d goes, and all else that is to be saved.
LayerNormSaved normalised_inputs(
    const LayerNormCall& call, const Results& results, const at::Tensor& input, at::Tensor& unsaved, int64_t d) {
  const LstmShape& s = call.shape();
  LayerNormSaved saved{};
  if (results.saved.numel() > 0) {
    saved = call.saved(results.saved, d);
  } else {
    unsaved = at::empty({s.rows, 4 * s.hidden}, results.saved.options());
    saved.normal_x = unsaved.mutable_data_ptr<float>();
  }
  const at::Tensor product = at::empty({s.rows, 4 * s.hidden}, results.saved.options());
  multiply(product, input, call.plain.directions[static_cast<size_t>(d)].w_ih.t());
  normalise_inputs(
      {product.const_data_ptr<float>(), saved.normal_x, saved.deviations, s.rows, s.hidden, call.eps},
      call.plain.stream);
  return saved;
}

// h_n holds h0 and is the state of the recurrence: a row stays as its last step leaves it.
void recur(
    const LayerNormCall& call, const LayerNormLstmArgs& args, const Results& results, const LayerNormSaved& saved,
    int64_t d) {
  const LstmShape& s = call.shape();
  const auto options = args.input.options(), floats = options.dtype(at::kFloat);
  const at::Tensor product = at::empty({s.batch, 4 * s.hidden}, floats);
  const at::Tensor cell_state = at::empty({s.batch, s.hidden}, floats);
  cell_state.copy_(args.c0[d]);
  const at::Tensor hidden_state = results.h_n[d];
  at::Tensor input = hidden_state;  // of W_hh
  if (call.h_mask.defined()) {
    input = at::empty({s.batch, s.hidden}, options);
    input.copy_(at::mul(hidden_state, call.first_mask(d)));
  }
  LayerNormForwardStep launch{};
  launch.weights = call.weights(d);
  launch.zoneout_h = call.hidden_zoneout(d);
  launch.zoneout_c = call.cell_zoneout(d);
  launch.mask = call.mask(d);
  launch.saved = saved;
  launch.product = product.const_data_ptr<float>();
  launch.hidden_state = hidden_state.data_ptr();
  launch.next_input = input.data_ptr();
  launch.cell_state = cell_state.mutable_data_ptr<float>();
  launch.out = at_column(results.out, d * s.hidden);
  if (results.cells.numel() > 0) launch.cells = at_column(results.cells, d * s.hidden);
  launch.out_stride = s.directions * s.hidden;
  launch.hidden = s.hidden;
  launch.eps = call.eps;
  const at::Tensor weight = call.plain.directions[static_cast<size_t>(d)].w_hh.t();
  for (int64_t step = 0; step < s.steps; ++step) {
    const int64_t t = call.plain.step(d, step);
    const Place here = call.place(t), next = call.place(d == 1 ? t - 1 : t + 1);
    multiply(product.narrow(0, 0, here.rows), input.narrow(0, 0, here.rows), weight);
    launch.first_row = here.first;
    launch.rows = here.rows;
    launch.next_row = next.first;
    launch.next_rows = next.rows;
    layer_norm_forward_step(call.plain.type, launch, call.plain.stream);
  }
  results.c_n[d].copy_(cell_state);
}

}  // namespace

LayerNormLstmForward layer_norm_lstm_forward_cuda(const LayerNormLstmArgs& args, bool save, bool all_cells) {
  const LayerNormCall call(args);
  const LstmShape& s = call.shape();
  const auto options = args.input.options();
  std::vector<int64_t> sizes(args.input.sizes().begin(), args.input.sizes().end());
  sizes.back() = s.directions * s.hidden;
  Results results;
  results.out = at::empty(sizes, options);
  results.cells = all_cells ? at::empty(sizes, options) : at::empty({0}, options);
  results.h_n = at::empty({s.directions, s.batch, s.hidden}, options);
  results.h_n.copy_(args.h0);
  results.c_n = at::empty({s.directions, s.batch, s.hidden}, options);
  results.saved = at::empty({save ? saved_floats(s) : 0}, options.dtype(at::kFloat));
  const at::Tensor input = args.input.reshape({s.rows, s.inputs});
  for (int64_t d = 0; d < s.directions; ++d) {
    at::Tensor unsaved;
    const LayerNormSaved saved = normalised_inputs(call, results, input, unsaved, d);
    recur(call, args, results, saved, d);
  }
  return {results.out, results.cells, results.h_n, results.c_n, results.saved};
}

}  // namespace fastattn
