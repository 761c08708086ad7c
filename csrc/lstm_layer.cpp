#include "lstm_layer.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "split.h"

namespace fastattn {

at::Tensor dense_float(const at::Tensor& tensor) { return as_type(tensor, at::kFloat).contiguous(); }

Type lstm_type(at::ScalarType type) {
  return type == at::kHalf ? Type::half : type == at::kBFloat16 ? Type::bfloat16 : Type::single;
}

// f(index) for every index below `count`, on all threads where that is worth it.
template <class F>
static void for_each(int64_t count, bool many, F f) {
  run_team(many ? std::min<int64_t>(count, at::get_num_threads()) : 1, [&](int64_t member, int64_t members) {
    const Range mine = share(count, member, members);
    for (int64_t i = mine.begin; i < mine.end; ++i) f(i);
  });
}

// Numbers to copy that are worth waking threads for.
constexpr int64_t kManyNumbers = 1 << 17;

LstmShape cpu_shape(const LstmArgs& args, bool cell) {
  TORCH_CHECK_VALUE(args.input.device().is_cpu(), "input: got device ", args.input.device(), ", expected the CPU");
  return cell ? lstm_cell_shape(args) : lstm_shape(args);
}

// Whether the products among the steps may be split: their inputs can. What h and the gradients become stays within the
// range: h is below 1 before a projection.
static bool splits_steps(const LstmArgs& args, at::TensorList more) {
  const auto fits = [](const at::Tensor& t) { return t.dim() == 1 || splits(dense_float(t)); };
  return fits(args.input) && fits(args.h0) && std::all_of(args.weights.begin(), args.weights.end(), fits) &&
         std::all_of(more.begin(), more.end(), fits);
}

LstmForm lstm_form(const LstmShape& shape, const LstmArgs& args, int64_t least_rows, at::TensorList gradients) {
  if (args.input.scalar_type() == at::kBFloat16 && !shape.projection) return lstm_bf16();
  const bool worthwhile = has_split_products() && shape.steps > 1 && shape.hidden >= kSplitBlock &&
                          shape.rows >= shape.steps * least_rows;
  return worthwhile && splits_steps(args, gradients) ? LstmForm::split : LstmForm::panels;
}

// Panels of two blocks of a right operand: pack(half, to) for each half of a block.
template <class Pack>
static Floats pack_right(int64_t count, int64_t depth, Pack pack) {
  Floats packed(count * split_block(depth));
  uint16_t* to = reinterpret_cast<uint16_t*>(packed.get());
  for_each(count, count * split_block(depth) > kManyNumbers, [&](int64_t panel) {
    for (int64_t half = panel * 4; half < panel * 4 + 4; ++half) pack(half, to + split_half(half, depth));
  });
  return packed;
}

Floats pack_gates(const at::Tensor& weight, int64_t hidden, LstmForm form) {
  const at::Tensor dense = operand(weight, form);
  const int64_t depth = dense.size(1), blocks = (hidden + kUnits - 1) / kUnits;
  if (form == LstmForm::split)  // half a block is one gate
    return pack_right(blocks, depth, [&](int64_t half, uint16_t* to) {
      const float* gate = dense.const_data_ptr<float>() + half % 4 * hidden * depth;
      split_kernels().pack_right({gate, hidden, depth, depth, 1}, half / 4, to);
    });
  const LstmKernels& kernels = lstm_kernels();
  if (is_half(form)) {
    const int64_t panel = lstm_bf16_panel(depth);
    Floats packed(blocks * panel / 2);
    for_each(blocks, blocks * panel > kManyNumbers, [&](int64_t block) {
      kernels.pack_gates_bf16(dense.const_data_ptr(), hidden, depth, block, packed + block * panel / 2);
    });
    return packed;
  }
  const float* from = dense.const_data_ptr<float>();
  Floats packed(blocks * depth * kGateColumns);
  for_each(blocks, blocks * depth * kGateColumns > kManyNumbers, [&](int64_t block) {
    kernels.pack_gates(from, depth, hidden, depth, block, packed + block * depth * kGateColumns);
  });
  return packed;
}

Floats pack_columns(const at::Tensor& matrix, LstmForm form) {
  const at::Tensor dense = operand(matrix, form);
  const int64_t depth = dense.size(0), columns = dense.size(1), count = panels(columns);
  if (form == LstmForm::split)
    return pack_right(count, depth, [&](int64_t half, uint16_t* to) {
      split_kernels().pack_right({dense.const_data_ptr<float>(), columns, depth, 1, columns}, half, to);
    });
  if (is_half(form)) {
    const int64_t panel = lstm_bf16_panel(depth);
    Floats packed(count * panel / 2);
    for_each(count, count * panel > kManyNumbers, [&](int64_t index) {
      lstm_kernels().pack_columns_bf16(dense.const_data_ptr(), depth, columns, index, packed + index * panel / 2);
    });
    return packed;
  }
  const Operand turned{dense.const_data_ptr<float>(), columns, depth, 1, columns};
  Floats packed(count * depth * kGateColumns);
  for_each(count, count * depth * kGateColumns > kManyNumbers, [&](int64_t panel) {
    panel_kernels().pack(turned, panel, packed + panel * depth * kGateColumns);
  });
  return packed;
}

at::Tensor gate_blocks(const at::Tensor& gates, int64_t hidden, int64_t dim) {
  const int64_t units = round_up(hidden, kUnits);
  std::vector<int64_t> sizes = gates.sizes().vec();
  const int64_t rows = dim == 1 ? sizes[0] : 1, columns = dim == 0 && sizes.size() == 2 ? sizes[1] : 1;
  at::Tensor each = gates.contiguous().view({rows, 4, hidden, columns});
  if (units != hidden) each = at::constant_pad_nd(each, {0, 0, 0, units - hidden});
  sizes[static_cast<size_t>(dim)] = 4 * units;
  return each.view({rows, 4, units / kUnits, kUnits, columns}).transpose(1, 2).reshape(sizes);
}

at::Tensor from_gate_blocks(const at::Tensor& blocks, int64_t hidden, int64_t dim) {
  const int64_t units = round_up(hidden, kUnits);
  std::vector<int64_t> sizes = blocks.sizes().vec();
  const int64_t rows = dim == 1 ? sizes[0] : 1, columns = dim == 0 && sizes.size() == 2 ? sizes[1] : 1;
  const at::Tensor each = blocks.view({rows, units / kUnits, 4, kUnits, columns}).transpose(1, 2);
  sizes[static_cast<size_t>(dim)] = 4 * hidden;
  return each.reshape({rows, 4, units, columns}).narrow(2, 0, hidden).reshape(sizes);
}

at::Tensor padded_state(const at::Tensor& state, int64_t units) {
  const at::Tensor dense = dense_float(state);
  return state.size(-1) == units ? dense : at::constant_pad_nd(dense, {0, units - state.size(-1)});
}

at::Tensor copy_of_state(const at::Tensor& state, int64_t units) {
  const at::Tensor padded = padded_state(state, units);
  if (!padded.is_same(state)) return padded;
  at::Tensor copy = at::empty(padded.sizes(), padded.options());
  if (copy.numel() > 0) std::memcpy(copy.data_ptr(), padded.const_data_ptr(), copy.nbytes());
  return copy;
}

at::Tensor unpadded_state(const at::Tensor& padded, int64_t hidden, at::ScalarType type) {
  return as_type(padded.size(-1) == hidden ? padded : padded.narrow(-1, 0, hidden), type).contiguous();
}

at::Tensor states_before(const LstmShape& shape, int64_t d, const at::Tensor& out, const at::Tensor& h0) {
  at::Tensor states = kept_empty({shape.rows, shape.state}, out.options());
  const int64_t out_row = shape.directions * shape.state;
  const size_t bytes = static_cast<size_t>(shape.state) * states.element_size();
  for_each(shape.steps, states.numel() > kManyNumbers, [&](int64_t t) {
    const int64_t before = d == 0 ? t - 1 : t + 1, with_before = shape.rows_at(before);
    for (int64_t row = 0; row < shape.rows_at(t); ++row)
      std::memcpy(
          at_element(states, shape.row_of(t, row) * shape.state),
          row < with_before ? at_element(out, shape.row_of(before, row) * out_row + d * shape.state)
                            : at_element(h0, (d * shape.batch + row) * shape.state),
          bytes);
  });
  return states;
}

bool worth_a_team(const LstmShape& shape) {
  return shape.rows * shape.directions * 4 * shape.hidden * (shape.inputs + shape.state) > (1 << 19);
}

// Where to cut the batch so that each of `count` groups has about as many steps.
static std::vector<int64_t> row_cuts(const LstmShape& shape, int64_t count) {
  std::vector<int64_t> cuts{0};
  if (!shape.packed) {
    for (int64_t i = 1; i <= count; ++i) cuts.push_back(shape.batch * i / count);
    return cuts;
  }
  int64_t before = 0, step = shape.steps;
  for (int64_t row = 0; row < shape.batch && static_cast<int64_t>(cuts.size()) < count; ++row) {
    while (step > 0 && shape.rows_at(step - 1) <= row) --step;  // the length of this row
    before += step;
    if (before * count >= shape.rows * static_cast<int64_t>(cuts.size())) cuts.push_back(row + 1);
  }
  while (static_cast<int64_t>(cuts.size()) < count) cuts.push_back(shape.batch);
  cuts.push_back(shape.batch);
  return cuts;
}

std::vector<Part> lstm_parts(const LstmShape& shape, LstmForm form, int64_t threads) {
  std::vector<Part> parts;
  int64_t group = 0;
  // Weights that fit into a second-level cache may be read by every group; larger ones come from the third level at each
  // step, which only many rows are worth.
  const int64_t rows_of_a_tile = form == LstmForm::split ? kSplitBlock : kRowsOfATile;
  const int64_t least_rows = weight_bytes(shape) > kCacheBytes / 2 ? kRowsWorthWeights : rows_of_a_tile;
  // Two directions run at the same time, unless the weights of one fit into the second-level caches of all threads only,
  // or those of both take much of the third level: there, one after the other, each thread reads half of them in a step.
  // With 32 MB of it that takes 0.95 of the time for 640 units, for 1,024 of them 0.64 with one row, 0.82 with eight.
  const int64_t recurrent_bytes = 4 * shape.hidden * shape.state * (is_half(form) ? 2 : 4);
  const bool side_by_side =
      threads >= shape.directions && (recurrent_bytes * shape.directions <= kCacheBytes * threads / 2 ||
                                      (recurrent_bytes > kCacheBytes * threads &&
                                       recurrent_bytes * shape.directions <= third_level_bytes() / 3));
  for (int64_t d = 0; d < shape.directions; ++d) {
    const Range mine = side_by_side ? share(threads, d, shape.directions) : Range{0, threads};
    const int64_t count = mine.end - mine.begin;
    int64_t groups = 1;
    for (int64_t g = 2; g <= count; ++g)
      if (count % g == 0 && shape.batch >= g * least_rows) groups = g;
    const std::vector<int64_t> cuts = row_cuts(shape, groups);
    for (int64_t g = 0; g < groups; ++g, ++group)
      for (int64_t member = 0; member < count / groups; ++member)
        parts.push_back(
            {d, {cuts[static_cast<size_t>(g)], cuts[static_cast<size_t>(g + 1)]}, member, count / groups, group});
  }
  return parts;
}

#if defined(__x86_64__)
FlushDenormals::FlushDenormals() : saved_(_mm_getcsr()) {
  constexpr uint32_t flush_results = 1u << 15, zero_operands = 1u << 6;
  _mm_setcsr(saved_ | flush_results | zero_operands);
}
FlushDenormals::~FlushDenormals() { _mm_setcsr(saved_); }
#else
FlushDenormals::FlushDenormals() = default;
FlushDenormals::~FlushDenormals() = default;
#endif

}  // namespace fastattn
