// One step of the LSTM for some rows and some blocks of units. Part of kernels.inc.h.
//
// The recurrent product of a block is one panel of 64 columns, which hold the four gates of its 16 units: its sums stay
// in the first-level cache until they have become a new state. The equations stand in lstm.h and lstm_cell.h.

#define FASTATTN_INLINE static inline
#include "lstm_cell.h"
#undef FASTATTN_INLINE

static void lstm_pack_gates(
    const float* weight, int64_t row, int64_t hidden, int64_t depth, int64_t block, float* panel) {
  const int64_t first = block * kUnits;
  for (int64_t gate = 0; gate < 4; ++gate)
    pack_turned(weight + (gate * hidden + first) * row, row, hidden - first, depth, kUnits, panel + gate * kUnits);
}

// Calls f with a null pointer of the saved type.
template <class F>
static inline void with_saved_type(Type type, F f) {
  switch (type) {
    case Type::half: return f((Half*)nullptr);
    case Type::bfloat16: return f((BFloat16*)nullptr);
    default: return f((float*)nullptr);
  }
}

static inline void store_lanes(BFloat16* p, vec v, int64_t count) {
  if (count >= kLanes) return store_as(p, v);
  for (int64_t i = 0; i < count; ++i) from_float(v[i], p + i);
}

// The left operand of a product, copied for a group of rows unless those are spread already: see kSpread.
struct LstmLeft {
  const void* data = nullptr;
  int64_t row = 0;
};

#include "lstm_bf16.h"

// `to` is scratch, and is moved behind what is taken.
static inline LstmLeft lstm_left(
    LstmForm form, const void* from, int64_t from_row, int64_t first, int64_t rows, int64_t depth, bool spread,
    float*& to) {
  if (is_half(form)) {
    const LstmLeft left = lstm_left_bf16(form, (const BFloat16*)from + first * from_row, from_row, rows, depth, to);
    if (left.data == to) to += round_up(rows, kTileRows) * left.row / 2;
    return left;
  }
  if (form == LstmForm::split) {
    const LstmLeft left{to, 0};
    const Operand operand{(const float*)from + first * from_row, rows, depth, from_row, 1};
    for (int64_t half = 0; half * 16 < rows; ++half)
      split_pack<true>(operand, half, (uint16_t*)to + split_half(half, depth));
    to += split_blocks(rows) * split_block(depth) / 2;
    return left;
  }
  if (spread) return {(const float*)from + first * from_row, from_row};
  const int64_t row = round_up(depth, kPad) + kSpread;
  copy_tile((const float*)from + first * from_row, from_row, rows, depth, nullptr, to, row);
  const LstmLeft left{to, row};
  to += rows * row;
  return left;
}

// sums (rows, 64) = or += left (rows, depth) times one panel of the weights; `columns` of it, a multiple of kPad, are
// there.
static void lstm_multiply(
    LstmForm form, Reading reading, int64_t rows, int64_t columns, int64_t depth, LstmLeft left, const void* weight,
    int64_t panel, float* sums, bool add) {
  if (is_half(form)) {
    const BFloat16* from = (const BFloat16*)weight + panel * lstm_bf16_panel(depth);
    return lstm_multiply_bf16(form, reading, rows, left, depth, from, sums, add);
  }
  if (form == LstmForm::split) {
    const uint16_t* from = (const uint16_t*)weight + panel * 2 * split_block(depth);
    return split_gemm(
        {rows, columns, depth, (const uint16_t*)left.data, from, sums, kGateColumns}, add);
  }
  gemm(reading, rows, columns, depth, {(const float*)left.data, left.row, 1},
       (const float*)weight + panel * depth * kGateColumns, kGateColumns, sums, kGateColumns, add);
}

// One of the products of a step where W (4H, K) is read as it is.
struct LstmRowsOperand {
  LstmLeft left;
  const void* weight;
  int64_t depth;
};

// Units whose rows of W, of one gate, are read at a time, and rows of the left operand that share them.
constexpr int kDotUnits = kLanes / 4, kDotRows = 4;

