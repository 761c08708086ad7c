// Products of float32 matrices by panels. Part of kernels.inc.h; the method stands in panels_cpu.h.

// Rows far apart, which the processor does not guess, are asked for so many numbers ahead.
constexpr int64_t kNumbersAhead = 64;

// Columns of a panel: column i is row i of `from` (there, depth), zeros beyond `there`.
static void pack_turned(
    const float* from, int64_t row, int64_t there, int64_t depth, int64_t columns, float* to) {
  for (int64_t i = 0; i < columns; i += kLanes)
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t rows = min(kLanes, there - i), here = min(kLanes, depth - k);
      vec square[kLanes];
      if (rows == kLanes && here == kLanes)
        for (int j = 0; j < kLanes; ++j) {
          square[j] = load(from + (i + j) * row + k);
          if (k * sizeof(float) % 64 == 0) prefetch(from + (i + j) * row + k + kNumbersAhead);
        }
      else
        for (int j = 0; j < kLanes; ++j) square[j] = j < rows ? load_lanes(from + (i + j) * row + k, here) : vec{};
      transpose(square);
      for (int64_t j = 0; j < here; ++j) store(to + (k + j) * kPanelColumns + i, square[j]);
    }
}

// Rows of a few lines, of a matrix with long ones, are asked for so many ahead: for the left operand 0.93 of the time of a
// product of 1,024 x 256 numbers, 3,200 deep, for the right one 0.73 of one of 200 x 512, 2,048 deep.
constexpr int64_t kFarRowsAhead = 16;

// `there` numbers of each row, `row` apart, to rows of to_row numbers, zeros from there to `columns`.
static void copy_far_rows(
    const float* from, int64_t row, int64_t rows, int64_t there, int64_t columns, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i, from += row, to += to_row)
    for (int64_t j = 0; j < columns; j += kLanes) {
      prefetch(from + kFarRowsAhead * row + j);
      store(to + j, load_lanes(from + j, there - j));
    }
}

// Depth [k, k + depth) of one panel.
static void panel_part(const Operand& o, int64_t panel, int64_t k, int64_t depth, float* to) {
  const int64_t first = panel * kPanelColumns, there = min(kPanelColumns, o.rows - first);
  const float* from = o.data + first * o.row + k * o.column;
  if (o.column == 1) return pack_turned(from, o.row, there, depth, kPanelColumns, to);
  copy_far_rows(from, o.column, depth, there, kPanelColumns, to, kPanelColumns);
}

static void panel_pack(const Operand& o, int64_t panel, float* to) { panel_part(o, panel, 0, o.depth, to); }

// Rows [first, first + rows) and depth [k, k + depth) of a left operand, to scratch: row by row, or column by column where
// those are contiguous.
static inline Matrix panel_left(const Operand& o, int64_t first, int64_t rows, int64_t k, int64_t depth, float* to) {
  const float* from = o.data + first * o.row + k * o.column;
  if (o.column == 1) {
    const int64_t row = round_up(depth, kPad) + kPad;  // rows 4 kB apart would fall into the same sets of the cache
    copy_tile(from, o.row, rows, depth, nullptr, to, row);
    return {to, row, 1};
  }
  copy_far_rows(from, o.column, depth, rows, rows, to, kPanelRows);
  return {to, 1, kPanelRows};
}

// to (rows, columns) += from.
static void add_tile(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      float* at = to + i * to_row + j;
      store_lanes(at, load_lanes(at, columns - j) + load_lanes(from + i * from_row + j, columns - j), columns - j);
    }
}

// Rows `first` on, `rows` of them, times depth [k, k + here) of one panel: to its term's `out`, or added to it.
static void panel_product(
    const PanelProduct& p, int64_t first, int64_t rows, Matrix left, int64_t k, int64_t here, int64_t panel, float* sums,
    float* right_part) {
  const PanelTerm& term = term_of(p.terms, panel);
  const int64_t depth = p.left.depth, column = (panel - term.first_panel) * kPanelColumns;
  const int64_t columns = min(kPanelColumns, term.right.rows - column);
  const bool as_it_is = !p.packed && term.right.row == 1 && term.right.rows % kPad == 0;  // whole vectors of columns
  const float* right = right_part;
  if (p.packed)
    right = p.packed + (panel * depth + k) * kPanelColumns;
  else if (as_it_is)
    right = term.right.data + column + k * term.right.column;
  else
    panel_part(term.right, panel - term.first_panel, k, here, right_part);
  const Reading reading = as_it_is ? Reading{true, 0} : p.reading;
  const int64_t right_row = as_it_is ? term.right.column : kPanelColumns;
  gemm(reading, rows, round_up(columns, kPad), here, left, right, right_row, sums, kPanelColumns, false);
  const bool whole_vectors = term.out_row % kLanes == 0 && (uintptr_t)term.out % sizeof(vec) == 0;
  float* to = term.out + first * term.out_row + column;
  if (p.add || k > 0)
    add_tile(sums, kPanelColumns, rows, columns, to, term.out_row);
  else if (term.around && depth <= kPanelDepth && whole_vectors && columns == kPanelColumns)
    copy_tile<true>(sums, kPanelColumns, rows, columns, offset(term.bias, column), to, term.out_row);
  else
    copy_tile(sums, kPanelColumns, rows, columns, offset(term.bias, column), to, term.out_row);
}

static void panel_rows(const PanelProduct& p, int64_t first, Range panels, float* scratch) {
  const int64_t rows = min(p.rows, p.left.rows - first), depth = p.left.depth;
  float *sums = scratch, *left_part = scratch + kPanelRows * kPanelColumns;
  float* right_part = left_part + kPanelRows * (min(depth, kPanelDepth) + 2 * kPad);
  for (int64_t k = 0; k < depth; k += kPanelDepth) {
    const int64_t here = min(kPanelDepth, depth - k);
    const Matrix left = panel_left(p.left, first, rows, k, here, left_part);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      panel_product(p, first, rows, left, k, here, panel, sums, right_part);
  }
  stream_end();
}

static const PanelKernels panel_table = {panel_pack, panel_rows};
