// The weights of one row tile from the logsumexp. Part of kernels.inc.h.

static void weights_pack(const Weights& w, float* packed_key, int64_t task) {
  const Problem& p = w.problem;
  const int64_t b = task / p.key_heads, g = task % p.key_heads;
  const KeyRange range = key_range(p, b, 0, p.rows);
  for (int64_t j = range.begin; j < range.end; j += kPanel) {
    const int64_t here = min(kPanel, p.keys - j);
    float* to = packed_key + (task * p.padded_keys() + j) * p.dim;
    load_panel(p.key, b, g, j, here, round_up(here, kKeyUnit), p.dim, to);
  }
}

struct WeightsScratch {
  float* query;    // (kTileRows, padded_dim)
  float* scores;   // (kTileRows, kTileKeys)
  float* factors;  // (kTileRows, kTileKeys): dropout
  float* average;  // (kTileRows, padded_keys): averaged weights, if their type is not float
  int64_t size;

  WeightsScratch(const Weights& w, float* base) {
    const Problem& p = w.problem;
    const int64_t tile = kTileRows * kTileKeys;
    query = base;
    scores = query + kTileRows * p.padded_dim();
    factors = scores + tile;
    average = factors + (p.drop_below ? tile : 0);
    size = average - base;
    if (w.mode == WeightsMode::mean && w.weights.type != Type::single) size += kTileRows * p.padded_keys();
  }
};

static int64_t weights_scratch(const Weights& w) { return WeightsScratch(w, nullptr).size; }

// The two parts of the logsumexp of one row. Without a key it is -inf, and so are the scores: 0 gives P = 0 there.
struct Logsumexp {
  float number, rest;

  Logsumexp(const Problem& p, const float* logsumexp, int64_t b, int64_t h, int64_t row) {
    const float* here = logsumexp + (b * p.heads + h) * p.rows + row;
    number = *here == -kInfinity ? 0.0f : *here;
    rest = here[p.batch * p.heads * p.rows];
  }

  vec probability(vec score) const { return exp((score - number) - rest); }
};

// P = exp(S - LSE) in place, of rows from `row` on.
static void probabilities(
    const Problem& p, const float* logsumexp, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t columns,
    float* scores, int64_t score_row) {
  for (int64_t i = 0; i < rows; ++i) {
    const Logsumexp lse(p, logsumexp, b, h, row + i);
    float* s = scores + i * score_row;
    for (int64_t j = 0; j < columns; j += kLanes) store(s + j, lse.probability(load(s + j)));
  }
}

static void weights_tile(const Weights& w, int64_t task, float* scratch) {
  const Problem& p = w.problem;
  const WeightsScratch s(w, scratch);
  const int64_t row = task % w.tiles() * kTileRows, rows = min(kTileRows, p.rows - row);
  const int64_t plane = task / w.tiles();
  const bool mean = w.mode == WeightsMode::mean;
  const int64_t b = mean ? plane : plane / p.heads;
  const KeyRange range = key_range(p, b, row, rows);
  const float share = 1.0f / (float)p.heads;
  const int64_t first = mean ? 0 : plane % p.heads, last = mean ? p.heads : first + 1;
  for (int64_t h = first; h < last; ++h) {
    const float* key = w.packed_key + (b * p.key_heads + h / p.group()) * p.padded_keys() * p.dim;
    load_rows(p.query, b, h, row, rows, p.dim, p.scale, s.query, p.padded_dim());
    for (int64_t j = range.begin; j < range.end; j += kTileKeys) {
      const int64_t columns = min(kTileKeys, range.end - j), n = min(columns, p.keys - j);
      score_tile(p, b, h, row, rows, j, columns, s.query, key + j * p.dim, s.scores, kTileKeys);
      probabilities(p, w.logsumexp, b, h, row, rows, columns, s.scores, kTileKeys);
      if (p.drop_below) {
        dropout_tile(p, b, h, row, rows, j, columns, s.factors);
        multiply_tile(s.scores, kTileKeys, rows, columns, s.factors);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float* from = s.scores + i * kTileKeys;
        if (mean)
          average_row(w.weights, b, row + i, s.average + i * p.padded_keys(), j, n, from, share, h == 0);
        else
          store_row(from, n, 1.0f, at(w.weights, b, h, row + i, j), w.weights.type);
      }
    }
  }
  finish_weights(p, w.weights, mean, b, first, row, rows, range, s.average);
}