// sums[row][gate][u] = the sum of the products of `left` with the rows of W that hold that gate of unit u, for ROWS rows
// and kDotUnits units from `first` on, `there` of which exist: dot products along the lanes, added up at the end. Asking
// for the rows of W that follow, of the next gate, takes 0.92 to 0.95 of the time for one row and 512 units.
//
// Not inlined: among its callers' variables GCC 12 keeps the sums in memory.
template <int ROWS, class T>
__attribute__((noinline)) static void lstm_dots(
    const LstmRowsOperand* operands, int64_t count, int64_t row, int64_t hidden, int64_t first, int64_t there,
    float* sums) {
  constexpr int gates = kDotRows / ROWS;  // whose sums are added up together, as they fill a square
  constexpr int parts = kDotRows / ROWS;  // enough sums for the latency of one, whatever the rows
  for (int gate = 0; gate < 4; gate += gates) {
    vec dots[kLanes] = {};
    for (int g = 0; g < gates; ++g) {
      vec* own = dots + g * ROWS * kDotUnits;
      vec sum[parts][ROWS][kDotUnits] = {};
      for (int64_t j = 0; j < count; ++j) {
        const int64_t depth = operands[j].depth, left_row = operands[j].left.row;
        const float* left = (const float*)operands[j].left.data + row * left_row;
        const T* rows[kDotUnits];  // one that does not exist repeats the last, and goes nowhere
        for (int u = 0; u < kDotUnits; ++u)
          rows[u] = (const T*)operands[j].weight + ((gate + g) * hidden + first + min(u, there - 1)) * depth;
        const int64_t next = (gate + g < 3 ? hidden : kDotUnits - 3 * hidden) * depth;  // the rows after these
        int64_t k = 0;
        for (; k + parts * kLanes <= depth; k += parts * kLanes)
          for (int part = 0; part < parts; ++part) {
            const int64_t at = k + part * kLanes;
            vec right[kDotUnits];
            for (int u = 0; u < kDotUnits; ++u) {
              right[u] = load_as(rows[u] + at);
              if (ROWS == 1 && part * kLanes * sizeof(T) % 64 == 0) prefetch(rows[u] + next + at);
              if (ROWS > 1) keep(right[u]);
            }
            for (int r = 0; r < ROWS; ++r) {
              const vec l = load(left + r * left_row + at);
              for (int u = 0; u < kDotUnits; ++u) sum[part][r][u] += l * right[u];
            }
          }
        for (; k < depth; k += kLanes)
          for (int u = 0; u < kDotUnits; ++u) {
            float last[kLanes] = {};
            for (int64_t i = 0; i < min(kLanes, depth - k); ++i) last[i] = to_float(rows[u][k + i]);
            const vec right = load(last);
            for (int r = 0; r < ROWS; ++r)
              own[r * kDotUnits + u] += load_lanes(left + r * left_row + k, depth - k) * right;
          }
      }
      for (int r = 0; r < ROWS; ++r)
        for (int u = 0; u < kDotUnits; ++u)
          for (int part = 0; part < parts; ++part) own[r * kDotUnits + u] += sum[part][r][u];
    }
    const vec all = sum_rows(dots);
    for (int g = 0; g < gates; ++g)
      for (int r = 0; r < ROWS; ++r)
        for (int u = 0; u < kDotUnits; ++u)
          sums[(row + r) * kGateColumns + (gate + g) * kUnits + u] = all[(g * ROWS + r) * kDotUnits + u];
  }
}

template <int ROWS, class T>
static inline void lstm_dots_of(
    int64_t rows, const LstmRowsOperand* operands, int64_t count, int64_t row, int64_t hidden, int64_t first,
    int64_t there, float* sums) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return lstm_dots_of<ROWS - 1, T>(rows, operands, count, row, hidden, first, there, sums);
  lstm_dots<ROWS, T>(operands, count, row, hidden, first, there, sums);
}

