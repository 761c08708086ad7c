// The scores of additive attention and their gradients. Part of kernels.inc.h.
//
//     S_ij = sum_d w_d t_ijd,   t_ijd = tanh(q_id + k_jd + c_ij wc_d)
//     h_ijd = dS_ij (1 - t_ijd^2)
//     dq_id = w_d sum_j h_ijd,   dk_jd = w_d sum_i h_ijd,   dw_d = sum_ij dS_ij t_ijd
//     dc_ij = sum_d w_d wc_d h_ijd,   dwc_d = w_d sum_ij c_ij h_ijd
//
// Source: Bahdanau, Cho and Bengio, 2015, A.1.2; the coverage c from See, Liu and Manning, 2017, equation 11. A tanh is
// computed where it is used, twice in a training, and never kept.

static inline bool takes_part(const AdditiveProblem& p, int64_t b, int64_t key) {
  return !p.mask || p.mask[b * p.keys + key];
}

// Coverage of one query and the keys [column, column + count), 0 for those that take no part: they may be NaN.
static void load_coverage(
    const AdditiveProblem& p, int64_t b, int64_t row, int64_t column, int64_t count, float* coverage) {
  with_float_type(p.coverage.type, [&](auto* from) {
    from = (__typeof__(from))at(p.coverage, b, 0, row, column);
    for (int64_t j = 0; j < count; ++j)
      coverage[j] = takes_part(p, b, column + j) ? to_float(from[j * p.coverage.stride[3]]) : 0.0f;
  });
}

static bool any_takes_part(const AdditiveProblem& p, int64_t b, int64_t column, int64_t count) {
  for (int64_t j = 0; j < count; ++j)
    if (takes_part(p, b, column + j)) return true;
  return false;
}

static void clear(float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
}

// Scratch: the keys of a tile (kKeys, Dp), one query (Dp), its coverage (kKeys).
static int64_t additive_scores_scratch(const AdditiveScores& f) {
  return (f.kKeys + 1) * f.problem.padded() + f.kKeys;
}

template <bool COVERED>
static void additive_row(
    const AdditiveScores& f, int64_t b, int64_t column, int64_t count, const float* query, const float* keys,
    const float* coverage, float* scores) {
  const AdditiveProblem& p = f.problem;
  const int64_t dim = p.padded();
  for (int64_t j0 = 0; j0 < count; j0 += kLanes) {
    const int64_t here = min(kLanes, count - j0);
    vec sums[kLanes] = {};
    for (int64_t j = 0; j < here; ++j) {
      if (!takes_part(p, b, column + j0 + j)) continue;
      const float* key = keys + (j0 + j) * dim;
      vec sum = {};
      for (int64_t d = 0; d < dim; d += kLanes) {
        vec x = load(query + d) + load(key + d);
        if constexpr (COVERED) x += coverage[j0 + j] * load(p.coverage_weight + d);
        sum += load(p.weight + d) * tanh(x);
      }
      sums[j] = sum;
    }
    const vec row = sum_rows(sums);
    for (int64_t j = 0; j < here; ++j)
      scores[j0 + j] = takes_part(p, b, column + j0 + j) ? row[j] : -kInfinity;
  }
}

static void additive_scores(const AdditiveScores& f, int64_t task, float* scratch) {
  const AdditiveProblem& p = f.problem;
  const int64_t first = task % f.row_tiles() * f.kRows, column = task / f.row_tiles() % f.key_tiles() * f.kKeys;
  const int64_t b = task / f.row_tiles() / f.key_tiles(), dim = p.padded(), count = min(f.kKeys, p.keys - column);
  float *keys = scratch, *query = keys + f.kKeys * dim, *coverage = query + dim;
  load_rows(p.key, b, 0, column, count, p.features, 1.0f, keys, dim);
  for (int64_t row = first; row < min(first + f.kRows, p.rows); ++row) {
    load_rows(p.query, b, 0, row, 1, p.features, 1.0f, query, dim);
    float* scores = f.scores + (b * p.rows + row) * p.keys + column;
    if (!p.coverage_weight) {
      additive_row<false>(f, b, column, count, query, keys, nullptr, scores);
      continue;
    }
    load_coverage(p, b, row, column, count, coverage);
    additive_row<true>(f, b, column, count, query, keys, coverage, scores);
  }
}

// Keys and queries of one tile of the gradients: the keys and their gradients stay in the first-level cache for 256
// features, and a sum over many queries becomes one of short sums, which round less.
constexpr int64_t kGradientKeys = 16, kGradientRows = 64;

// Pointers into the scratch of one task.
struct GradientScratch {
  float* keys;      // (kGradientKeys, Dp)
  float* dkeys;     // (kGradientKeys, Dp): sums of h over all queries so far
  float* tile;      // (kGradientKeys, Dp): over those of the tile
  float* query;     // (Dp)
  float* dweight;   // (Dp), and
  float* covered;   // (Dp): over the tile, of dS t and of c h
  float* dscores;   // (kGradientKeys) of one query
  float* coverage;  // (kGradientKeys) of one query
  float* products;  // (kGradientKeys, kLanes): w wc h of one query, lane by lane
  int64_t size;

