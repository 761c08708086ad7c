// Attention of a tile of rows to keys and values that are read where they are. Part of kernels.inc.h.
//
// Method: Dao et al., "FlashAttention", 2022, as in forward_tile.h, for the heads of a group at once: they share the keys.
// Few rows leave the splits of the keys to several tasks (Dao et al., "Flash-Decoding", 2023).

// Pointers into the scratch of one task; a row is one of tile_heads * tile_rows.
struct DirectScratch {
  float* query;    // (rows, padded_dim)
  float* out;      // (rows, padded_dim)
  float* maximum;  // (rows): of the scores so far
  float* sum;      // (rows, kLanes): as in ForwardScratch
  float* pivots;   // (rows): what was subtracted from the scores of the block
  float* scores;   // (rows, kScoreRow)
  float* panels;   // (kBlockKeys / kPanel, D, kPanel): the keys of a block, transposed
  float* values;   // (kBlockKeys, padded_dim)
  int64_t size;

  static constexpr int64_t kScoreRow = kBlockKeys + 16;  // see ForwardScratch

  DirectScratch(const Direct& f, float* base) {
    const int64_t rows = f.tile_heads * f.tile_rows, dim = f.problem.padded_dim();
    size = 0;
    const auto take = [&](int64_t floats) {
      float* here = base + size;
      size += round_up(floats, 16);
      return here;
    };
    query = take(rows * dim);
    out = take(rows * dim);
    maximum = take(rows);
    sum = take(rows * kLanes);
    pivots = take(rows);
    scores = take(rows * kScoreRow);
    panels = take(kBlockKeys * f.problem.dim);
    values = take(kBlockKeys * dim);
  }
};

// Up to so many rows meet keys and values where they are; more meet a copy of a block, its keys transposed for gemm.
constexpr int64_t kFewRows = 4;

static int64_t direct_scratch(const Direct& f) { return DirectScratch(f, nullptr).size; }

// The problem of one sequence: of a cache, its tokens and what the position of its last row makes of the rest.
static Problem of_sequence(const Direct& f, int64_t b) {
  Problem p = f.problem;
  if (!f.lengths) return p;
  p.keys = f.lengths[b];
  const int64_t shift = p.keys - p.rows;
  p.shift += shift;
  p.lower += shift;
  p.upper += shift;
  return p;
}

// Keys of a batch that stand in one place: `count` from row `row` of page (or batch) `page` on, the first `held` of which
// there are.
struct Run {
  int64_t page, row, count, held;
};

// The run from key `column` on, of `most` keys at most: it ends where a page does.
static inline Run run_at(const Direct& d, const Problem& p, int64_t b, int64_t column, int64_t most) {
  const int64_t held = max(0, min(most, p.keys - column));
  if (!d.table || held == 0) return {b, column, most, held};
  const int64_t row = column % d.page_size, count = min(most, d.page_size - row);
  return {d.table[b * d.table_row + column / d.page_size], row, count, min(count, held)};
}

// Calls f(k, run, next) for the runs of keys [column, column + columns), each within a panel: the first key of `run` is
// column + k, that of `next` a panel further.
template <class F>
static inline void for_runs(const Direct& d, const Problem& p, int64_t b, int64_t column, int64_t columns, F f) {
  for (int64_t k = 0; k < columns;) {
    const Run run = run_at(d, p, b, column + k, min(kPanel - k % kPanel, columns - k));
    f(k, run, run_at(d, p, b, column + k + kPanel, kPanel));
    k += run.count;
  }
}

// Rows of a run where they are, if vectors can be read there, else copied to a scratch. While a row is met the same row of
// the next run is asked for: of memory beyond the caches that comes in twice the time without.
struct Rows {
  const void *data, *next;
  int64_t step;  // in elements
  Type type;
};

static inline Rows rows_of(
    const Tensor4& t, int64_t g, const Run& run, const Run& next, int64_t dim, float* scratch) {
  if (t.stride[3] == 1 && dim % kLanes == 0)
    return {at(t, run.page, g, run.row, 0), at(t, next.page, g, next.row, 0), t.stride[2], t.type};
  load_rows(t, run.page, g, run.row, run.held, dim, 1.0f, scratch, round_up(dim, kPad));
  return {scratch, scratch, round_up(dim, kPad), Type::single};
}

