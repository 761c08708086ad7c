// The forward of the CPU's layer-normalised LSTM: the input's product for all steps, then step by step the recurrent
// product and, row by row, what follows it.
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include "layer_norm_lstm_layer.h"
#include "product.h"

namespace fastattn {

namespace {

struct ForwardWalk {
  const LayerNormLayer layer;
  const bool save;
  at::Tensor out, all_cells, saved;  // float32 (N, D H), the same or undefined, flat or undefined
  at::Tensor h, cell, seen;          // (D, B, H), (D, B, Hr), and h times the mask, where there is one
  std::vector<at::Tensor> product_x, product_h;  // (N, 4Hr), (B, 4Hr) of each direction; where nothing is saved
  std::vector<Floats> packed;

  ForwardWalk(const LayerNormLstmArgs& args, bool keep, bool with_cells);
  void walk(const Part& part, Barrier& barrier, float* scratch) const;

 private:
  void multiply(const Part& part, int64_t t, Range rows, Barrier& barrier, float* to, float* scratch) const;
  void finish(int64_t d, int64_t t, Range rows, float* product, float* scratch) const;
  float* product_at(int64_t d, int64_t t, int64_t row) const;
};

ForwardWalk::ForwardWalk(const LayerNormLstmArgs& args, bool keep, bool with_cells) : layer(args), save(keep) {
  const LstmShape& s = layer.shape;
  const auto floats = args.input.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  const at::Tensor input = dense_float(args.input).view({s.rows, s.inputs});
  h = dense_float(args.h0);
  if (h.is_alias_of(args.h0)) h = h.clone();  // it is overwritten step by step, as the copy of c0 is
  cell = copy_of_state(args.c0, s.units());
  if (layer.h_mask.defined()) seen = at::empty({s.directions, s.batch, s.hidden}, floats);
  out = at::empty({s.rows, s.directions * s.hidden}, floats);
  if (with_cells) all_cells = at::empty(out.sizes(), floats);
  if (save) saved = at::empty({layer.saved_floats()}, floats);
  // Of the input (0) or the hidden state (1), where it is to be saved.
  const auto saved_product = [&](int64_t which, int64_t d) {
    const int64_t count = s.rows * layer.columns();
    return saved.narrow(0, (which * s.directions + d) * count, count).view({s.rows, layer.columns()});
  };
  for (int64_t d = 0; d < s.directions; ++d) {
    const at::Tensor weight_x = layer.weight_x(args, d);
    if (layer.single_step()) {
      const at::Tensor left = layer.h_mask.defined() ? at::mul(h[d], layer.h_mask.select(1, d)) : h[d];
      product_x.push_back(gate_blocks(mm(input, weight_x.t()), s.hidden, 1));
      product_h.push_back(gate_blocks(mm(left, layer.weight_h(args, d).t()), s.hidden, 1));
      if (save) saved_product(0, d).copy_(product_x.back());
      if (save) saved_product(1, d).copy_(product_h.back());
      packed.emplace_back();
      continue;
    }
    const at::Tensor turned = gate_blocks(weight_x, s.hidden).t();
    if (save) {
      at::Tensor to = saved_product(0, d);
      mm_out(to, input, turned);
    } else {
      product_x.push_back(mm(input, turned));
      product_h.push_back(at::empty({s.batch, layer.columns()}, floats));
    }
    packed.push_back(pack_gates(layer.weight_h(args, d), s.hidden, LstmForm::panels));
  }
}

float* ForwardWalk::product_at(int64_t d, int64_t t, int64_t row) const {
  if (!save) return product_h[static_cast<size_t>(d)].data_ptr<float>() + row * layer.columns();
  return LayerNormParts(layer, saved.data_ptr<float>(), d).normal_h + layer.shape.row_of(t, row) * layer.columns();
}

// W_hh h_{t-1}, a share of its columns, for all rows of the part.
void ForwardWalk::multiply(
    const Part& part, int64_t t, Range rows, Barrier& barrier, float* to, float* scratch) const {
  const LstmShape& s = layer.shape;
  const int64_t d = part.direction, state = d * s.batch * s.hidden;
  const float* left = h.const_data_ptr<float>() + state;
  if (seen.defined()) {
    float* masked = seen.data_ptr<float>() + state;
    const Range mine = row_share(rows, part.member, part.members);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const float* mask = layer.mask(t, row, d);
      for (int64_t j = 0; j < s.hidden; ++j) masked[row * s.hidden + j] = left[row * s.hidden + j] * mask[j];
    }
    left = masked;
    barrier.wait();
  }
  LstmProduct p{};
  p.reading = weights_reading(s, LstmForm::panels);
  p.rows = rows.end - rows.begin;
  p.columns = p.out_row = layer.columns();
  p.depth = p.left_row = s.hidden;
  p.left = left + rows.begin * s.hidden;
  p.weight = packed[static_cast<size_t>(d)].get();
  p.out = to;
  lstm_kernels().product(p, share(s.units() / kUnits, part.member, part.members), scratch);
}

void ForwardWalk::finish(int64_t d, int64_t t, Range rows, float* product, float* scratch) const {
  const LstmShape& s = layer.shape;
  const int64_t units = s.units(), row = s.row_of(t, rows.begin), state = d * s.batch + rows.begin;
  LayerNormForwardStep step{};
  step.rows = rows.end - rows.begin;
  step.hidden = s.hidden;
  step.eps = static_cast<float>(layer.eps);
  step.weights = layer.directions[static_cast<size_t>(d)].pointers();
  step.zoneout_h = layer.hidden_zoneout(d, row);
  step.zoneout_c = layer.cell_zoneout(d, row);
  step.product_h = product;
  step.h = h.data_ptr<float>() + state * s.hidden;
  step.cell = cell.data_ptr<float>() + state * units;
  step.out_row = step.zoneout_row = s.directions * s.hidden;
  step.out = out.data_ptr<float>() + row * step.out_row + d * s.hidden;
  if (all_cells.defined()) step.all_cells = all_cells.data_ptr<float>() + row * step.out_row + d * s.hidden;
  step.save = save;
  if (save) {
    const LayerNormParts parts(layer, saved.data_ptr<float>(), d);
    step.product_x = parts.normal_x + row * 4 * units;
    step.saved = parts.rest_at(row, units);
  } else {
    step.product_x = product_x[static_cast<size_t>(d)].data_ptr<float>() + row * 4 * units;
  }
  layer_norm_lstm_kernels().forward(step, scratch);
}

// All steps of one part. Rows that begin later, or have ended, keep their state.
void ForwardWalk::walk(const Part& part, Barrier& barrier, float* scratch) const {
  const LstmShape& s = layer.shape;
  const int64_t d = part.direction;
  const Floats own_scratch(2 * s.units());
  for (int64_t i = 0; i < s.steps; ++i) {
    const int64_t t = d == 0 ? i : s.steps - 1 - i;
    const Range rows = layer.active(part.rows, t);
    if (rows.empty()) continue;
    if (!layer.single_step()) multiply(part, t, rows, barrier, product_at(d, t, rows.begin), scratch);
    barrier.wait();
    const Range mine = row_share(rows, part.member, part.members);
    if (!mine.empty()) finish(d, t, mine, product_at(d, t, mine.begin), own_scratch.get());
    barrier.wait();
  }
}

}  // namespace

LayerNormLstmForward layer_norm_lstm_forward_cpu(const LayerNormLstmArgs& args, bool save, bool all_cells) {
  const ForwardWalk walk(args, save, all_cells);
  const LstmShape& s = walk.layer.shape;
  run_parts(s, LstmForm::panels, [&](const Part& part, Barrier& barrier, float* scratch) {
    walk.walk(part, barrier, scratch);
  });

  const auto type = args.input.scalar_type();
  std::vector<int64_t> sizes(args.input.sizes().begin(), args.input.sizes().end());
  sizes.back() = s.directions * s.hidden;
  const at::Tensor cells = all_cells ? walk.all_cells.to(type).view(sizes) : at::empty({0}, args.input.options());
  const at::Tensor saved = save ? walk.saved : at::empty({0}, args.input.options().dtype(at::kFloat));
  return {walk.out.to(type).view(sizes), cells, walk.h.to(type),
          walk.cell.narrow(2, 0, s.hidden).to(type).contiguous(), saved};
}

}  // namespace fastattn
