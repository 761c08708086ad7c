// One step of the LSTM for some rows and some blocks of units. Part of kernels.inc.h.
//
// The recurrent product of a block is one panel of 64 columns, which hold the four gates of its 16 units: its sums stay
// in the first-level cache until they have become a new state. The equations stand in lstm.h and lstm_cell.h.

// 1 / (1 + exp(-x)); what would be below the smallest normal number is about that.
static inline vec sigmoid(vec x) { return reciprocal(1.0f + exp(x < -87.0f ? splat(87.0f) : -x)); }

#define FASTATTN_INLINE static inline
#include "lstm_cell.h"
#undef FASTATTN_INLINE

// Lanes [0, count) of a vector; the others are neither read nor written, and read as zero.
static inline vec load_lanes(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}

static inline void store_lanes(float* p, vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

static void lstm_pack_gates(
    const float* weight, int64_t row, int64_t hidden, int64_t depth, int64_t block, float* panel) {
  for (int64_t gate = 0; gate < 4; ++gate)
    for (int64_t unit = 0; unit < kUnits; unit += kLanes) {
      const int64_t first = block * kUnits + unit, there = min(kLanes, hidden - first);
      const float* from = weight + (gate * hidden + first) * row;
      float* to = panel + gate * kUnits + unit;
      for (int64_t k = 0; k < depth; k += kLanes) {
        const int64_t here = min(kLanes, depth - k);
        vec square[kLanes];
        if (there == kLanes && here == kLanes) {
          for (int i = 0; i < kLanes; ++i) square[i] = load(from + i * row + k);
        } else {
          float part[kLanes][kLanes] = {};
          for (int64_t i = 0; i < there; ++i)
            for (int64_t j = 0; j < here; ++j) part[i][j] = from[i * row + k + j];
          for (int i = 0; i < kLanes; ++i) square[i] = load(part[i]);
        }
        transpose(square);
        for (int64_t j = 0; j < here; ++j) store(to + (k + j) * kGateColumns, square[j]);
      }
    }
}

// kLanes saved gates.
template <class T>
static inline vec load_gates(const T* p) {
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = to_float(p[i]);
  return load(wide);
}
static inline vec load_gates(const float* p) { return load(p); }

template <class T>
static inline void store_gates(T* p, vec v) {
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
}
static inline void store_gates(float* p, vec v) { store(p, v); }

// A null pointer stays null.
template <class T>
static inline T* offset(T* p, int64_t by) {
  return p ? p + by : nullptr;
}

// Adds to sums[gate * 16 + u] the product of `left` (K) with the row of W (4H, K) that holds that gate of unit u, for
// kLanes / 4 units: dot products along the lanes, turned round at the end. `count` of the units exist.
static inline void lstm_dots(
    int64_t depth, const float* left, const float* weight, int64_t gate_step, int64_t count, float* sums) {
  constexpr int units = kLanes / 4;
  const float* rows[kLanes];
  for (int gate = 0; gate < 4; ++gate)
    for (int u = 0; u < units; ++u)  // one that does not exist repeats the last one, and goes nowhere
      rows[gate * units + u] = weight + gate * gate_step + min(u, count - 1) * depth;
  vec dots[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    const vec l = load(left + k);
    for (int j = 0; j < kLanes; ++j) dots[j] += l * load(rows[j] + k);
  }
  if (k < depth) {
    const vec l = load_lanes(left + k, depth - k);
    for (int j = 0; j < kLanes; ++j) dots[j] += l * load_lanes(rows[j] + k, depth - k);
  }
  transpose(dots);
  for (int i = 1; i < kLanes; ++i) dots[0] += dots[i];
  for (int gate = 0; gate < 4; ++gate)
    for (int u = 0; u < min(units, count); ++u) sums[gate * kUnits + u] += dots[0][gate * units + u];
}

// Rows below which dot products along the rows of W beat packing a block of it into a panel.
constexpr int64_t kRowsWorthPacking = 12;

// sums (rows, 64) += left times the gates of one block, from W (4H, K) as it is; `panel` is scratch for (K, 64).
static void lstm_rows_of_weight(
    int64_t rows, int64_t depth, Matrix left, const float* weight, int64_t hidden, int64_t block, float* sums,
    float* panel) {
  if (rows >= kRowsWorthPacking) {
    lstm_pack_gates(weight, depth, hidden, depth, block, panel);
    return gemm(rows, kGateColumns, depth, left, panel, kGateColumns, sums, kGateColumns, true);
  }
  const int64_t first = block * kUnits, there = min(kUnits, hidden - first);
  for (int64_t unit = 0; unit < there; unit += kLanes / 4)
    for (int64_t row = 0; row < rows; ++row)
      lstm_dots(
          depth, left.data + row * left.row, weight + (first + unit) * depth, hidden * depth, there - unit,
          sums + row * kGateColumns + unit);
}

// The left operands of the products, copied for a group of rows: rows a multiple of 4 kB apart would fall into the same
// sets of the first-level cache and throw one another out.
static inline Matrix lstm_left(const float* from, int64_t from_row, int64_t rows, int64_t depth, float* to) {
  const int64_t row = round_up(depth, kPad) + kPad;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) store(to + r * row + k, load(from + r * from_row + k));
    for (; k < depth; ++k) to[r * row + k] = from[r * from_row + k];
  }
  return {to, row, 1};
}

