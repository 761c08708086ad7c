// The backward of the CPU's layer-normalised LSTM: from the last step of a direction, row by row to the gradients of
// the two products, then through W_hh to the state before; the gradients of the weights in one product each at the end.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "layer_norm_lstm_layer.h"
#include "product.h"

namespace fastattn {

namespace {

struct BackwardWalk {
  const LayerNormLayer layer;
  at::Tensor saved, c0;             // (D, B, Hr)
  at::Tensor grad_out, grad_cells;  // float32 (N, D H), or undefined
  at::Tensor dh, dcell;             // (D, B, Hr): what reaches the states, but through W_hh
  at::Tensor product;               // (D, B, Hr): what reaches the hidden state through W_hh
  at::Tensor dproduct_x, dproduct_h;  // (D, N, 4Hr)
  at::Tensor partial;               // (D, B / kPartialRows rounded up, 14Hr)
  std::vector<Floats> packed;

  BackwardWalk(
      const LayerNormLstmGradients& grad, const LayerNormLstmArgs& args, const at::Tensor& out,
      const at::Tensor& forward_saved);
  void walk(const Part& part, Barrier& barrier, float* scratch) const;
  at::Tensor recurrent_inputs(int64_t d, const at::Tensor& out, const at::Tensor& h0) const;

