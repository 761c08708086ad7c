// The backward of the CPU LSTM: walks over the steps from the last one, then takes the gradients of the weights in one
// product each. The arithmetic of a step is in lstm_tile.h.
//
// With dG_t the gradient of the sums of step t, dh_t = dout_t + dG_{t+1} W_hh (and dh_n at the last step), dm_t = dh_t
// W_hr or dh_t, dG_t from dm_t as in lstm_cell.h; dW_ih = sum dG_t^T x_t, dW_hh = sum dG_t^T h_{t-1}, db = sum dG_t,
// dW_hr = sum dh_t^T m_t, dx_t = dG_t W_ih.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "lstm_layer.h"
#include "product.h"

namespace fastattn {

namespace {

struct BackwardLayer {
  LstmShape shape;
  LstmForm form;
  const at::Tensor gates, cells;
  at::Tensor c0;                   // (D, B, Hr)
  at::Tensor grad_out, grad_h_n;   // float32 (N, D P), (D, B, P); or undefined
  at::Tensor dcell;                // (D, B, Hr): the gradient of c_n, of c0 in the end
  int64_t dsums_row;               // from a row of dsums to the next: longer than a row where those are spread
  at::Tensor dsums;                // (N, D 4H), bfloat16 where the form is that
  at::Tensor dh, m;                // (N, D P), (N, D H) where there is a projection
  at::Tensor dh0;                  // (D, B, P); undefined for one step, which does not make it
  std::vector<Floats> weight_h, projection;

  BackwardLayer(
      const LstmGradients& grad, const LstmArgs& args, const LstmShape& sizes, const at::Tensor& saved_gates,
      const at::Tensor& saved_cells);
  void walk() const {
    run_parts(shape, form, [&](const Part& part, Barrier& barrier, float* scratch) { walk(part, barrier, scratch); });
  }
  at::Tensor dsums_of(int64_t d) const { return dsums.narrow(1, d * 4 * shape.hidden, 4 * shape.hidden); }