// The sums of rows [row, row + rows) for one block, to the scratch (rows, 64).
static void lstm_sums(
    const LstmForwardStep& s, int64_t row, int64_t rows, int64_t block, Matrix input, Matrix h, float* sums,
    float* panel) {
  const float* first = s.sums ? s.sums + row * s.sums_row : s.bias;
  const int64_t step = s.sums ? s.sums_row : 0, unit = block * kUnits;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t gate = 0; gate < 4; ++gate)
      for (int64_t j = 0; j < kUnits; j += kLanes)
        store(sums + r * kGateColumns + gate * kUnits + j,
              load_lanes(first + r * step + gate * s.hidden + unit + j, s.hidden - unit - j));
  if (s.by_rows) {
    lstm_rows_of_weight(rows, s.inputs, input, s.weight_x, s.hidden, block, sums, panel);
    return lstm_rows_of_weight(rows, s.state, h, s.weight_h, s.hidden, block, sums, panel);
  }
  if (!s.sums)
    gemm<true>(rows, kGateColumns, s.inputs, input, s.weight_x + block * s.inputs * kGateColumns, kGateColumns, sums,
         kGateColumns, true);
  gemm<true>(rows, kGateColumns, s.state, h, s.weight_h + block * s.state * kGateColumns, kGateColumns, sums, kGateColumns,
       true);
}

// From the sums to the new states of kLanes units of one row; `unit` counts them.
template <class T>
static inline void lstm_units(const LstmForwardStep& s, int64_t row, int64_t unit, const float* sums, T* gates_out) {
  const int64_t within = unit % kUnits;
  const float* from = sums + within;
  const Gates<vec> gates =
      lstm_activate(load(from), load(from + kUnits), load(from + 2 * kUnits), load(from + 3 * kUnits));
  float* cell = s.cell + row * s.cell_row + unit;
  const vec state = lstm_cell_state(gates, load(cell));
  store(cell, state);
  if (s.cells) store(s.cells + row * s.cells_row + unit, state);
  store_lanes(s.m + row * s.m_row + unit, gates.o * tanh(state), s.hidden - unit);
  if (gates_out) {
    T* to = gates_out + row * s.gates_row + (unit - within) * 4 + within;
    store_gates(to, gates.i);
    store_gates(to + kUnits, gates.f);
    store_gates(to + 2 * kUnits, gates.g);
    store_gates(to + 3 * kUnits, gates.o);
  }
}

static void lstm_forward(const LstmForwardStep& s, Range blocks, float* scratch) {
  with_float_type(s.gates_type, [&](auto* type) {
    using T = __typeof__(*type);
    for (int64_t row = 0; row < s.rows; row += kLstmRows) {
      const int64_t rows = min(kLstmRows, s.rows - row);
      float* left = scratch + kLstmRows * kGateColumns;
      const Matrix h = lstm_left(s.h + row * s.h_row, s.h_row, rows, s.state, left);
      const Matrix input = s.sums ? h
          : lstm_left(s.input + row * s.input_row, s.input_row, rows, s.inputs, left + rows * h.row);
      float* panel = left + rows * (h.row + input.row);
      for (int64_t i = blocks.begin; i < blocks.end; ++i) {
        const int64_t block = s.descending ? blocks.end - 1 - (i - blocks.begin) : i;
        lstm_sums(s, row, rows, block, input, h, scratch, panel);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t unit = 0; unit < kUnits; unit += kLanes)
            lstm_units(s, row + r, block * kUnits + unit, scratch + r * kGateColumns, (T*)s.gates);
      }
    }
  });
}

