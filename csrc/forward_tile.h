// The forward of one row tile: online softmax over blocks of keys. Part of kernels.inc.h.
//
// Method: Dao et al., "FlashAttention", 2022. Where the weights are wanted, the exponentials of the whole row tile are
// kept until its maximum is known; each block remembers the pivot it was computed with.

constexpr int64_t kBlockKeys = 128;

static void forward_pack(const Forward& f, int64_t plane) {
  const Problem& p = f.problem;
  const int64_t b = plane / p.key_heads, g = plane % p.key_heads;
  float *key = f.plane_key(plane), *value = f.plane_value(plane);
  const KeyRange range = key_range(p, b, 0, p.rows);
  for (int64_t j = range.begin; j < range.end; j += kPanel) {
    const int64_t here = min(kPanel, p.keys - j);
    load_panel(p.key, b, g, j, here, round_up(here, kKeyUnit), p.dim, key + j * p.dim);
    float* to = value + j * p.padded_dim();
    load_rows(f.value, b, g, j, here, p.dim, 1.0f, to, p.padded_dim());
    const int64_t end = min(kPanel, range.end - j) * p.padded_dim();
    for (int64_t i = here * p.padded_dim(); i < end; ++i) to[i] = 0.0f;
  }
}

// Pointers into the scratch of one task.
struct ForwardScratch {
  float* query;    // (tile_rows, padded_dim)
  float* out;      // (tile_rows, padded_dim)
  float* maximum;  // (tile_rows): of the scores so far
  float* sum;      // (tile_rows, kLanes): of exp(score - pivot) so far, each lane its own columns
  float* inverse;  // (tile_rows): 1 / sum of the row, 0 without a key
  float* factors;  // (tile_rows, kBlockKeys): dropout of one block, if any
  float* pivots;   // (blocks, tile_rows): what was subtracted from the scores of that block
  float* scores;   // (tile_rows, score_row): one block, or all keys where weights are wanted
  float* average;  // (tile_rows, padded_keys): averaged weights, if their type is not float
  int64_t score_row, size;

  ForwardScratch(const Forward& f, float* base) {
    const Problem& p = f.problem;
    const int64_t rows = f.tile_rows, row_floats = round_up(rows, 16);
    const bool keep = f.mode != WeightsMode::none;
    // 16 floats more than the keys, so that the rows of a tile do not all fall into the same cache sets.
    score_row = (keep ? p.padded_keys() : kBlockKeys) + 16;
    const int64_t blocks = keep ? p.padded_keys() / kBlockKeys + 1 : 1;
    size = 0;
    const auto take = [&](int64_t floats) {
      float* here = base + size;
      size += round_up(floats, 16);
      return here;
    };
    query = take(rows * p.padded_dim());
    out = take(rows * p.padded_dim());
    maximum = take(row_floats);
    sum = take(rows * kLanes);
    inverse = take(row_floats);
    factors = take(p.drop_below ? rows * kBlockKeys : 0);
    pivots = take(blocks * rows);
    scores = take(rows * score_row);
    average = take(f.mode == WeightsMode::mean && f.weights.type != Type::single ? rows * p.padded_keys() : 0);
  }
};

static int64_t forward_scratch(const Forward& f) { return ForwardScratch(f, nullptr).size; }

// Loops over a row keep four registers going: one would wait for each addition to end.
static inline vec row_maximum(const float* s, int64_t columns) {
  vec top[4] = {load(s), load(s), load(s), load(s)};
  int64_t j = 0;
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes)
    for (int v = 0; v < 4; ++v) top[v] = max(load(s + j + v * kLanes), top[v]);
  for (; j < columns; j += kLanes) top[0] = max(load(s + j), top[0]);
  return max(max(top[0], top[1]), max(top[2], top[3]));
}

// exp(s - pivot) in place; returns their sum, lane by lane.
static inline vec exponentials(float* s, int64_t columns, float pivot) {
  const auto step = [&](int64_t j) {
    const vec e = exp(load(s + j) - pivot);
    store(s + j, e);
    return e;
  };
  vec total[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes)
    for (int v = 0; v < 4; ++v) total[v] += step(j + v * kLanes);
  for (; j < columns; j += kLanes) total[0] += step(j);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// Rows before their first key: nothing, or a sink.
static void start_rows(int64_t rows, int64_t dim, const float* sink, float* out, float* maximum, float* sum) {
  for (int64_t i = 0; i < rows * dim; ++i) out[i] = 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    maximum[i] = sink ? *sink : -kInfinity;
    store(sum + i * kLanes, vec{sink ? 1.0f : 0.0f});  // exp(sink - maximum), in one lane
  }
}

// exp(scores - pivot) in place; updates the running maximum and sum and scales what was accumulated in `out` to the new
// pivot. A row without a key so far has maximum -inf; its pivot 0 makes exp(-inf) = 0 instead of NaN.
static void softmax_step(
    float* scores, int64_t score_row, int64_t rows, int64_t columns, float* maximum, float* sum, float* pivots,
    float* out, int64_t out_row) {
  for (int64_t i = 0; i < rows; ++i) {
    float* s = scores + i * score_row;
    const float here = max_lanes(row_maximum(s, columns));
    const float before = maximum[i];
    const float highest = here > before ? here : before;
    const float pivot = highest == -kInfinity ? 0.0f : highest;
    if (highest != before) {
      const float correction = before == -kInfinity ? 0.0f : exp(before - pivot);
      store(sum + i * kLanes, load(sum + i * kLanes) * correction);
      for (int64_t d = 0; d < out_row; d += kLanes) store(out + i * out_row + d, load(out + i * out_row + d) * correction);
      maximum[i] = highest;
    }
    pivots[i] = pivot;
    store(sum + i * kLanes, load(sum + i * kLanes) + exponentials(s, columns, pivot));
  }
}

