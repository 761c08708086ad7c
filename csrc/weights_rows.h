// Writing the weights, shared by the forward and by the weights from the logsumexp. Part of kernels.inc.h.
//
// Averages are summed head after head in the result itself if it is float, else in a scratch row of float.

// average[j, j + n) = or += factor * from, for row `row` of batch b; scratch is that row's.
static void average_row(
    const Tensor4& weights, int64_t b, int64_t row, float* scratch, int64_t j, int64_t n, const float* from,
    float factor, bool first) {
  float* to = weights.type == Type::single ? (float*)at(weights, b, 0, row, j) : scratch + j;
  for (int64_t k = 0; k < n; k += kLanes) {
    const vec part = load_lanes(from + k, n - k) * factor;
    store_lanes(to + k, first ? part : load_lanes(to + k, n - k) + part, n - k);
  }
}

static inline void zero_weights(const Tensor4& weights, int64_t b, int64_t h, int64_t row, int64_t begin, int64_t end) {
  const int64_t size = weights.type == Type::single ? 4 : 2;
  if (begin < end) __builtin_memset(at(weights, b, h, row, begin), 0, size * (end - begin));
}

// Zero the keys outside `range` and convert the averages that stand in scratch (rows, keys rounded up to kPanel).
static void finish_weights(
    const Problem& p, const Tensor4& weights, bool mean, int64_t b, int64_t h, int64_t row, int64_t rows,
    KeyRange range, const float* scratch) {
  const int64_t end = min(range.end, p.keys);
  for (int64_t i = 0; i < rows; ++i) {
    zero_weights(weights, b, h, row + i, 0, range.begin);
    zero_weights(weights, b, h, row + i, end, p.keys);
    if (mean && weights.type != Type::single)
      store_row(
          scratch + i * p.padded_keys() + range.begin, end - range.begin, 1.0f,
          at(weights, b, h, row + i, range.begin), weights.type);
  }
}