template <class S>
static inline Matrix lstm_left_of(const S& s, int64_t row, int64_t rows, float* scratch) {
  if (!s.left) return {};
  return lstm_left(s.left + row * s.left_row, s.left_row, rows, s.depth, scratch + kLstmRows * kGateColumns);
}

// start + start2 + left * weight for rows [row, row + rows) and one panel, to the scratch (rows, 64). Columns that do not
// exist are zero, up to the next multiple of kPad.
template <class S>
static void lstm_product_tile(
    const S& s, int64_t columns, Matrix left, int64_t row, int64_t rows, int64_t panel, float* out) {
  const int64_t first = panel * kGateColumns, here = min(kGateColumns, columns - first);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * kGateColumns;
    const float* start = offset(s.start, (row + r) * s.start_row + first);
    const float* start2 = offset(s.start2, (row + r) * s.start2_row + first);
    for (int64_t j = 0; j < round_up(here, kPad); j += kLanes) {
      vec sum{};
      if (start && j < here) sum += load_lanes(start + j, here - j);
      if (start2 && j < here) sum += load_lanes(start2 + j, here - j);
      store(to + j, sum);
    }
  }
  if (s.left)
    gemm<true>(rows, round_up(here, kPad), s.depth, left, s.weight + panel * s.depth * kGateColumns, kGateColumns, out,
         kGateColumns, true);
}

template <class T>
static inline void lstm_units_backward(const LstmBackwardStep& s, int64_t row, int64_t unit, vec dm) {
  const int64_t within = unit % kUnits, column = (unit - within) * 4 + within;
  const T* saved = (const T*)s.gates + row * s.gates_row + column;
  const Gates<vec> gates{load_gates(saved), load_gates(saved + kUnits), load_gates(saved + 2 * kUnits),
                         load_gates(saved + 3 * kUnits)};
  const vec tanh_c = tanh(load(s.cells + row * s.cells_row + unit));
  float* dcell = s.dcell + row * s.dcell_row + unit;
  const CellGradient<vec> grad =
      lstm_cell_gradient(gates, load(s.previous + row * s.previous_row + unit), tanh_c, dm, load(dcell));
  store(dcell, grad.previous);
  float* to = s.dsums + row * s.dsums_row + column;
  store(to, grad.gates.i);
  store(to + kUnits, grad.gates.f);
  store(to + 2 * kUnits, grad.gates.g);
  store(to + 3 * kUnits, grad.gates.o);
  if (s.m) store_lanes(s.m + row * s.m_row + unit, gates.o * tanh_c, s.hidden - unit);
}

static void lstm_backward(const LstmBackwardStep& s, Range panels, float* scratch) {
  with_float_type(s.gates_type, [&](auto* type) {
    using T = __typeof__(*type);
    for (int64_t row = 0; row < s.rows; row += kLstmRows) {
      const int64_t rows = min(kLstmRows, s.rows - row);
      const Matrix left = lstm_left_of(s, row, rows, scratch);
      for (int64_t i = panels.begin; i < panels.end; ++i) {
        const int64_t panel = s.descending ? panels.end - 1 - (i - panels.begin) : i;
        lstm_product_tile(s, s.hidden, left, row, rows, panel, scratch);
        const int64_t first = panel * kGateColumns, here = min(kGateColumns, round_up(s.hidden, kUnits) - first);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < here; j += kLanes)
            lstm_units_backward<T>(s, row + r, first + j, load(scratch + r * kGateColumns + j));
      }
    }
  });
}

static void lstm_product(const LstmProduct& s, Range panels, float* scratch) {
  for (int64_t row = 0; row < s.rows; row += kLstmRows) {
    const int64_t rows = min(kLstmRows, s.rows - row);
    const Matrix left = lstm_left_of(s, row, rows, scratch);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      lstm_product_tile(s, s.columns, left, row, rows, panel, scratch);
      const int64_t first = panel * kGateColumns, here = min(kGateColumns, s.columns - first);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < here; j += kLanes)
          store_lanes(s.out + (row + r) * s.out_row + first + j, load(scratch + r * kGateColumns + j), here - j);
    }
  }
}

static const LstmKernels lstm_table = {lstm_pack_gates, lstm_forward, lstm_backward, lstm_product};