static void multiply_tile(float* tile, int64_t tile_row, int64_t rows, int64_t columns, const float* factors) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) tile[i * tile_row + j] *= factors[i * columns + j];
}

// Output and logsumexp of one row from what was accumulated; returns 1 / sum, 0 for a row without a key.
static float store_result(
    const Problem& p, const Tensor4& out, float* logsumexp, int64_t b, int64_t h, int64_t row, const float* from,
    float maximum, float sum) {
  // A row whose scores are all NaN has no maximum either, but a sum that is NaN.
  const bool empty = maximum == -kInfinity && sum == sum;
  const float inverse = empty ? 0.0f : 1.0f / sum;
  store_row(from, p.dim, inverse, at(out, b, h, row, 0), out.type);
  float* to = logsumexp + (b * p.heads + h) * p.rows + row;
  const float logarithm = empty ? 0.0f : __builtin_logf(sum), number = maximum + logarithm;
  to[0] = number;
  // Of the two addends the larger in size is first: then the difference is what rounding the sum lost, exactly.
  const bool ordered = __builtin_fabsf(maximum) >= logarithm;
  const float lost = ordered ? (maximum - number) + logarithm : (logarithm - number) + maximum;
  to[p.batch * p.heads * p.rows] = empty || number == kInfinity ? 0.0f : lost;  // a sink may be infinite
  return inverse;
}

// The weights of one head from its exponentials, into the average or to their own place.
static void store_weights(
    const Forward& f, int64_t b, int64_t h, int64_t row, int64_t rows, KeyRange range, const ForwardScratch& s) {
  const Problem& p = f.problem;
  const bool mean = f.mode == WeightsMode::mean;
  for (int64_t i = 0; i < rows; ++i) {
    const bool empty = s.maximum[i] == -kInfinity;
    for (int64_t j = range.begin, block = 0; j < range.end; j += kBlockKeys, ++block) {
      const float pivot = s.pivots[block * f.tile_rows + i];
      // The pivot is greater where no key came yet: there the exponentials are 0, and so must be a product with them.
      const float factor = s.inverse[i] * (pivot >= s.maximum[i] || empty ? 1.0f : exp(pivot - s.maximum[i]));
      const float* from = s.scores + i * s.score_row + (j - range.begin);
      const int64_t n = min(min(kBlockKeys, range.end - j), p.keys - j);
      if (mean)
        average_row(
            f.weights, b, row + i, s.average + i * p.padded_keys(), j, n, from, factor / (float)p.heads, h == 0);
      else
        store_row(from, n, factor, at(f.weights, b, h, row + i, j), f.weights.type);
    }
  }
}

static void forward_head(
    const Forward& f, int64_t b, int64_t h, int64_t row, int64_t rows, KeyRange range, const ForwardScratch& s) {
  const Problem& p = f.problem;
  const int64_t dim = p.padded_dim(), plane = b * p.key_heads + h / p.group();
  const float *key = f.plane_key(plane), *value = f.plane_value(plane);
  load_rows(p.query, b, h, row, rows, p.dim, p.scale, s.query, dim);
  start_rows(rows, dim, f.sinks ? f.sinks + h : nullptr, s.out, s.maximum, s.sum);
  const bool keep = f.mode != WeightsMode::none;
  for (int64_t j = range.begin, block = 0; j < range.end; j += kBlockKeys, ++block) {
    const int64_t columns = min(kBlockKeys, range.end - j);
    float* scores = s.scores + (keep ? j - range.begin : 0);
    float* pivots = s.pivots + (keep ? block * f.tile_rows : 0);
    score_tile(p, b, h, row, rows, j, columns, s.query, key + j * p.dim, scores, s.score_row);
    softmax_step(scores, s.score_row, rows, columns, s.maximum, s.sum, pivots, s.out, dim);
    if (p.drop_below) {
      dropout_tile(p, b, h, row, rows, j, columns, s.factors);
      multiply_tile(scores, s.score_row, rows, columns, s.factors);
    }
    gemm(rows, dim, columns, {scores, s.score_row, 1}, value + j * dim, dim, s.out, dim, true);
  }
  for (int64_t i = 0; i < rows; ++i)
    s.inverse[i] = store_result(
        p, f.out, f.logsumexp, b, h, row + i, s.out + i * dim, s.maximum[i], sum_lanes(load(s.sum + i * kLanes)));
  if (keep) store_weights(f, b, h, row, rows, range, s);
}

static void forward_tile(const Forward& f, int64_t task, float* scratch) {
  const Problem& p = f.problem;
  const ForwardScratch s(f, scratch);
  const int64_t row = task % f.tiles() * f.tile_rows, rows = min(f.tile_rows, p.rows - row);
  const int64_t plane = task / f.tiles();
  const bool mean = f.mode == WeightsMode::mean;
  const int64_t b = mean ? plane : plane / p.heads;
  const KeyRange range = key_range(p, b, row, rows);
  const int64_t first = mean ? 0 : plane % p.heads, last = mean ? p.heads : first + 1;
  for (int64_t h = first; h < last; ++h) forward_head(f, b, h, row, rows, range, s);
  if (f.mode != WeightsMode::none) finish_weights(p, f.weights, mean, b, first, row, rows, range, s.average);
}
