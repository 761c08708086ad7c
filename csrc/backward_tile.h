// The gradients of one task: a set of (batch, key head) pairs and a range of keys. Part of kernels.inc.h.
//
// With F the dropout factors (0 or 1 / (1 - p)), the probabilities come again from the logsumexp, tile by tile:
//
//     attention:  dV = (P F)^T dO,   dS = P (F dP - delta + dLSE),   dP = dO V^T,   delta = <dO, O>
//     weights:    dS = P F dW,       dLSE = -sum_j dS
//     both:       mask gradients: sums of dS;   dC = dS (1 - tanh^2) with softcap, else dS
//                 dQ = scale dC K,   dK = scale dC^T Q

struct BackwardScratch {
  float* key_panels;    // (split_keys / kPanel, D, kPanel)
  float* value_panels;  // the same
  float* key;           // (split_keys, padded_dim)
  float* dkey;          // (split_keys, padded_dim)
  float* dvalue;        // (split_keys, padded_dim)
  float* dpadding;      // (split_keys)
  float* query;         // (kTileRows, padded_dim), times the scale
  float* grad_out;      // (kTileRows, padded_dim)
  float* dquery;        // (kTileRows, padded_dim)
  float* row_sum;       // (kTileRows): of dS
  float* row_term;      // (kTileRows): delta - dLSE
  float* factors;       // (kTileRows, columns of the tile)
  float* cap_slopes;    // (kTileRows, columns of the tile): 1 - tanh^2 of the softcap
  float* scores;        // (kTileRows, kTileKeys): S, then P F
  float* dscores;       // (kTileRows, kTileKeys): dP, then dS, then dC
  int64_t size;

  BackwardScratch(const Backward& t, float* base) {
    const Problem& p = t.problem;
    const int64_t keys = t.split_keys(), dim = p.padded_dim();
    size = 0;
    const auto take = [&](int64_t floats) {
      float* here = base + size;
      size += round_up(floats, 16);
      return here;
    };
    key_panels = take(keys * p.dim);
    value_panels = take(t.value.data ? keys * p.dim : 0);
    key = take(keys * dim);
    dkey = take(keys * dim);
    dvalue = take(t.value.data ? keys * dim : 0);
    dpadding = take(keys);
    query = take(kTileRows * dim);
    grad_out = take(t.value.data ? kTileRows * dim : 0);
    dquery = take(kTileRows * dim);
    row_sum = take(kTileRows);
    row_term = take(kTileRows);
    factors = take(p.drop_below ? kTileRows * kTileKeys : 0);
    cap_slopes = take(p.softcap > 0.0f ? kTileRows * kTileKeys : 0);
    scores = take(kTileRows * kTileKeys);
    dscores = take(kTileRows * kTileKeys);
  }
};

static int64_t backward_scratch(const Backward& t) { return BackwardScratch(t, nullptr).size; }

// Loads grad_out and computes delta - dLSE of each row; the scratch of dquery is free at that time.
static void load_gradients(
    const Backward& t, int64_t b, int64_t h, int64_t row, int64_t rows, const BackwardScratch& s) {
  const Problem& p = t.problem;
  const int64_t dim = p.padded_dim();
  for (int64_t i = 0; i < rows; ++i)
    s.row_term[i] = t.grad_logsumexp ? -t.grad_logsumexp[(b * p.heads + h) * p.rows + row + i] : 0.0f;
  if (!t.grad_out.data) return;
  float* out = s.dquery;
  load_rows(t.grad_out, b, h, row, rows, p.dim, 1.0f, s.grad_out, dim);
  load_rows(t.out, b, h, row, rows, p.dim, 1.0f, out, dim);
  for (int64_t i = 0; i < rows; ++i) {
    vec delta{};
    for (int64_t d = 0; d < dim; d += kLanes) delta += load(s.grad_out + i * dim + d) * load(out + i * dim + d);
    s.row_term[i] += sum_lanes(delta);
  }
}

// S -> P F and dP -> dS for the attention; grad_out may be absent, then dscores is only written.
static void attention_dscores(
    const Backward& t, const BackwardScratch& s, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t columns) {
  const bool grad_out = t.grad_out.data != nullptr, dropout = t.problem.drop_below > 0;
  for (int64_t i = 0; i < rows; ++i) {
    const Logsumexp lse(t.problem, t.logsumexp, b, h, row + i);
    const float term = s.row_term[i];
    float *score = s.scores + i * kTileKeys, *dscore = s.dscores + i * kTileKeys;
    const float* factor = s.factors + i * columns;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const vec probability = lse.probability(load(score + j));
      vec dprobability = grad_out ? load(dscore + j) : vec{};
      vec weight = probability;
      if (dropout) {
        dprobability *= load(factor + j);
        weight *= load(factor + j);
      }
      store(score + j, weight);
      store(dscore + j, probability * (dprobability - term));
    }
  }
}

