// The forward of the CPU LSTM: packs the weights, walks over the steps. The arithmetic of a step is in lstm_tile.h.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <utility>

#include "kept_memory.h"
#include "lstm_layer.h"
#include "product.h"

namespace fastattn {

namespace {

// What one direction reads.
struct Direction {
  at::Tensor bias;  // (4H); (4Hr), block by block, for own_sums
  at::Tensor sums;  // W_ih x + b, where they come before the recurrence: of all steps (N, 4H), of some (rows, 4Hr)
  Floats weight_x, weight_h, projection;
  at::Tensor rows_x, rows_h;  // the weights themselves, for LstmForm::rows
};

// The step of the other threads before this one's.
struct OthersSteps {
  Barrier& barrier;
  std::optional<uint32_t> round{};  // in which this thread arrived, until it has waited for the others

  void arrive() {
    wait();  // a thread without units of its own read no state
    round = barrier.arrive();
  }
  void wait() {
    if (round) barrier.wait_for(*std::exchange(round, std::nullopt));
  }
};

struct ForwardLayer {
  LstmShape shape;
  LstmForm form;
  at::Tensor input, h0;     // operands: (N, I), (D, B, P); here and below the dimensions may be others, for a cell
  at::Tensor cell;          // float32 (D, B, Hr), a copy of c0 that becomes c_n step by step
  at::Tensor out, m;        // operands: (N, D P); (D, B, H) where there is a projection
  at::Tensor gates, cells;  // where they are saved
  Type gates_type;
  std::vector<Direction> directions;
  int64_t ahead = 0;  // steps whose sums are made at a time, block by block; 0: those of all steps, or of none
  bool save;

  ForwardLayer(const LstmArgs& args, const LstmShape& shape, bool keep);
  void run() const {
    run_parts(shape, form, [&](const Part& part, Barrier& barrier, float* scratch) { walk(part, barrier, scratch); });
  }