// sums (rows, 64) = the sum of the products with the gates of one block; `panel` is scratch for (K, 64).
template <class T>
static void lstm_rows_of_weight(
    int64_t rows, const LstmRowsOperand* operands, int64_t count, int64_t hidden, int64_t block, float* sums,
    float* panel) {
  if constexpr (sizeof(T) == sizeof(float))
    if (rows >= kRowsWorthPacking) {
      for (int64_t j = 0; j < count; ++j) {
        const LstmRowsOperand& o = operands[j];
        lstm_pack_gates((const float*)o.weight, o.depth, hidden, o.depth, block, panel);
        gemm(rows, kGateColumns, o.depth, {(const float*)o.left.data, o.left.row, 1}, panel, kGateColumns, sums,
             kGateColumns, j > 0);
      }
      return;
    }
  const int64_t parts = (rows + kDotRows - 1) / kDotRows, first = block * kUnits, there = min(kUnits, hidden - first);
  for (int64_t unit = 0; unit < there; unit += kDotUnits)
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t row = rows * i / parts;
      lstm_dots_of<kDotRows, T>(
          rows * (i + 1) / parts - row, operands, count, row, hidden, first + unit, min(kDotUnits, there - unit),
          sums + unit);
    }
  for (int64_t i = 0; i < (there < kUnits ? 4 * rows : 0); ++i)
    for (int64_t unit = there; unit < kUnits; ++unit) sums[i * kUnits + unit] = 0.0f;
}

// W_ih x where that is not among s.sums, and W_hh h, of rows [row, row + rows) for one block, to the scratch (rows, 64).
// h() says where h is, once it is there, and moves `scratch` behind it.
template <class H>
static void lstm_products(
    const LstmForwardStep& s, int64_t rows, int64_t block, LstmLeft input, H h, float* products, float*& scratch) {
  if (s.form == LstmForm::rows) {
    const LstmRowsOperand operands[] = {{h(), s.weight_h, s.state}, {input, s.weight_x, s.inputs}};
    return with_saved_type(s.weight_type, [&](auto* type) {
      lstm_rows_of_weight<__typeof__(*type)>(rows, operands, s.sums ? 1 : 2, s.hidden, block, products, scratch);
    });
  }
  const bool with_x = !s.sums && s.inputs > 0;  // a product without depth writes nothing
  if (with_x) lstm_multiply(s.form, s.reading, rows, kGateColumns, s.inputs, input, s.weight_x, block, products, false);
  lstm_multiply(s.form, s.reading, rows, kGateColumns, s.state, h(), s.weight_h, block, products, with_x);
}

// What comes from memory for the state of a row is asked for so many rows ahead: lines far apart, which the processor
// does not guess.
constexpr int64_t kRowsAhead = 8;

// From the products (rows, 64) to the new states of kLanes units, `count` of which exist, of rows from `row` on.
//
// Cell states first, then outputs: within one row the second tanh would wait for all that stands before it, and a
// processor does not look far enough ahead to find the next row meanwhile.
template <class Saved, class Out>
__attribute__((always_inline)) static inline void lstm_units(
    const LstmForwardStep& s, int64_t row, int64_t rows, int64_t unit, int64_t count, float* products) {
  const int64_t within = unit % kUnits;
  const float* sums = s.sums ? s.sums + row * s.sums_row + unit / kUnits * s.sums_block + within : s.bias + unit;
  const int64_t gate = s.sums ? s.sums_gate : s.hidden, sums_row = s.sums ? s.sums_row : 0;
  float* cell = s.cell + row * s.cell_row + unit;
  Saved* saved = offset((Saved*)s.gates, row * s.gates_row + (unit - within) * 4 + within);
  for (int64_t r = 0; r < rows; ++r) {
    float* product = products + r * kGateColumns;
    const auto sum = [&](int g) {
      prefetch(sums + g * gate + kRowsAhead * sums_row);
      return load(product + g * kUnits) + load_lanes(sums + g * gate, count);
    };
    const Gates<vec> gates = lstm_activate(sum(0), sum(1), sum(2), sum(3));
    store(product, gates.o);
    store(cell + r * s.cell_row, lstm_cell_state(gates, load(cell + r * s.cell_row)));
    if (saved) {
      store_as(saved, gates.i);
      store_as(saved + kUnits, gates.f);
      store_as(saved + 2 * kUnits, gates.g);
      store_as(saved + 3 * kUnits, gates.o);
      saved += s.gates_row;
    }
    sums += sums_row;
  }
  float* cells = offset(s.cells, row * s.cells_row + unit);
  Out* m = (Out*)s.m + row * s.m_row + unit;
  for (int64_t r = 0; r < rows; ++r) {
    const vec state = load(cell + r * s.cell_row);
    if (cells) store(cells + r * s.cells_row, state);
    store_lanes(m + r * s.m_row, load(products + r * kGateColumns) * tanh(state), count);
  }
}