// scores (ROWS, keys) = query (ROWS, dim) key^T. Writes up to a multiple of kLanes.
template <int ROWS, class T>
static void dot_rows(
    const Rows& rows, const T*, int64_t keys, int64_t dim, const float* query, int64_t query_row, float* scores) {
  const T *from = (const T*)rows.data, *next = (const T*)rows.next;
  for (int64_t i = 0; i < keys; i += kLanes) {
    vec sums[ROWS][kLanes] = {};
    const int64_t here = min(kLanes, keys - i);
    for (int64_t j = 0; j < here; ++j, from += rows.step, next += rows.step) {
      vec sum[ROWS] = {};
      for (int64_t d = 0; d < dim; d += kLanes) {
        const vec k = load_as(from + d);
        if (d * sizeof(T) % 64 == 0) prefetch(next + d);
        for (int r = 0; r < ROWS; ++r) sum[r] += k * load(query + r * query_row + d);
      }
      for (int r = 0; r < ROWS; ++r) sums[r][j] = sum[r];
    }
    for (int r = 0; r < ROWS; ++r) store(scores + r * DirectScratch::kScoreRow + i, sum_rows(sums[r]));
  }
}

// out (ROWS, VECTORS * kLanes) += weights (ROWS, keys) value, for those columns of value and out.
template <int ROWS, int VECTORS, class T>
static inline void add_strip(
    const T* from, const T* next, int64_t step, int64_t keys, const float* weights, float* out, int64_t out_row) {
  vec sum[ROWS][VECTORS] = {};
  for (int64_t j = 0; j < keys; ++j, from += step, next += step)
    for (int v = 0; v < VECTORS; ++v) {
      const vec x = load_as(from + v * kLanes);
      if (v * kLanes * sizeof(T) % 64 == 0) prefetch(next + v * kLanes);
      for (int r = 0; r < ROWS; ++r) sum[r][v] += x * splat(weights[r * DirectScratch::kScoreRow + j]);
    }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      float* to = out + r * out_row + v * kLanes;
      store(to, load(to) + sum[r][v]);
    }
}

// out (ROWS, dim) += weights (ROWS, keys) value.
template <int ROWS, class T>
static void add_rows(
    const Rows& rows, const T*, int64_t keys, int64_t dim, const float* weights, float* out, int64_t out_row) {
  const T *from = (const T*)rows.data, *next = (const T*)rows.next;
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
    add_strip<ROWS, 4>(from + d, next + d, rows.step, keys, weights, out + d, out_row);
  for (; d < dim; d += kLanes) add_strip<ROWS, 1>(from + d, next + d, rows.step, keys, weights, out + d, out_row);
}

// Calls f(rows as a constant) for 1 to kFewRows.
template <int ROWS = kFewRows, class F>
static inline void with_rows(int64_t rows, F f) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return with_rows<ROWS - 1>(rows, f);
  f(std::integral_constant<int, ROWS>{});
}

// The scores of `rows` rows and a block of keys of key head g of batch b, before masks.
static void direct_scores(
    const Direct& f, const Problem& p, int64_t b, int64_t g, int64_t rows, int64_t column, int64_t columns,
    const DirectScratch& s) {
  for_runs(f, p, b, column, columns, [&](int64_t k, const Run& run, const Run& next) {
    if (rows > kFewRows) {
      float* to = s.panels + k / kPanel * kPanel * p.dim + k % kPanel;
      return load_panel(p.key, run.page, g, run.row, run.held, run.count, p.dim, to);
    }
    const Rows keys = rows_of(p.key, g, run, next, p.dim, s.values);
    with_float_type(keys.type, [&](auto* type) {
      with_rows(rows, [&](auto count) {
        dot_rows<count>(keys, type, run.held, round_up(p.dim, kLanes), s.query, p.padded_dim(), s.scores + k);
      });
    });
  });
  if (rows > kFewRows) score_products(p, rows, columns, s.query, s.panels, s.scores, s.kScoreRow);
}