// S -> P F, and dS from the gradient of the weights.
static void weights_dscores(
    const Backward& t, const BackwardScratch& s, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t column,
    int64_t columns) {
  const Problem& p = t.problem;
  probabilities(p, t.logsumexp, b, h, row, rows, columns, s.scores, kTileKeys);
  if (p.drop_below) multiply_tile(s.scores, kTileKeys, rows, columns, s.factors);
  const int64_t n = min(columns, p.keys - column);
  with_float_type(t.grad_weights.type, [&](auto* type) {
    using T = __typeof__(*type);
    for (int64_t i = 0; i < rows; ++i) {
      const T* grad = (const T*)at(t.grad_weights, b, h, row + i, column);
      float *score = s.scores + i * kTileKeys, *dscore = s.dscores + i * kTileKeys;
      for (int64_t j = 0; j < n; ++j)
        dscore[j] = score[j] * to_float(grad[j * t.grad_weights.stride[3]]) * t.grad_weights_scale;
      for (int64_t j = n; j < columns; ++j) dscore[j] = 0.0f;
    }
  });
}

// dS of one tile onto the gradient of the attention mask, whose broadcast axes have stride 0.
static void add_mask_gradient(
    const Backward& t, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t column, int64_t columns,
    const float* dscores) {
  const bool over_rows = t.dmask.stride[2] == 0, over_keys = t.dmask.stride[3] == 0;
  const int64_t n = min(columns, t.problem.keys - column);
  vec sum{};
  for (int64_t i = 0; i < rows; ++i) {
    float* to = (float*)at(t.dmask, b, h, row + i, column);
    const float* from = dscores + i * kTileKeys;
    if (!over_keys) {
      for (int64_t j = 0; j < n; ++j) to[j] += from[j];
      continue;
    }
    for (int64_t j = 0; j < columns; j += kLanes) sum += load(from + j);
    if (!over_rows || i == rows - 1) {
      *to += sum_lanes(sum);
      sum = vec{};
    }
  }
}

// One row tile of one head against keys [range.begin, range.end); first is the first key in scratch.
static void backward_rows(
    const Backward& t, int64_t b, int64_t h, int64_t row, int64_t rows, KeyRange range, int64_t first,
    const BackwardScratch& s) {
  const Problem& p = t.problem;
  const int64_t dim = p.padded_dim();
  load_rows(p.query, b, h, row, rows, p.dim, p.scale, s.query, dim);
  if (!t.grad_weights.data) load_gradients(t, b, h, row, rows, s);
  for (int64_t i = 0; i < rows * dim; ++i) s.dquery[i] = 0.0f;
  for (int64_t i = 0; i < rows; ++i) s.row_sum[i] = 0.0f;

  for (int64_t j = range.begin; j < range.end; j += kTileKeys) {
    const int64_t columns = min(kTileKeys, range.end - j), k = j - first;
    score_tile(p, b, h, row, rows, j, columns, s.query, s.key_panels + k * p.dim, s.scores, kTileKeys, s.cap_slopes);
    if (p.drop_below) dropout_tile(p, b, h, row, rows, j, columns, s.factors);
    if (t.grad_weights.data) {
      weights_dscores(t, s, b, h, row, rows, j, columns);
    } else {
      if (t.grad_out.data)
        for (int64_t c = 0; c < columns; c += kPanel)
          gemm(
              rows, min(kPanel, columns - c), p.dim, {s.grad_out, dim, 1}, s.value_panels + (k + c) * p.dim, kPanel, s.dscores + c,
              kTileKeys, false);
      attention_dscores(t, s, b, h, row, rows, columns);
      if (t.grad_out.data)
        gemm(columns, dim, rows, {s.scores, 1, kTileKeys}, s.grad_out, dim, s.dvalue + k * dim, dim, true);
    }
    if (t.dmask.data) add_mask_gradient(t, b, h, row, rows, j, columns, s.dscores);
    if (t.dpadding)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; ++c) s.dpadding[k + c] += s.dscores[i * kTileKeys + c];
    if (t.dlogsumexp)
      for (int64_t i = 0; i < rows; ++i) {
        vec sum{};
        for (int64_t c = 0; c < columns; c += kLanes) sum += load(s.dscores + i * kTileKeys + c);
        s.row_sum[i] += sum_lanes(sum);
      }
    if (p.softcap > 0.0f) multiply_tile(s.dscores, kTileKeys, rows, columns, s.cap_slopes);
    gemm(columns, dim, rows, {s.dscores, 1, kTileKeys}, s.query, dim, s.dkey + k * dim, dim, true);
    gemm(rows, dim, columns, {s.dscores, kTileKeys, 1}, s.key + k * dim, dim, s.dquery, dim, true);
  }
}

