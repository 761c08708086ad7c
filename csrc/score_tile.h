// The scores of one tile, with every mask applied: the one place that decides which entries take part.
// Part of kernels.inc.h.

// The keys that rows [row, row + rows) of batch b may see, widened to the start of a panel and to a multiple of kKeyUnit;
// empty when begin >= end.
struct KeyRange {
  int64_t begin, end;
};

static inline KeyRange key_range(const Problem& p, int64_t b, int64_t row, int64_t rows) {
  const int64_t begin = max(p.key_begin[b], row + p.lower);
  const int64_t end = min(p.key_end[b], row + rows + p.upper);
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

// scores (rows, columns), leading dimension score_row, of rows from `row` and keys from `column`, for head h of batch
// b. query: rows of D floats with leading dimension padded_dim, already times the scale. panels: the keys from
// `column` on, transposed (columns / kPanel, D, kPanel). column is a multiple of kPanel, columns of kKeyUnit.
static void score_tile(
    const Problem& p, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t column, int64_t columns,
    const float* query, const float* panels, float* scores, int64_t score_row) {
  for (int64_t j = 0; j < columns; j += kPanel)
    gemm(
        rows, min(kPanel, columns - j), p.dim, {query, p.padded_dim(), 1}, panels + j * p.dim, kPanel, scores + j,
        score_row, false);

  if (p.attn_mask.data) {
    const Tensor4& mask = p.attn_mask;
    const int64_t n = min(columns, p.keys - column);
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
  if (p.padded || column + columns > p.keys) {
    const float* bias = p.key_bias + b * p.padded_keys() + column;
    for (int64_t i = 0; i < rows; ++i) {
      float* s = scores + i * score_row;
      for (int64_t j = 0; j < columns; ++j) s[j] = bias[j] == -kInfinity ? -kInfinity : s[j] + bias[j];
    }
  }
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