 private:
  void walk(const Part& part, Barrier& barrier, float* scratch) const;
  void own_sums(const Part& part, Range rows, int64_t to_row, float* scratch) const;
  void step(
      const Part& part, int64_t t, Range rows, int64_t sums_row, const void* h, int64_t h_row, OthersSteps& others,
      float* scratch) const;
  void project(const Part& part, int64_t t, Range rows, float* scratch) const;
};

// Whether W_ih x of many steps is one product before they are taken. It is where reading W_ih in each step costs more than
// writing and reading the sums: with few rows, or weights beyond the cache; where panels are preferred to other products,
// far beyond it: at 12 to 64 rows of 512 units, in each step takes 0.95 to 0.98 of the time, at 16 of 1,024 units 1.14.
bool input_product_first(const LstmShape& shape) {
  const int64_t most = preferred_panels() == Panels::none ? kCacheBytes : 8 * kCacheBytes;
  return shape.steps > 1 && (shape.batch < kRowsOfATile || weight_bytes(shape) > most);
}

// Rows of one product of the input: tiles of all heights fill them, and their sums stay in the caches until they are used.
constexpr int64_t kRowsOfSums = 192;

// Rows of a single step up to which packing the weights costs more than it gains.
constexpr int64_t kFewRows = 64;

// Whether it does for so many steps of a single row, where the weights are large. Layers of 512 or 1,024 units take as
// long with 33 steps on Zen 5, 0.73 to 0.91 of the time with 64 and 100; on Zen 4 as long with 2 to 8, 0.80 to 0.96 of it
// with 10 to 100. On Intel's processors packing gained nothing: 1.05 to 1.4 times the time for 100 to 10 steps.
bool few_steps(int64_t steps) {
  switch (preferred_panels()) {
    case Panels::most: return steps < 40;
    case Panels::large: return steps < 10;
    default: return true;
  }
}

LstmForm forward_form(const LstmShape& shape, const LstmArgs& args) {
  // Measured: from so many rows on splitting gains; weights from the third-level cache have half as many bytes again.
  const LstmForm form = lstm_form(shape, args, weight_bytes(shape) > kCacheBytes ? 48 : 32);
  const bool few = shape.steps == 1 ? shape.rows <= kFewRows
                                    : shape.batch == 1 && weight_bytes(shape) > kCacheBytes && few_steps(shape.steps);
  // In bfloat16 ten cells of 1,024 units with 8 rows take 11 ms as they are, 20 packed; of 512 units with 8 rows 2.6 and
  // 2.9, with 16 4.7 and 3.9. By AMX, where four rows at a time were not measured, as before.
  const bool fewest = shape.steps == 1 && shape.rows <= (form == LstmForm::tiles ? 4 : 8);
  return (form == LstmForm::panels && few) || (is_half(form) && fewest) ? LstmForm::rows : form;
}

ForwardLayer::ForwardLayer(const LstmArgs& args, const LstmShape& sizes, bool keep)
    : shape(sizes), form(forward_form(shape, args)), gates_type(lstm_type(args.input.scalar_type())), save(keep) {
  const LstmShape& s = shape;
  input = operand(args.input, form);
  h0 = operand(args.h0, form);
  cell = copy_of_state(args.c0, s.units());
  const auto floats = args.input.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  out = kept_empty({s.rows, s.directions * s.state}, is_half(form) ? args.input.options() : floats);
  if (s.projection) m = kept_empty({s.directions, s.batch, s.hidden}, floats);
  if (save) {
    gates = kept_empty({s.rows, s.directions, 4 * s.units()}, args.input.options());
    cells = kept_empty({s.rows, s.directions, s.units()}, floats);
  }
  // In bfloat16 reading W_ih costs half as much, and torch's product would round the sums.
  const bool first = is_half(form) ? s.steps > 1 && s.batch < kRowsOfATile : input_product_first(s);
  if (first && (is_half(form) || (form == LstmForm::panels && preferred_panels() != Panels::none)))
    ahead = std::min(s.steps, std::max<int64_t>(kRowsOfSums / std::max<int64_t>(s.batch, 1), 1));
  const auto as_it_is = [&](const at::Tensor& weight) {
    return s.batch <= lstm_kernels().most_half_rows ? weight.contiguous() : dense_float(weight);
  };
  for (int64_t d = 0; d < s.directions; ++d) {
    const at::Tensor* weight = args.weights.data() + d * s.weights_per_direction();
    Direction& one = directions.emplace_back();
    one.bias = s.biases ? at::add(dense_float(weight[2]), dense_float(weight[3])) : at::zeros({4 * s.hidden}, floats);
    if (s.projection) one.projection = pack_columns(weight[s.weights_per_direction() - 1].t(), LstmForm::panels);
    if (ahead > 0) {
      one.bias = gate_blocks(one.bias, s.hidden);
      one.sums = kept_empty({ahead * s.batch, 4 * s.units()}, floats);
    }
    if (ahead == 0 && first)
      one.sums = linear(input.view({s.rows, s.inputs}), dense_float(weight[0]), one.bias);
    else if (form == LstmForm::rows)
      one.rows_x = as_it_is(weight[0]);
    else
      one.weight_x = pack_gates(weight[0], s.hidden, form);
    if (form == LstmForm::rows)
      one.rows_h = as_it_is(weight[1]);
    else
      one.weight_h = pack_gates(weight[1], s.hidden, form);
  }
}

// W_ih x + b for the units of one part and rows of the input, to the row `to_row` of the sums.
void ForwardLayer::own_sums(const Part& part, Range rows, int64_t to_row, float* scratch) const {
  if (rows.empty()) return;
  const Direction& own = directions[static_cast<size_t>(part.direction)];
  LstmProduct p{};
  p.form = form;
  p.reading = weights_reading(shape, form);
  p.rows = rows.end - rows.begin;
  p.columns = p.out_row = 4 * shape.units();
  p.depth = p.left_row = shape.inputs;
  p.start = own.bias.const_data_ptr<float>();
  p.left = at_element(input, rows.begin * shape.inputs);
  p.weight = own.weight_x.get();
  p.out = own.sums.data_ptr<float>() + to_row * p.out_row;
  lstm_kernels().product(p, share(shape.units() / kUnits, part.member, part.members), scratch);
}

// `sums_row` is the row of the sums that belongs to the first one of step t.
void ForwardLayer::step(
    const Part& part, int64_t t, Range rows, int64_t sums_row, const void* h, int64_t h_row, OthersSteps& others,
    float* scratch) const {
  if (rows.empty()) return;
  const int64_t d = part.direction, units = shape.units(), row = shape.row_of(t, rows.begin);
  const Direction& own = directions[static_cast<size_t>(d)];
  LstmForwardStep s{};
  s.rows = rows.end - rows.begin;
  s.descending = t % 2 == 1;
  s.reading = weights_reading(shape, form);
  s.inputs = shape.inputs;
  s.hidden = shape.hidden;
  s.state = shape.state;
  if (own.sums.defined()) {
    s.sums_row = own.sums.size(1);
    s.sums = own.sums.const_data_ptr<float>() + (sums_row + rows.begin) * s.sums_row;
  }
  s.sums_gate = ahead > 0 ? kUnits : shape.hidden;
  s.sums_block = ahead > 0 ? kGateColumns : kUnits;
  s.form = form;
  s.input = at_element(input, row * shape.inputs);
  s.input_row = shape.inputs;
  s.weight_x = own.rows_x.defined() ? own.rows_x.const_data_ptr() : own.weight_x.get();
  s.bias = own.bias.const_data_ptr<float>();
  s.h = h;
  s.h_row = h_row;
  s.wait_for_h = [](void* whom) { static_cast<OthersSteps*>(whom)->wait(); };
  s.whom = &others;
  if (form == LstmForm::rows) s.weight_type = lstm_type(own.rows_h.scalar_type());
  s.weight_h = form == LstmForm::rows ? own.rows_h.const_data_ptr() : own.weight_h.get();
  s.cell = cell.data_ptr<float>() + (d * shape.batch + rows.begin) * units;
  s.cell_row = units;
  s.m = shape.projection ? at_element(m, (d * shape.batch + rows.begin) * shape.hidden)
                         : at_element(out, row * shape.directions * shape.state + d * shape.state);
  s.m_row = shape.projection ? shape.hidden : shape.directions * shape.state;
  s.gates_type = gates_type;
  if (save) {
    const int64_t saved = row * shape.directions + d;
    s.gates = at_element(gates, saved * 4 * units);
    s.gates_row = shape.directions * 4 * units;
    s.cells = cells.data_ptr<float>() + saved * units;
    s.cells_row = shape.directions * units;
  }
  lstm_kernels().forward(s, share(units / kUnits, part.member, part.members), scratch);
}

void ForwardLayer::project(const Part& part, int64_t t, Range rows, float* scratch) const {
  const int64_t d = part.direction, row = shape.row_of(t, rows.begin);
  LstmProduct p{};
  p.reading = weights_reading(shape, form);
  p.rows = rows.end - rows.begin;
  p.columns = shape.state;
  p.depth = p.left_row = shape.hidden;
  p.left = m.const_data_ptr<float>() + (d * shape.batch + rows.begin) * shape.hidden;
  p.weight = directions[static_cast<size_t>(d)].projection.get();
  p.out = out.data_ptr<float>() + row * shape.directions * shape.state + d * shape.state;
  p.out_row = shape.directions * shape.state;
  lstm_kernels().product(p, share(panels(shape.state), part.member, part.members), scratch);
}

// All steps of one part. The state of the step before is read from `out`; rows that begin here, from h0.
void ForwardLayer::walk(const Part& part, Barrier& barrier, float* scratch) const {
  const int64_t d = part.direction, out_row = shape.directions * shape.state;
  const bool whole = part.rows.begin == 0 && part.rows.end == shape.batch;
  const int64_t stride = whole ? ahead : std::min<int64_t>(ahead, 1);  // rows of one step follow one another
  int64_t there = 0, before = -1;  // rows of the step before, and that step
  int64_t sums_begin = 0;          // the row of the input whose sums come first
  OthersSteps others{barrier};
  for (int64_t i = 0; i < shape.steps; ++i) {
    const int64_t t = d == 0 ? i : shape.steps - 1 - i, active = shape.rows_at(t);
    if (stride > 0 && i % stride == 0) {
      const int64_t last = std::min(i + stride, shape.steps) - 1;
      const int64_t low = d == 0 ? i : shape.steps - 1 - last, high = d == 0 ? last : t;
      sums_begin = shape.row_of(low, 0);
      const int64_t end = shape.row_of(high + 1, 0);
      const Range rows = whole ? Range{sums_begin, end}
                               : Range{sums_begin + part.rows.begin, sums_begin + std::min(part.rows.end, active)};
      own_sums(part, rows, rows.begin - sums_begin, scratch);
    }
    const int64_t sums_row = shape.row_of(t, 0) - sums_begin;
    const Range going{part.rows.begin, std::min(part.rows.end, std::min(active, there))};
    const Range beginning{std::max(part.rows.begin, there), std::min(part.rows.end, active)};
    if (!going.empty()) {
      const int64_t row = shape.row_of(before, going.begin);
      step(part, t, going, sums_row, at_element(out, row * out_row + d * shape.state), out_row, others, scratch);
    }
    if (!beginning.empty()) {
      const void* h = at_element(h0, (d * shape.batch + beginning.begin) * shape.state);
      step(part, t, beginning, sums_row, h, shape.state, others, scratch);
    }
    const Range rows{part.rows.begin, std::min(part.rows.end, active)};
    if (shape.projection && !rows.empty()) {
      others.wait();
      barrier.wait();
      project(part, t, rows, scratch);
    }
    if (!rows.empty() && i + 1 < shape.steps) others.arrive();
    there = active;
    before = t;
  }
}

}  // namespace

LstmForward lstm_forward_cpu(const LstmArgs& args, bool save) {
  const LstmShape s = cpu_shape(args);
  const ForwardLayer layer(args, s, save);
  layer.run();

  const auto type = args.input.scalar_type();
  at::Tensor h_n = at::empty_like(layer.h0);
  // The last state of row b: at its last step forwards, at step 0 backwards.
  for (int64_t d = 0; d < s.directions; ++d) {
    const at::Tensor states = layer.out.narrow(1, d * s.state, s.state);
    if (s.steps == 0) {
      h_n[d].copy_(layer.h0[d]);
    } else if (d == 1) {
      h_n[d].copy_(states.narrow(0, 0, s.batch));
    } else {
      for (int64_t t = s.steps - 1, done = 0; t >= 0 && done < s.batch; --t) {
        const int64_t active = s.rows_at(t);
        if (active == done) continue;
        h_n[d].narrow(0, done, active - done)
            .copy_(states.narrow(0, s.row_of(t, done), active - done));
        done = active;
      }
    }
  }
  std::vector<int64_t> sizes(args.input.sizes().begin(), args.input.sizes().end());
  sizes.back() = s.directions * s.state;
  const auto saved = [&](const at::Tensor& tensor, at::ScalarType dtype) {
    return save ? tensor : at::empty({0}, args.input.options().dtype(dtype));
  };
  return {as_type(layer.out, type).view(sizes), as_type(h_n, type), unpadded_state(layer.cell, s.hidden, type),
          saved(layer.gates, type), saved(layer.cells, at::kFloat)};
}

LstmCellForward lstm_cell_forward_cpu(const LstmArgs& args, bool save) {
  const LstmShape s = cpu_shape(args, true);
  const ForwardLayer layer(args, s, save);
  layer.run();
  const auto type = args.input.scalar_type();
  return {as_type(layer.out, type), unpadded_state(layer.cell, s.hidden, type), layer.gates, layer.cells};
}

}  // namespace fastattn
