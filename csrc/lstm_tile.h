// One step of the LSTM for some rows and some blocks of units. Part of kernels.inc.h.
//
// The recurrent product of a block is one panel of 64 columns, which hold the four gates of its 16 units: its sums stay
// in the first-level cache until they have become a new state. The equations stand in lstm.h and lstm_cell.h.

// 1 / (1 + exp(-x)); what would be below the smallest normal number is about that.
static inline vec sigmoid(vec x) { return reciprocal(1.0f + exp(x < -87.0f ? splat(87.0f) : -x)); }

#define FASTATTN_INLINE static inline
#include "lstm_cell.h"
#undef FASTATTN_INLINE

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

// The sums of rows [row, row + rows) for one block, to the scratch (rows, 64).
static void lstm_sums(const LstmForwardStep& s, int64_t row, int64_t rows, int64_t block, float* sums) {
  const float* first = s.sums ? s.sums + row * s.sums_row : s.bias;
  const int64_t step = s.sums ? s.sums_row : 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < kGateColumns; j += kLanes)
      store(sums + r * kGateColumns + j, load(first + r * step + block * kGateColumns + j));
  if (!s.sums)
    gemm(rows, kGateColumns, s.inputs, {s.input + row * s.input_row, s.input_row, 1},
         s.weight_x + block * s.inputs * kGateColumns, kGateColumns, sums, kGateColumns, true);
  gemm(rows, kGateColumns, s.state, {s.h + row * s.h_row, s.h_row, 1}, s.weight_h + block * s.state * kGateColumns,
       kGateColumns, sums, kGateColumns, true);
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
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        lstm_sums(s, row, rows, block, scratch);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t unit = 0; unit < kUnits; unit += kLanes)
            lstm_units(s, row + r, block * kUnits + unit, scratch + r * kGateColumns, (T*)s.gates);
      }
    }
  });
}

// start + start2 + left * weight for rows [row, row + rows) and one panel, to the scratch (rows, 64). Columns that do not
// exist are zero, up to the next multiple of kPad.
template <class S>
static void lstm_product_tile(
    const S& s, int64_t columns, int64_t row, int64_t rows, int64_t panel, float* out) {
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
    gemm(rows, round_up(here, kPad), s.depth, {s.left + row * s.left_row, s.left_row, 1},
         s.weight + panel * s.depth * kGateColumns, kGateColumns, out, kGateColumns, true);
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
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        lstm_product_tile(s, s.hidden, row, rows, panel, scratch);
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
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      lstm_product_tile(s, s.columns, row, rows, panel, scratch);
      const int64_t first = panel * kGateColumns, here = min(kGateColumns, s.columns - first);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < here; j += kLanes)
          store_lanes(s.out + (row + r) * s.out_row + first + j, load(scratch + r * kGateColumns + j), here - j);
    }
  }
}

static const LstmKernels lstm_table = {lstm_pack_gates, lstm_forward, lstm_backward, lstm_product};