 private:
  void differentiate(int64_t d, int64_t t, Range rows, float* scratch) const;
  void multiply(const Part& part, int64_t t, Range rows, float* scratch) const;
};

// Contiguous float32 of its own, (D, B, Hr); zeros for none.
at::Tensor state_gradient(const std::optional<at::Tensor>& grad, const LstmShape& s, const at::TensorOptions& floats) {
  at::Tensor result = at::zeros({s.directions, s.batch, s.units()}, floats);
  if (grad) result.narrow(2, 0, s.hidden).copy_(*grad);
  return result;
}

BackwardWalk::BackwardWalk(
    const LayerNormLstmGradients& grad, const LayerNormLstmArgs& args, const at::Tensor& out,
    const at::Tensor& forward_saved)
    : layer(args), saved(forward_saved) {
  const LstmShape& s = layer.shape;
  check_layer_norm_lstm_backward(s, grad, args, out, saved, layer.saved_floats());
  const auto floats = args.input.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  c0 = padded_state(args.c0, s.units());
  if (grad.out) grad_out = dense_float(*grad.out);
  if (grad.cells) grad_cells = dense_float(*grad.cells);
  dh = state_gradient(grad.h_n, s, floats);
  dcell = state_gradient(grad.c_n, s, floats);
  product = at::zeros(dh.sizes(), floats);
  dproduct_x = at::empty({s.directions, s.rows, layer.columns()}, floats);
  dproduct_h = at::empty(dproduct_x.sizes(), floats);
  partial = at::zeros({s.directions, (s.batch + kPartialRows - 1) / kPartialRows, 14 * s.units()}, floats);
  for (int64_t d = 0; d < s.directions; ++d)
    packed.push_back(
        layer.single_step() ? Floats()
                            : pack_columns(gate_blocks(layer.weight_h(args, d), s.hidden), LstmForm::panels));
}

// The gradients of both products for some rows of step t.
void BackwardWalk::differentiate(int64_t d, int64_t t, Range rows, float* scratch) const {
  const LstmShape& s = layer.shape;
  const int64_t units = s.units(), before = d == 0 ? t - 1 : t + 1;
  const int64_t with_before = s.rows_at(before);
  const Range halves[] = {{rows.begin, std::min(rows.end, with_before)}, {std::max(rows.begin, with_before), rows.end}};
  const LayerNormParts parts(layer, saved.data_ptr<float>(), d);
  for (int half = 0; half < 2; ++half) {
    const Range now = halves[half];
    if (now.empty()) continue;
    const int64_t row = s.row_of(t, now.begin), state = (d * s.batch + now.begin) * units;
    const int64_t gates = (d * s.rows + row) * 4 * units;
    LayerNormBackwardStep step{};
    step.rows = now.end - now.begin;
    step.hidden = s.hidden;
    step.first = now.begin;
    step.weights = layer.directions[static_cast<size_t>(d)].pointers();
    step.zoneout_h = layer.hidden_zoneout(d, row);
    step.zoneout_c = layer.cell_zoneout(d, row);
    step.grad_row = step.zoneout_row = s.directions * s.hidden;
    if (grad_out.defined()) step.grad_out = grad_out.const_data_ptr<float>() + row * step.grad_row + d * s.hidden;
    if (grad_cells.defined()) step.grad_cells = grad_cells.const_data_ptr<float>() + row * step.grad_row + d * s.hidden;
    step.product = product.const_data_ptr<float>() + state;
    step.normal_x = parts.normal_x + row * 4 * units;
    step.normal_h = parts.normal_h + row * 4 * units;
    step.saved = parts.rest_at(row, units);
    step.previous = half == 0 ? parts.rest.cells + s.row_of(before, now.begin) * units
                              : c0.const_data_ptr<float>() + state;
    step.dh = dh.data_ptr<float>() + state;
    step.dcell = dcell.data_ptr<float>() + state;
    step.dproduct_x = dproduct_x.data_ptr<float>() + gates;
    step.dproduct_h = dproduct_h.data_ptr<float>() + gates;
    step.partial = partial.data_ptr<float>() + d * partial.stride(0);
    layer_norm_lstm_kernels().backward(step, scratch);
  }
}

// Through W_hh and the mask, a share of the columns for all rows of the part.
void BackwardWalk::multiply(const Part& part, int64_t t, Range rows, float* scratch) const {
  const LstmShape& s = layer.shape;
  const int64_t d = part.direction, units = s.units();
  const Range mine = share(panels(s.hidden), part.member, part.members);
  LstmProduct p{};
  p.reading = weights_reading(s, LstmForm::panels);
  p.rows = rows.end - rows.begin;
  p.columns = s.hidden;
  p.depth = p.left_row = layer.columns();
  p.left = dproduct_h.const_data_ptr<float>() + (d * s.rows + s.row_of(t, rows.begin)) * p.depth;
  p.weight = packed[static_cast<size_t>(d)].get();
  p.out = product.data_ptr<float>() + (d * s.batch + rows.begin) * units;
  p.out_row = units;
  lstm_kernels().product(p, mine, scratch);
  if (!layer.h_mask.defined()) return;
  for (int64_t row = 0; row < p.rows; ++row) {
    const float* mask = layer.mask(t, rows.begin + row, d);
    for (int64_t j = mine.begin * kGateColumns; j < std::min(mine.end * kGateColumns, s.hidden); ++j)
      p.out[row * units + j] *= mask[j];
  }
}

void BackwardWalk::walk(const Part& part, Barrier& barrier, float* scratch) const {
  const LstmShape& s = layer.shape;
  const int64_t d = part.direction;
  const Floats own_scratch(2 * s.units());
  const Range all = whole_groups(part.rows, s.batch);
  for (int64_t i = 0; i < s.steps; ++i) {
    const int64_t t = d == 0 ? s.steps - 1 - i : i;
    const Range rows = layer.active(all, t);
    if (rows.empty()) continue;
    const Range mine = row_share(rows, part.member, part.members);
    if (!mine.empty()) differentiate(d, t, mine, own_scratch.get());
    barrier.wait();
    if (!layer.single_step()) multiply(part, t, rows, scratch);
    barrier.wait();
  }
}

// What W_hh multiplied in every row: (N, H).
at::Tensor BackwardWalk::recurrent_inputs(int64_t d, const at::Tensor& out, const at::Tensor& h0) const {
  const LstmShape& s = layer.shape;
  at::Tensor states = states_before(s, d, out, h0);
  if (!layer.h_mask.defined()) return states;
  float* to = states.data_ptr<float>();
  for (int64_t t = 0; t < s.steps; ++t)
    for (int64_t row = 0; row < s.rows_at(t); ++row, to += s.hidden) {
      const float* mask = layer.mask(t, row, d);
      for (int64_t j = 0; j < s.hidden; ++j) to[j] *= mask[j];
    }
  return states;
}

}  // namespace

LayerNormLstmBackward layer_norm_lstm_backward_cpu(
    const LayerNormLstmGradients& grad, const LayerNormLstmArgs& args, const at::Tensor& out, const at::Tensor& saved,
    bool input_grad) {
  const BackwardWalk walk(grad, args, out, saved);
  const LstmShape& s = walk.layer.shape;
  run_parts(s, LstmForm::panels, [&](const Part& part, Barrier& barrier, float* scratch) {
    walk.walk(part, barrier, scratch);
  });

  const auto type = args.input.scalar_type();
  const int64_t units = s.units();
  const at::Tensor input = dense_float(args.input).view({s.rows, s.inputs}), h0 = dense_float(args.h0);
  const at::Tensor states = dense_float(out);
  at::Tensor dinput = at::empty({0}, args.input.options());
  std::vector<at::Tensor> dweights;
  for (int64_t d = 0; d < s.directions; ++d) {
    at::Tensor dx = walk.dproduct_x[d], dh = walk.dproduct_h[d];
    const at::Tensor sums = walk.partial[d].sum(0), weight_x = walk.layer.weight_x(args, d);
    const bool single = walk.layer.single_step();
    if (single) {
      dx = from_gate_blocks(dx, s.hidden, 1);
      dh = from_gate_blocks(dh, s.hidden, 1);
      at::Tensor to = walk.product[d].narrow(1, 0, s.hidden);
      to.copy_(mm(dh, walk.layer.weight_h(args, d)));
      if (walk.layer.h_mask.defined()) to.mul_(walk.layer.h_mask.select(1, d));
    }
    const auto in_order = [&](const at::Tensor& dweight) {
      return (single ? dweight : from_gate_blocks(dweight, s.hidden)).to(type);
    };
    const auto gates = [&](int64_t place) {
      return from_gate_blocks(sums.narrow(0, place * units, 4 * units), s.hidden).to(type).clone();
    };
    const auto cell = [&](int64_t place) { return sums.narrow(0, place * units, s.hidden).to(type).clone(); };
    dweights.push_back(in_order(mm(dx.t(), input)));
    dweights.push_back(in_order(mm(dh.t(), walk.recurrent_inputs(d, states, h0))));
    dweights.push_back(gates(0));
    dweights.push_back(gates(4));
    dweights.push_back(cell(12));
    if (walk.layer.biases) {
      dweights.push_back(gates(8));
      dweights.push_back(cell(13));
    }
    if (!input_grad) continue;
    const at::Tensor through = mm(dx, single ? weight_x : gate_blocks(weight_x, s.hidden));
    dinput = d == 0 ? through : dinput.add_(through);
  }
  if (input_grad) dinput = dinput.to(type).view(args.input.sizes());
  const at::Tensor dh0 = at::add(walk.dh, walk.product).narrow(2, 0, s.hidden);
  return {dinput, dh0.to(type).contiguous(), walk.dcell.narrow(2, 0, s.hidden).to(type).contiguous(), dweights};
}

}  // namespace fastattn