// out += the weights that stand in place of those scores, times the values.
static void direct_values(
    const Direct& f, const Problem& p, int64_t b, int64_t g, int64_t rows, int64_t column, int64_t columns,
    const DirectScratch& s) {
  const int64_t dim = p.padded_dim();
  for_runs(f, p, b, column, columns, [&](int64_t k, const Run& run, const Run& next) {
    if (rows > kFewRows) {
      load_rows(f.value, run.page, g, run.row, run.held, p.dim, 1.0f, s.values + k * dim, dim);
      for (int64_t i = (k + run.held) * dim; i < (k + run.count) * dim; ++i) s.values[i] = 0.0f;
      return;
    }
    const Rows values = rows_of(f.value, g, run, next, p.dim, s.values);
    with_float_type(values.type, [&](auto* type) {
      with_rows(rows, [&](auto count) {
        add_rows<count>(values, type, run.held, round_up(p.dim, kLanes), s.scores + k, s.out, dim);
      });
    });
  });
  if (rows > kFewRows) gemm(rows, dim, columns, {s.scores, s.kScoreRow, 1}, s.values, dim, s.out, dim, true);
}

static void direct_tile(const Direct& f, int64_t task, float* scratch) {
  const auto next = [&](int64_t count) {
    const int64_t index = task % count;
    task /= count;
    return index;
  };
  const int64_t split = next(f.splits()), row = next(f.tiles()) * f.tile_rows, first = next(f.runs()) * f.tile_heads;
  const int64_t g = next(f.problem.key_heads), b = task;
  const Problem p = of_sequence(f, b);
  const DirectScratch s(f, scratch);
  const int64_t dim = p.padded_dim(), rows = min(f.tile_rows, p.rows - row);
  const int64_t h = g * p.group() + first, heads = min(f.tile_heads, p.group() - first), all = heads * rows;
  for (int64_t i = 0; i < heads; ++i) {
    const float* sink = f.sinks && split == 0 ? f.sinks + h + i : nullptr;
    start_rows(rows, dim, sink, s.out + i * rows * dim, s.maximum + i * rows, s.sum + i * rows * kLanes);
    load_rows(p.query, b, h + i, row, rows, p.dim, p.scale, s.query + i * rows * dim, dim);
  }
  const KeyRange range = key_range(p, b, row, rows);
  const int64_t last = min(range.end, (split + 1) * f.split_keys);
  for (int64_t j = max(range.begin, split * f.split_keys); j < last; j += kBlockKeys) {
    const int64_t columns = min(kBlockKeys, last - j);
    direct_scores(f, p, b, g, all, j, columns, s);
    for (int64_t i = 0; i < heads; ++i)
      mask_scores(p, b, h + i, row, rows, j, columns, s.scores + i * rows * s.kScoreRow, s.kScoreRow, nullptr);
    softmax_step(s.scores, s.kScoreRow, all, columns, s.maximum, s.sum, s.pivots, s.out, dim);
    direct_values(f, p, b, g, all, j, columns, s);
  }
  for (int64_t i = 0; i < all; ++i) {
    const int64_t head = h + i / rows, at = row + i % rows;
    const float *out = s.out + i * dim, sum = sum_lanes(load(s.sum + i * kLanes));
    if (f.splits() == 1) {
      store_result(p, f.out, f.logsumexp, b, head, at, out, s.maximum[i], sum);
      continue;
    }
    float* to = f.partial + (((split * p.batch + b) * p.heads + head) * p.rows + at) * f.partial_row();
    for (int64_t d = 0; d < dim; d += kLanes) store(to + d, load(out + d));
    to[dim] = s.maximum[i];
    to[dim + 1] = sum;
  }
}

// Joins the splits of the rows of one tile, in their order.
static void direct_join(const Direct& f, int64_t task) {
  const Problem& p = f.problem;
  const int64_t first = task % f.tiles() * f.tile_rows, plane = task / f.tiles(), dim = p.padded_dim();
  const int64_t step = p.batch * p.heads * p.rows * f.partial_row();
  for (int64_t row = first; row < min(first + f.tile_rows, p.rows); ++row) {
    float* base = f.partial + (plane * p.rows + row) * f.partial_row();
    float maximum = -kInfinity, sum = 0.0f;
    for (int64_t split = 0; split < f.splits(); ++split) {
      const float here = base[split * step + dim];
      maximum = here > maximum ? here : maximum;
    }
    for (int64_t split = 0; split < f.splits(); ++split) {
      const float* from = base + split * step;
      const float factor = from[dim] == maximum ? 1.0f : exp(from[dim] - maximum);  // both may be infinite
      sum += from[dim + 1] * factor;
      for (int64_t d = 0; d < dim; d += kLanes)  // the first split's place holds the result
        store(base + d, (split ? load(base + d) : vec{}) + load(from + d) * factor);
    }
    store_result(p, f.out, f.logsumexp, plane / p.heads, plane % p.heads, row, base, maximum, sum);
  }
}