template <class Saved, class Out>
static void lstm_forward_rows(const LstmForwardStep& s, Range blocks, float* products) {
  for (int64_t row = 0; row < s.rows; row += lstm_rows(s.form)) {
    const int64_t rows = min(lstm_rows(s.form), s.rows - row);
    float* scratch = products + kLstmRows * kGateColumns;
    const LstmLeft input =
        s.sums ? LstmLeft{} : lstm_left(s.form, s.input, s.input_row, row, rows, s.inputs, false, scratch);
    LstmLeft left_h;  // taken when the first block asks for it
    const auto h = [&] {
      if (left_h.data == nullptr) {
        s.wait_for_h(s.whom);
        left_h = lstm_left(s.form, s.h, s.h_row, row, rows, s.state, false, scratch);
      }
      return left_h;
    };
    for (int64_t i = blocks.begin; i < blocks.end; ++i) {
      const int64_t block = s.descending ? blocks.end - 1 - (i - blocks.begin) : i;
      lstm_products(s, rows, block, input, h, products, scratch);
      for (int64_t unit = 0; unit < kUnits; unit += kLanes) {
        const int64_t first = block * kUnits + unit, there = s.hidden - first;
        if (there >= kLanes)
          lstm_units<Saved, Out>(s, row, rows, first, kLanes, products + unit);
        else
          lstm_units<Saved, Out>(s, row, rows, first, there, products + unit);
      }
    }
  }
}

static void lstm_forward(const LstmForwardStep& s, Range blocks, float* scratch) {
  const Tiles tiles(uses_tiles(s.form));
  if (is_half(s.form)) return lstm_forward_rows<BFloat16, BFloat16>(s, blocks, scratch);
  with_saved_type(s.gates_type, [&](auto* type) { lstm_forward_rows<__typeof__(*type), float>(s, blocks, scratch); });
}

// start + start2 + left * weight for rows [row, row + rows) and one panel, to the scratch (rows, 64). Columns that do not
// exist are zero, up to the next multiple of kPad.
template <class S>
static void lstm_product_tile(
    const S& s, int64_t columns, LstmLeft left, int64_t row, int64_t rows, int64_t panel, float* out) {
  const int64_t first = panel * kGateColumns, here = min(kGateColumns, columns - first);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * kGateColumns;
    const float* start = offset(s.start, (row + r) * s.start_row + first);
    const float* start2 = offset(s.start2, (row + r) * s.start2_row + first);
    for (int64_t j = 0; j < round_up(here, kPad); j += kLanes) {
      if (start) prefetch(start + j + kRowsAhead * s.start_row);
      vec sum{};
      if (start && j < here) sum += load_lanes(start + j, here - j);
      if (start2 && j < here) sum += load_lanes(start2 + j, here - j);
      store(to + j, sum);
    }
  }
  if (s.left) lstm_multiply(s.form, s.reading, rows, round_up(here, kPad), s.depth, left, s.weight, panel, out, true);
}

