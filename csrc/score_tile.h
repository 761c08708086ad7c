// The scores of one tile, capped and with every mask applied: the one place that decides which entries take part and
// with what score. Part of kernels.inc.h.

// The keys that rows [row, row + rows) of batch b may see, widened to the start of a panel and to a multiple of kKeyUnit;
// empty when begin >= end.
struct KeyRange {
  int64_t begin, end;
};

static inline KeyRange key_range(const Problem& p, int64_t b, int64_t row, int64_t rows) {
  int64_t begin = max(p.key_begin[b], row + p.lower);
  int64_t end = min(p.key_end[b], row + rows + p.upper);
  if (p.segment_query) {
    int64_t first = p.keys, last = 0;
    for (int64_t i = b * p.rows + row; i < b * p.rows + row + rows; ++i) {
      first = min(first, p.segment_begin[i]);
      last = max(last, p.segment_end[i]);
    }
    begin = max(begin, first);
    end = min(end, last);
  }
  if (begin >= end) return {0, 0};
  return {begin / kPanel * kPanel, round_up(end, kKeyUnit)};
}

// One row of the attention mask onto n scores. Selecting, not adding, keeps a masked NaN out, as masked_fill does.
template <class T>
static inline void mask_row(const T* mask, int64_t step, int64_t n, float* s) {
  if (step == 1)
    for (int64_t j = 0; j < n; ++j) s[j] += to_float(mask[j]);
  else
    for (int64_t j = 0; j < n; ++j) s[j] += to_float(mask[j * step]);
}

static inline void boolean_mask_row(const uint8_t* mask, int64_t step, int64_t n, float* s) {
  if (step == 1)
    for (int64_t j = 0; j < n; ++j) s[j] = mask[j] ? s[j] : -kInfinity;
  else
    for (int64_t j = 0; j < n; ++j) s[j] = mask[j * step] ? s[j] : -kInfinity;
}

// Softcap in place, and where it is not null to cap_slopes (rows, columns) its derivative.
static void cap_tile(
    float softcap, float* scores, int64_t score_row, int64_t rows, int64_t columns, float* cap_slopes) {
  const float inverse = 1.0f / softcap;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const vec t = tanh(load(scores + i * score_row + j) * inverse);
      store(scores + i * score_row + j, t * softcap);
      if (cap_slopes) store(cap_slopes + i * columns + j, (1.0f - t) * (1.0f + t));
    }
}

// Subtracts slope * |distance|; `distance` is that of the first row and the first column.
static void subtract_distances(
    float slope, int64_t distance, float* scores, int64_t score_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    float* s = scores + i * score_row;
    const float first = (float)(distance + i);
    for (int32_t j = 0; j < (int32_t)columns; ++j) s[j] -= slope * __builtin_fabsf(first - (float)j);
  }
}

// scores (rows, columns) = query times keys, with leading dimension score_row. query: rows of D floats with leading
// dimension padded_dim, already times the scale. panels: the keys, transposed (columns / kPanel, D, kPanel). columns is a
// multiple of kKeyUnit.
static void score_products(
    const Problem& p, int64_t rows, int64_t columns, const float* query, const float* panels, float* scores,
    int64_t score_row) {
  for (int64_t j = 0; j < columns; j += kPanel)
    gemm(
        rows, min(kPanel, columns - j), p.dim, {query, p.padded_dim(), 1}, panels + j * p.dim, kPanel, scores + j,
        score_row, false);
}

// Caps and masks those products of rows from `row` and keys from `column`, a multiple of kPanel, for head h of batch b.
// cap_slopes (rows, columns), dense: with softcap, the derivatives of the capped scores are written there; may be null.
static void mask_scores(
    const Problem& p, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t column, int64_t columns, float* scores,
    int64_t score_row, float* cap_slopes) {
  if (p.softcap > 0.0f) cap_tile(p.softcap, scores, score_row, rows, columns, cap_slopes);
  if (p.alibi_slopes)
    subtract_distances(
        p.alibi_slopes[b * p.alibi_batch + h], row + p.shift - column, scores, score_row, rows, columns);
  const int64_t n = min(columns, p.keys - column);
  if (p.attn_mask.data) {
    const Tensor4& mask = p.attn_mask;
    if (mask.type == Type::boolean) {
      for (int64_t i = 0; i < rows; ++i)
        boolean_mask_row((const uint8_t*)at(mask, b, h, row + i, column), mask.stride[3], n, scores + i * score_row);
    } else {
      with_float_type(mask.type, [&](auto* type) {
        for (int64_t i = 0; i < rows; ++i)
          mask_row((__typeof__(type))at(mask, b, h, row + i, column), mask.stride[3], n, scores + i * score_row);
      });
    }
  }
  if (p.key_bias) {
    const float* bias = p.key_bias + b * p.keys + column;
    for (int64_t i = 0; i < rows; ++i) {
      float* s = scores + i * score_row;
      for (int64_t j = 0; j < n; ++j) s[j] = bias[j] == -kInfinity ? -kInfinity : s[j] + bias[j];
    }
  }
  if (p.segment_query) {
    const int32_t *ids = p.segment_key + b * p.keys + column, *own = p.segment_query + b * p.rows + row;
    for (int64_t i = 0; i < rows; ++i) {
      float* s = scores + i * score_row;
      for (int64_t j = 0; j < n; ++j) s[j] = ids[j] == own[i] ? s[j] : -kInfinity;
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = n; j < columns; ++j) scores[i * score_row + j] = -kInfinity;
  const bool inside = column >= row + rows - 1 + p.lower && column + columns - 1 <= row + p.upper;
  if (!inside) {
    for (int64_t i = 0; i < rows; ++i) {
      float* s = scores + i * score_row - column;
      const int64_t first = min(column + columns, row + i + p.lower), last = max(column - 1, row + i + p.upper);
      for (int64_t j = column; j < first; ++j) s[j] = -kInfinity;
      for (int64_t j = last + 1; j < column + columns; ++j) s[j] = -kInfinity;
    }
  }
}

static void score_tile(
    const Problem& p, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t column, int64_t columns,
    const float* query, const float* panels, float* scores, int64_t score_row, float* cap_slopes = nullptr) {
  score_products(p, rows, columns, query, panels, scores, score_row);
  mask_scores(p, b, h, row, rows, column, columns, scores, score_row, cap_slopes);
}