 private:
  void walk(const Part& part, Barrier& barrier, float* scratch) const;
  // Whether a step has one before it: a single one needs no product among the steps, and no packed weights.
  bool recurrent() const { return shape.steps > 1; }
  // Where row `row` of step t stands in a (N, D columns) tensor.
  float* at_row(const at::Tensor& tensor, int64_t t, int64_t row, int64_t d, int64_t columns) const {
    return tensor.data_ptr<float>() + (shape.row_of(t, row) * shape.directions + d) * columns;
  }
  void* dsums_at(int64_t t, int64_t row, int64_t d) const {
    return at_element(dsums, shape.row_of(t, row) * dsums_row + d * 4 * shape.hidden);
  }
  void hidden_gradient(
      const Part& part, int64_t t, int64_t later, Range rows, bool last, float* to, int64_t to_row,
      float* scratch) const;
  void cell_gradient(const Part& part, int64_t t, int64_t later, Range rows, bool last, float* scratch) const;
};

// Measured: the left operand of the backward is four times as long as that of the forward, and is split in each step.
static LstmForm backward_form(const LstmShape& shape, const LstmGradients& grad, const LstmArgs& args) {
  constexpr int64_t least_rows = 64;
  std::vector<at::Tensor> gradients;
  for (const auto& one : {grad.out, grad.h_n, grad.c_n})
    if (one) gradients.push_back(*one);
  return lstm_form(shape, args, least_rows, gradients);
}

BackwardLayer::BackwardLayer(
    const LstmGradients& grad, const LstmArgs& args, const LstmShape& sizes, const at::Tensor& saved_gates,
    const at::Tensor& saved_cells)
    : shape(sizes), form(backward_form(shape, grad, args)), gates(saved_gates), cells(saved_cells) {
  const LstmShape& s = shape;
  const auto floats = args.input.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  c0 = padded_state(args.c0, s.units());
  if (grad.out) grad_out = dense_float(*grad.out);
  if (grad.h_n) grad_h_n = dense_float(*grad.h_n);
  std::vector<int64_t> states(args.c0.sizes().begin(), args.c0.sizes().end());
  states.back() = s.units();
  dcell = grad.c_n ? copy_of_state(*grad.c_n, s.units()) : at::zeros(states, floats);
  const int64_t columns = s.directions * 4 * s.hidden;
  dsums_row = columns + (form == LstmForm::panels && recurrent() ? kSpread : 0);
  dsums = kept_empty({s.rows, dsums_row}, is_half(form) ? args.input.options() : floats);
  if (dsums_row > columns) dsums = dsums.narrow(1, 0, columns);
  if (s.steps != 1) dh0 = grad.h_n ? grad_h_n.clone() : at::zeros({s.directions, s.batch, s.state}, floats);
  if (s.projection) {
    dh = kept_empty({s.rows, s.directions * s.state}, floats);
    m = kept_empty({s.rows, s.directions * s.hidden}, floats);
  }
  for (int64_t d = 0; d < s.directions; ++d) {
    const at::Tensor* weight = args.weights.data() + d * s.weights_per_direction();
    weight_h.push_back(recurrent() ? pack_columns(weight[1], form) : Floats());
    if (s.projection) projection.push_back(pack_columns(weight[s.weights_per_direction() - 1], form));
  }
}

// dh of step t for some rows; `later` is the step that follows in the direction, or -1. `last`: these rows end here.
void BackwardLayer::hidden_gradient(
    const Part& part, int64_t t, int64_t later, Range rows, bool last, float* to, int64_t to_row,
    float* scratch) const {
  const int64_t d = part.direction;
  LstmProduct p{};
  p.rows = rows.end - rows.begin;
  p.columns = shape.state;
  p.depth = 4 * shape.hidden;
  if (t >= 0 && grad_out.defined()) p.start = at_row(grad_out, t, rows.begin, d, shape.state);
  p.start_row = shape.directions * shape.state;
  if (last && grad_h_n.defined())
    p.start2 = grad_h_n.const_data_ptr<float>() + (d * shape.batch + rows.begin) * shape.state;
  p.start2_row = shape.state;
  if (!last) p.left = dsums_at(later, rows.begin, d);
  p.form = form;
  p.reading = weights_reading(shape, form);
  p.left_row = dsums_row;
  p.spread = true;
  p.weight = weight_h[static_cast<size_t>(d)].get();
  p.out = to;
  p.out_row = to_row;
  lstm_kernels().product(p, share(panels(shape.state), part.member, part.members), scratch);
}

// dG and the gradient of the cell for some rows of step t; those that have a step before read its cell, others c0.
void BackwardLayer::cell_gradient(
    const Part& part, int64_t t, int64_t later, Range rows, bool last, float* scratch) const {
  const int64_t d = part.direction, units = shape.units(), before = d == 0 ? t - 1 : t + 1;
  const int64_t with_before = shape.rows_at(before);
  const Range halves[] = {
      {rows.begin, std::min(rows.end, with_before)}, {std::max(rows.begin, with_before), rows.end}};
  for (int half = 0; half < 2; ++half) {
    const Range now = halves[half];
    if (now.empty()) continue;
    LstmBackwardStep s{};
    s.rows = now.end - now.begin;
    s.hidden = shape.hidden;
    s.form = form;
    s.descending = t % 2 == 1;
    s.reading = weights_reading(shape, form);
    if (shape.projection) {
      s.left = at_row(dh, t, now.begin, d, shape.state);
      s.left_row = shape.directions * shape.state;
      s.weight = projection[static_cast<size_t>(d)].get();
      s.depth = shape.state;
      s.m = at_row(m, t, now.begin, d, shape.hidden);
      s.m_row = shape.directions * shape.hidden;
    } else {
      if (grad_out.defined()) s.start = at_row(grad_out, t, now.begin, d, shape.hidden);
      s.start_row = shape.directions * shape.hidden;
      if (last && grad_h_n.defined())
        s.start2 = grad_h_n.const_data_ptr<float>() + (d * shape.batch + now.begin) * shape.hidden;
      s.start2_row = shape.hidden;
      if (!last) s.left = dsums_at(later, now.begin, d);
      s.left_row = dsums_row;
      s.spread = true;
      s.weight = weight_h[static_cast<size_t>(d)].get();
      s.depth = 4 * shape.hidden;
    }
    const int64_t saved = shape.row_of(t, now.begin) * shape.directions + d;
    s.gates = at_element(gates, saved * 4 * units);
    s.gates_type = lstm_type(gates.scalar_type());
    s.gates_row = shape.directions * 4 * units;
    s.cells = cells.const_data_ptr<float>() + saved * units;
    s.cells_row = shape.directions * units;
    s.previous = half == 0 ? at_row(cells, before, now.begin, d, units)
                           : c0.const_data_ptr<float>() + (d * shape.batch + now.begin) * units;
    s.previous_row = half == 0 ? shape.directions * units : units;
    s.dcell = dcell.data_ptr<float>() + (d * shape.batch + now.begin) * units;
    s.dcell_row = units;
    s.dsums = dsums_at(t, now.begin, d);
    s.dsums_row = dsums_row;
    lstm_kernels().backward(s, share(panels(shape.hidden), part.member, part.members), scratch);
  }
}

// All steps of one part, from the last of its direction; then once more for the gradient of h0. Rows whose sequence is
// over in this walk (they began there) get theirs as soon as they are.
void BackwardLayer::walk(const Part& part, Barrier& barrier, float* scratch) const {
  const int64_t d = part.direction, dh_row = shape.directions * shape.state;
  int64_t there = 0, later = -1;
  for (int64_t i = 0; i <= shape.steps; ++i) {
    const bool over = i == shape.steps;
    const int64_t t = over ? -1 : d == 0 ? shape.steps - 1 - i : i;
    const int64_t active = shape.rows_at(t);
    const Range parts[] = {
        {part.rows.begin, std::min(part.rows.end, std::min(active, there))},  // go on
        {std::max(part.rows.begin, there), std::min(part.rows.end, active)},  // end here, so begin in this walk
        {std::max(part.rows.begin, active), std::min(part.rows.end, there)},  // began at the step before
    };
    for (int kind = 0; shape.projection && kind < 2; ++kind)
      if (!parts[kind].empty())
        hidden_gradient(
            part, t, later, parts[kind], kind == 1, at_row(dh, t, parts[kind].begin, d, shape.state), dh_row, scratch);
    if (!parts[2].empty() && recurrent())
      hidden_gradient(
          part, -1, later, parts[2], false,
          dh0.data_ptr<float>() + (d * shape.batch + parts[2].begin) * shape.state, shape.state, scratch);
    const bool working = !parts[0].empty() || !parts[1].empty();
    if (shape.projection && working) barrier.wait();
    for (int kind = 0; kind < 2; ++kind)
      if (!parts[kind].empty()) cell_gradient(part, t, later, parts[kind], kind == 1, scratch);
    if (working) barrier.wait();
    there = active;
    later = t;
  }
}

}  // namespace

LstmBackward lstm_backward_cpu(
    const LstmGradients& grad, const LstmArgs& args, const at::Tensor& out, const at::Tensor& gates,
    const at::Tensor& cells, LstmWanted wanted) {
  const LstmShape s = cpu_shape(args);
  check_lstm_backward(s, grad, args, out, gates, cells);
  const BackwardLayer layer(grad, args, s, gates, cells);
  layer.walk();

  const auto type = args.input.scalar_type();
  const LstmForm form = layer.form;
  const at::Tensor dh0 = s.steps == 1 ? at::empty(args.h0.sizes(), args.h0.options()) : as_type(layer.dh0, type);
  const int64_t each = s.weights_per_direction();
  const auto weight = [&](int64_t d, int64_t which) {
    return operand(args.weights[static_cast<size_t>(d * each + which)], form);
  };
  const at::Tensor input = operand(args.input, form).view({s.rows, s.inputs}), h0 = operand(args.h0, form);
  const at::Tensor states = operand(out, form).view({s.rows, s.directions * s.state});
  std::vector<at::Tensor> dweights, input_weights;
  for (int64_t d = 0; d < s.directions; ++d) {
    const at::Tensor dsums = layer.dsums_of(d), turned = dsums.t();
    if (s.steps == 1) dh0[d].copy_(mm(dsums, weight(d, 1)));
    if (wanted.input) input_weights.push_back(weight(d, 0));
    if (!wanted.weights) {
      dweights.resize(static_cast<size_t>((d + 1) * each));
      continue;
    }
    const at::Tensor before = s.steps == 1 ? h0[d] : states_before(s, d, states, h0);
    const auto [dinput_weight, dstate_weight] = mm_both(turned, input, before);
    dweights.push_back(dinput_weight.to(type));
    dweights.push_back(dstate_weight.to(type));
    if (s.biases) {
      const at::Tensor dbias = dsums.sum(0).to(type);
      dweights.push_back(dbias);
      dweights.push_back(dbias.clone());
    }
    if (s.projection)
      dweights.push_back(mm(layer.dh.narrow(1, d * s.state, s.state).t(),
                            layer.m.narrow(1, d * s.hidden, s.hidden)).to(type));
  }
  at::Tensor dinput;
  if (wanted.input) {
    if (is_half(form) && s.directions > 1)  // a sum of two products would round twice
      dinput = mm(layer.dsums, at::cat(input_weights));
    else
      for (int64_t d = 0; d < s.directions; ++d)
        add_mm(dinput, layer.dsums_of(d), input_weights[static_cast<size_t>(d)]);
    dinput = dinput.to(type).view(args.input.sizes());
  }
  return {dinput, dh0, unpadded_state(layer.dcell, s.hidden, type), dweights};
}

LstmStepBackward lstm_step_backward_cpu(
    const LstmGradients& grad, const LstmArgs& args, const at::Tensor& gates, const at::Tensor& cells,
    bool input_grad) {
  const LstmShape s = cpu_shape(args, args.c0.dim() == 2);
  check_lstm_step_backward(s, grad, args, gates, cells);
  const BackwardLayer layer(grad, args, s, gates, cells);
  layer.walk();
  const auto type = args.input.scalar_type();
  const auto back_through = [&](size_t weight, const at::Tensor& like) {
    const at::Tensor found = as_type(mm(layer.dsums, operand(args.weights[weight], layer.form)), type);
    return like.dim() == 2 ? found : found.view(like.sizes());
  };
  return {input_grad ? back_through(0, args.input) : at::Tensor(), back_through(1, args.h0),
          unpadded_state(layer.dcell, s.hidden, type), layer.dsums};
}

}  // namespace fastattn