  GradientScratch(const AdditiveGradient& g, float* base) {
    const int64_t dim = g.problem.padded();
    size = 0;
    const auto take = [&](int64_t floats) {
      float* here = base + size;
      size += floats;
      return here;
    };
    keys = take(kGradientKeys * dim);
    dkeys = take(kGradientKeys * dim);
    tile = take(kGradientKeys * dim);
    query = take(dim);
    dweight = take(dim);
    covered = take(dim);
    dscores = take(kGradientKeys);
    coverage = take(kGradientKeys);
    products = take(kGradientKeys * kLanes);
  }
};

static int64_t additive_gradient_scratch(const AdditiveGradient& g) { return GradientScratch(g, nullptr).size; }

// to += from, and from = 0.
static void move_sums(float* to, float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += from[i];
    from[i] = 0.0f;
  }
}

// Adds what one query and `count` keys give to dquery (Dp) and the sums of the tile.
template <bool COVERED, bool PRODUCTS>
static void additive_gradient_row(const AdditiveProblem& p, int64_t count, const GradientScratch& s, float* dquery) {
  const int64_t dim = p.padded();
  for (int64_t d = 0; d < dim; d += kLanes) {
    const vec query = load(s.query + d), weight = load(p.weight + d);
    const vec coverage_weight = COVERED ? load(p.coverage_weight + d) : vec{};
    vec sum = {}, dweight = {}, covered = {};
    for (int64_t j = 0; j < count; ++j) {
      vec x = query + load(s.keys + j * dim + d);
      if constexpr (COVERED) x += s.coverage[j] * coverage_weight;
      const vec t = tanh(x), dscore = splat(s.dscores[j]), h = dscore * ((1.0f - t) * (1.0f + t));
      float* dkey = s.tile + j * dim + d;
      store(dkey, load(dkey) + h);
      sum += h;
      dweight += dscore * t;
      if constexpr (COVERED) covered += s.coverage[j] * h;
      if constexpr (PRODUCTS) {
        float* product = s.products + j * kLanes;
        store(product, load(product) + weight * coverage_weight * h);
      }
    }
    store(dquery + d, load(dquery + d) + sum);
    store(s.dweight + d, load(s.dweight + d) + dweight);
    if constexpr (COVERED) store(s.covered + d, load(s.covered + d) + covered);
  }
}

static void additive_gradient(const AdditiveGradient& g, int64_t task, float* scratch) {
  const AdditiveProblem& p = g.problem;
  const GradientScratch s(g, scratch);
  const int64_t split = task % g.splits, b = task / g.splits, dim = p.padded(), part = split * p.batch + b;
  const int64_t begin = split * g.split_keys(), end = min(begin + g.split_keys(), p.keys);
  float *dquery = g.dquery + part * p.rows * dim, *dweight = g.dweight + part * dim;
  float* dcoverage_weight = offset(g.dcoverage_weight, part * dim);
  clear(dquery, p.rows * dim);
  clear(dweight, dim);
  if (dcoverage_weight) clear(dcoverage_weight, dim);
  clear(s.tile, kGradientKeys * dim);
  clear(s.dweight, dim);
  clear(s.covered, dim);
  for (int64_t column = begin; column < end; column += kGradientKeys) {
    const int64_t count = min(kGradientKeys, end - column);
    clear(s.dkeys, count * dim);
    if (!any_takes_part(p, b, column, count)) {
      for (int64_t row = 0; row < p.rows && g.dcoverage; ++row)
        clear(g.dcoverage + (b * p.rows + row) * p.keys + column, count);
      for (int64_t j = 0; j < count; ++j)
        store_row(s.dkeys, p.features, 1.0f, at(g.dkey, b, 0, column + j, 0), g.dkey.type);
      continue;
    }
    load_rows(p.key, b, 0, column, count, p.features, 1.0f, s.keys, dim);
    for (int64_t j = 0; j < count; ++j)
      if (!takes_part(p, b, column + j)) clear(s.keys + j * dim, dim);
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t place = (b * p.rows + row) * p.keys + column;
      load_rows(p.query, b, 0, row, 1, p.features, 1.0f, s.query, dim);
      for (int64_t j = 0; j < count; ++j) s.dscores[j] = takes_part(p, b, column + j) ? g.dscores[place + j] : 0.0f;
      float* sums = dquery + row * dim;
      if (!p.coverage_weight) {
        additive_gradient_row<false, false>(p, count, s, sums);
      } else {
        load_coverage(p, b, row, column, count, s.coverage);
        if (g.dcoverage) {
          clear(s.products, count * kLanes);
          additive_gradient_row<true, true>(p, count, s, sums);
          for (int64_t j = 0; j < count; ++j) g.dcoverage[place + j] = sum_lanes(load(s.products + j * kLanes));
        } else {
          additive_gradient_row<true, false>(p, count, s, sums);
        }
      }
      if (row % kGradientRows == kGradientRows - 1 || row == p.rows - 1) {
        move_sums(s.dkeys, s.tile, count * dim);
        move_sums(dweight, s.dweight, dim);
        if (dcoverage_weight) move_sums(dcoverage_weight, s.covered, dim);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      float* dkey = s.dkeys + j * dim;
      for (int64_t d = 0; d < dim; d += kLanes) store(dkey + d, load(dkey + d) * load(p.weight + d));
      store_row(dkey, p.features, 1.0f, at(g.dkey, b, 0, column + j, 0), g.dkey.type);
    }
  }
}

static const AdditiveKernels additive_table = {
    additive_scores_scratch, additive_scores, additive_gradient_scratch, additive_gradient};