// Everything of one (batch, key head) pair within the keys [first, last) of a split.
static void backward_pair(
    const Backward& t, int64_t b, int64_t g, int64_t split, int64_t first, int64_t last, const BackwardScratch& s) {
  const Problem& p = t.problem;
  const int64_t dim = p.padded_dim();
  const auto within = [&](KeyRange r) { return KeyRange{max(r.begin, first), min(r.end, first + t.split_keys())}; };
  const KeyRange used = within(key_range(p, b, 0, p.rows));
  for (int64_t j = used.begin; j < used.end; j += kPanel) {
    const int64_t here = min(kPanel, p.keys - j), k = j - first, used_here = min(kPanel, used.end - j);
    load_panel(p.key, b, g, j, here, round_up(here, kKeyUnit), p.dim, s.key_panels + k * p.dim);
    if (t.value.data) load_panel(t.value, b, g, j, here, round_up(here, kKeyUnit), p.dim, s.value_panels + k * p.dim);
    load_rows(p.key, b, g, j, here, p.dim, 1.0f, s.key + k * dim, dim);
    for (int64_t i = (k + here) * dim; i < (k + used_here) * dim; ++i) s.key[i] = 0.0f;
  }
  const int64_t padded = round_up(last - first, kPanel);
  for (int64_t i = 0; i < padded * dim; ++i) s.dkey[i] = 0.0f;
  if (t.value.data)
    for (int64_t i = 0; i < padded * dim; ++i) s.dvalue[i] = 0.0f;
  for (int64_t i = 0; i < padded; ++i) s.dpadding[i] = 0.0f;

  for (int64_t h = g * p.group(); h < (g + 1) * p.group(); ++h)
    for (int64_t row = 0; row < p.rows; row += kTileRows) {
      const int64_t rows = min(kTileRows, p.rows - row);
      backward_rows(t, b, h, row, rows, within(key_range(p, b, row, rows)), first, s);
      Tensor4 dquery = t.dquery;
      dquery.data = (char*)dquery.data + split * t.dquery_split * (int64_t)sizeof(float);
      for (int64_t i = 0; i < rows; ++i) {
        store_row(s.dquery + i * dim, p.dim, p.scale, at(dquery, b, h, row + i, 0), dquery.type);
        if (t.dlogsumexp)
          t.dlogsumexp[((split * p.batch + b) * p.heads + h) * p.rows + row + i] = -s.row_sum[i];
      }
    }

  for (int64_t j = first; j < last; ++j) {
    store_row(s.dkey + (j - first) * dim, p.dim, 1.0f, at(t.dkey, b, g, j, 0), t.dkey.type);
    if (t.value.data) store_row(s.dvalue + (j - first) * dim, p.dim, 1.0f, at(t.dvalue, b, g, j, 0), t.dvalue.type);
    if (t.dpadding) t.dpadding[(b * p.key_heads + g) * p.keys + j] = s.dpadding[j - first];
  }
}

static void backward_task(const Backward& t, int64_t task, float* scratch) {
  const Problem& p = t.problem;
  const BackwardScratch s(t, scratch);
  const int64_t split = task % t.splits, set = task / t.splits;
  const int64_t first = split * t.split_keys(), last = max(first, min(first + t.split_keys(), p.keys));
  const int64_t sets_of_heads = t.mask_over_heads ? 1 : p.key_heads;
  const int64_t b = set / sets_of_heads, g = set % sets_of_heads;
  const int64_t batches = t.mask_over_batch ? p.batch : 1, key_heads = t.mask_over_heads ? p.key_heads : 1;
  for (int64_t i = 0; i < batches; ++i)
    for (int64_t k = 0; k < key_heads; ++k) backward_pair(t, b + i, g + k, split, first, last, s);
}