// From dm (rows, 64) to the gradients of the sums and cells of kLanes units, `count` of which exist, of rows from `row`
// on.
template <class Saved, class Sums>
__attribute__((always_inline)) static inline void lstm_units_backward(
    const LstmBackwardStep& s, int64_t row, int64_t rows, int64_t unit, int64_t count, const float* dm) {
  const int64_t within = unit % kUnits, column = (unit - within) * 4 + within;
  const Saved* saved = (const Saved*)s.gates + row * s.gates_row + column;
  const float* cells = s.cells + row * s.cells_row + unit;
  const float* previous = s.previous + row * s.previous_row + unit;
  float* dcell = s.dcell + row * s.dcell_row + unit;
  Sums* to = (Sums*)s.dsums + row * s.dsums_row + unit;
  float* m = offset(s.m, row * s.m_row + unit);
  for (int64_t r = 0; r < rows; ++r) {
    const Gates<vec> gates{load_as(saved), load_as(saved + kUnits), load_as(saved + 2 * kUnits),
                           load_as(saved + 3 * kUnits)};
    for (int gate = 0; gate < 4; ++gate) prefetch(saved + gate * kUnits + kRowsAhead * s.gates_row);
    prefetch(cells + kRowsAhead * s.cells_row);
    prefetch(previous + kRowsAhead * s.previous_row);
    const vec tanh_c = tanh(load(cells));
    const CellGradient<vec> grad = lstm_cell_gradient(gates, load(previous), tanh_c, load(dm), load(dcell));
    store(dcell, grad.previous);
    store_lanes(to, grad.gates.i, count);
    store_lanes(to + s.hidden, grad.gates.f, count);
    store_lanes(to + 2 * s.hidden, grad.gates.g, count);
    store_lanes(to + 3 * s.hidden, grad.gates.o, count);
    if (m) {
      store_lanes(m, gates.o * tanh_c, count);
      m += s.m_row;
    }
    dm += kGateColumns;
    saved += s.gates_row;
    cells += s.cells_row;
    previous += s.previous_row;
    dcell += s.dcell_row;
    to += s.dsums_row;
  }
}

template <class Saved, class Sums>
static void lstm_backward_rows(const LstmBackwardStep& s, Range panels, float* sums) {
  for (int64_t row = 0; row < s.rows; row += lstm_rows(s.form)) {
    const int64_t rows = min(lstm_rows(s.form), s.rows - row);
    float* scratch = sums + kLstmRows * kGateColumns;
    LstmLeft left;
    if (s.left) left = lstm_left(s.form, s.left, s.left_row, row, rows, s.depth, s.spread, scratch);
    for (int64_t i = panels.begin; i < panels.end; ++i) {
      const int64_t panel = s.descending ? panels.end - 1 - (i - panels.begin) : i;
      lstm_product_tile(s, s.hidden, left, row, rows, panel, sums);
      const int64_t first = panel * kGateColumns, here = min(kGateColumns, round_up(s.hidden, kUnits) - first);
      for (int64_t j = 0; j < here; j += kLanes) {
        const int64_t there = s.hidden - first - j;
        if (there >= kLanes)
          lstm_units_backward<Saved, Sums>(s, row, rows, first + j, kLanes, sums + j);
        else
          lstm_units_backward<Saved, Sums>(s, row, rows, first + j, there, sums + j);
      }
    }
  }
}

static void lstm_backward(const LstmBackwardStep& s, Range panels, float* scratch) {
  const Tiles tiles(uses_tiles(s.form));
  if (is_half(s.form)) return lstm_backward_rows<BFloat16, BFloat16>(s, panels, scratch);
  with_saved_type(s.gates_type, [&](auto* type) { lstm_backward_rows<__typeof__(*type), float>(s, panels, scratch); });
}

static void lstm_product(const LstmProduct& s, Range panels, float* sums) {
  const Tiles tiles(uses_tiles(s.form));
  for (int64_t row = 0; row < s.rows; row += lstm_rows(s.form)) {
    const int64_t rows = min(lstm_rows(s.form), s.rows - row);
    float* scratch = sums + kLstmRows * kGateColumns;
    LstmLeft left;
    if (s.left) left = lstm_left(s.form, s.left, s.left_row, row, rows, s.depth, s.spread, scratch);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      lstm_product_tile(s, s.columns, left, row, rows, panel, sums);
      const int64_t first = panel * kGateColumns, here = min(kGateColumns, s.columns - first);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < here; j += kLanes)
          store_lanes(s.out + (row + r) * s.out_row + first + j, load(sums + r * kGateColumns + j), here - j);
    }
  }
}

// Each four rows turn the weights into float32 anew. Ten cells of 512 units in float16 take 8 ms in place of 19 to 22 with
// 32 rows by AVX-512; in bfloat16 by AVX2 0.77 and 0.93 of the time with 12 and 16, 1.2 with 32.
constexpr int64_t kMostHalfRows = kLanes >= 16 ? 64 : kLanes >= 8 ? 16 : kDotRows;

static const LstmKernels lstm_table = {
    kMostHalfRows, lstm_pack_gates, lstm_pack_gates_bf16, lstm_pack_columns_bf16,
    lstm_forward,  lstm_backward,   lstm_product,
};
