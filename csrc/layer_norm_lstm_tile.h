// One step of the layer-normalised LSTM after its products, row by row. Part of kernels.inc.h.

static inline float square_root(float x) { return __builtin_sqrtf(x); }

#define FASTATTN_INLINE static inline
#include "layer_norm_cell.h"
#undef FASTATTN_INLINE

// 1 for the units of the last block that exist, 0 for those that were added.
static inline void last_units(int64_t hidden, float (&real)[kUnits]) {
  const int64_t there = hidden - (hidden - 1) / kUnits * kUnits;
  for (int64_t i = 0; i < kUnits; ++i) real[i] = i < there ? 1.0f : 0.0f;
}

// Of x, blocks of WIDTH numbers, WIDTH / kUnits for each unit; added units hold zeros.
template <int WIDTH>
static inline Moments moments(const float* x, int64_t hidden, const float (&real)[kUnits], float eps) {
  constexpr int vectors = WIDTH / kLanes;
  const int64_t blocks = round_up(hidden, kUnits) / kUnits;
  const float count = (float)(hidden * (WIDTH / kUnits));
  vec sum[vectors], square[vectors];
  for (int v = 0; v < vectors; ++v) sum[v] = square[v] = vec{};
  for (int64_t b = 0; b < blocks; ++b)
    for (int v = 0; v < vectors; ++v) sum[v] += load(x + b * WIDTH + v * kLanes);
  for (int v = 1; v < vectors; ++v) sum[0] += sum[v];
  const float mean = sum_lanes(sum[0]) / count;
  for (int64_t b = 0; b < blocks - 1; ++b)
    for (int v = 0; v < vectors; ++v) {
      const vec distance = load(x + b * WIDTH + v * kLanes) - mean;
      square[v] += distance * distance;
    }
  for (int v = 0; v < vectors; ++v) {
    const vec distance = load(x + (blocks - 1) * WIDTH + v * kLanes) - mean;
    square[v] += distance * distance * load(real + v * kLanes % kUnits);
  }
  for (int v = 1; v < vectors; ++v) square[0] += square[v];
  return moments_of(mean, sum_lanes(square[0]), count, eps);
}

// The share of the previous state in the next for the units from `unit` of a row on.
static inline vec zoneout_share(const Zoneout& zoneout, int64_t at, int64_t count) {
  if (!zoneout.mask) return splat(zoneout.keep);
  float part[kLanes] = {};
  for (int64_t i = 0; i < min(kLanes, count); ++i) part[i] = zoneout.mask[at + i] ? 1.0f : 0.0f;
  return load(part);
}

static inline bool has_zoneout(const Zoneout& zoneout) { return zoneout.mask || zoneout.keep != 0.0f; }

template <bool SAVE>
static void layer_norm_forward_row(
    const LayerNormForwardStep& s, int64_t row, const float (&real)[kUnits], float* scratch) {
  const int64_t units = round_up(s.hidden, kUnits);
  const LayerNormWeights& w = s.weights;
  float *x = s.product_x + row * 4 * units, *h = s.product_h + row * 4 * units, *cell = s.cell + row * units;
  float* fresh = SAVE ? s.saved.normal_c + row * units : scratch;  // c', before and after it is normalised
  float* outputs = scratch + units;
  const Moments of_x = moments<kGateColumns>(x, s.hidden, real, s.eps);
  const Moments of_h = moments<kGateColumns>(h, s.hidden, real, s.eps);
  for (int64_t unit = 0; unit < units; unit += kLanes) {
    const int64_t column = unit / kUnits * kGateColumns + unit % kUnits;
    vec sums[4];
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t at = column + gate * kUnits;
      const vec normal_x = normalise(load(x + at), of_x), normal_h = normalise(load(h + at), of_h);
      if (SAVE) {
        store(x + at, normal_x);
        store(h + at, normal_h);
      }
      const vec of_input = input_share(normal_x, load(w.gain_x + at), load(w.bias + at));
      sums[gate] = gate_sum(of_input, normal_h, load(w.gain_h + at));
    }
    const Gates<vec> gates = lstm_activate(sums[0], sums[1], sums[2], sums[3]);
    store(fresh + unit, lstm_cell_state(gates, load(cell + unit)));
    store(outputs + unit, gates.o);
    if (SAVE) {
      float* to = s.saved.gates + row * 4 * units + column;
      store(to, gates.i);
      store(to + kUnits, gates.f);
      store(to + 2 * kUnits, gates.g);
      store(to + 3 * kUnits, gates.o);
    }
  }
  const Moments of_c = moments<kUnits>(fresh, s.hidden, real, s.eps);
  if (SAVE) {
    float* to = s.saved.deviations + row * 3;
    to[0] = of_x.deviation;
    to[1] = of_h.deviation;
    to[2] = of_c.deviation;
  }
  for (int64_t unit = 0; unit < units; unit += kLanes) {
    const int64_t count = s.hidden - unit;  // below 1 for units that were added
    vec state = load(fresh + unit);
    const vec normal = normalise(state, of_c);
    vec hidden = load(outputs + unit) * tanh(normal * load(w.gain_c + unit) + load(w.bias_c + unit));
    float* previous = s.h + row * s.hidden + unit;
    if (has_zoneout(s.zoneout_h)) {
      const vec share = zoneout_share(s.zoneout_h, row * s.zoneout_row + unit, count);
      hidden = zoneout_state(share, load_lanes(previous, count), hidden);
    }
    if (has_zoneout(s.zoneout_c)) {
      const vec share = zoneout_share(s.zoneout_c, row * s.zoneout_row + unit, count);
      state = zoneout_state(share, load(cell + unit), state);
    }
    store_lanes(previous, hidden, count);
    store_lanes(s.out + row * s.out_row + unit, hidden, count);
    store(cell + unit, state);
    if (s.all_cells) store_lanes(s.all_cells + row * s.out_row + unit, state, count);
    if (SAVE) {
      store(fresh + unit, normal);
      store(s.saved.cells + row * units + unit, state);
    }
  }
}

static void layer_norm_forward(const LayerNormForwardStep& s, float* scratch) {
  float real[kUnits];
  last_units(s.hidden, real);
  for (int64_t row = 0; row < s.rows; ++row)
    if (s.save)
      layer_norm_forward_row<true>(s, row, real, scratch);
    else
      layer_norm_forward_row<false>(s, row, real, scratch);
}

static inline void add_to(float* sum, vec term) { store(sum, load(sum) + term); }

// From the gradient of the normalised numbers to that of the numbers, in place.
static inline void through_normalisation(
    float* gradient, const float* normal, int64_t columns, float deviation, Means means) {
  for (int64_t j = 0; j < columns; j += kLanes)
    store(gradient + j, normalisation_gradient(load(gradient + j), load(normal + j), deviation, means));
}

// From the gradient of h_t to that of the normalised c', to `dnormal`, and of the output gate, to `doutput`. Returns
// the means of the first.
static inline Means hidden_backward(
    const LayerNormBackwardStep& s, int64_t row, float* partial, float* dnormal, float* doutput) {
  const int64_t units = round_up(s.hidden, kUnits);
  const float *gates = s.saved.gates + row * 4 * units, *normal_c = s.saved.normal_c + row * units;
  vec sum{}, sum_product{};
  for (int64_t unit = 0; unit < units; unit += kLanes) {
    const int64_t count = s.hidden - unit;
    const vec normal = load(normal_c + unit), gain = load(s.weights.gain_c + unit);
    const vec output = load(gates + unit / kUnits * kGateColumns + 3 * kUnits + unit % kUnits);
    const vec squashed = tanh(normal * gain + load(s.weights.bias_c + unit));
    float* carried = s.dh + row * units + unit;
    vec dh = load(carried) + load(s.product + row * units + unit), kept{};
    if (s.grad_out) dh += load_lanes(s.grad_out + row * s.grad_row + unit, count);
    if (has_zoneout(s.zoneout_h)) {
      const vec share = zoneout_share(s.zoneout_h, row * s.zoneout_row + unit, count);
      kept = share * dh;
      dh = (1.0f - share) * dh;
    }
    store(carried, kept);
    const HiddenGradient<vec> grad = hidden_gradient(output, squashed, gain, dh);
    store(doutput + unit, grad.output);
    store(dnormal + unit, grad.normal);
    add_to(partial + 12 * units + unit, grad.sum * normal);
    add_to(partial + 13 * units + unit, grad.sum);
    sum += grad.normal;
    sum_product += grad.normal * normal;
  }
  return {sum_lanes(sum) / (float)s.hidden, sum_lanes(sum_product) / (float)s.hidden};
}

static void layer_norm_backward_row(const LayerNormBackwardStep& s, int64_t row, float* scratch) {
  const int64_t units = round_up(s.hidden, kUnits), columns = 4 * units;
  const LayerNormWeights& w = s.weights;
  float* partial = s.partial + (s.first + row) / kPartialRows * 14 * units;
  float *dnormal = scratch, *doutput = scratch + units;
  const float *normal_x = s.normal_x + row * columns, *normal_h = s.normal_h + row * columns;
  const float *saved = s.saved.gates + row * columns, *normal_c = s.saved.normal_c + row * units;
  const float *previous = s.previous + row * units, *deviations = s.saved.deviations + row * 3;
  float *dx = s.dproduct_x + row * columns, *dh = s.dproduct_h + row * columns, *dcell = s.dcell + row * units;
  const Means of_c = hidden_backward(s, row, partial, dnormal, doutput);
  vec sum_x{}, product_x{}, sum_h{}, product_h{};
  for (int64_t unit = 0; unit < units; unit += kLanes) {
    const int64_t count = s.hidden - unit, column = unit / kUnits * kGateColumns + unit % kUnits;
    vec later = load(dcell + unit), kept{};
    if (s.grad_cells) later += load_lanes(s.grad_cells + row * s.grad_row + unit, count);
    if (has_zoneout(s.zoneout_c)) {
      const vec share = zoneout_share(s.zoneout_c, row * s.zoneout_row + unit, count);
      kept = share * later;
      later = (1.0f - share) * later;
    }
    const vec dn = load(dnormal + unit), normal = load(normal_c + unit);
    const vec dc = later + normalisation_gradient(dn, normal, deviations[2], of_c);
    const float* at_gates = saved + column;
    const Gates<vec> gates{load(at_gates), load(at_gates + kUnits), load(at_gates + 2 * kUnits),
                           load(at_gates + 3 * kUnits)};
    const CellGradient<vec> grad = lstm_gate_gradient(gates, load(previous + unit), dc, load(doutput + unit));
    store(dcell + unit, kept + grad.previous);
    const vec each[] = {grad.gates.i, grad.gates.f, grad.gates.g, grad.gates.o};
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t at = column + gate * kUnits;
      const vec of_sum = each[gate], n_x = load(normal_x + at), n_h = load(normal_h + at);
      add_to(partial + at, of_sum * n_x);
      add_to(partial + columns + at, of_sum * n_h);
      add_to(partial + 2 * columns + at, of_sum);
      const vec dn_x = of_sum * load(w.gain_x + at), dn_h = of_sum * load(w.gain_h + at);
      store(dx + at, dn_x);
      store(dh + at, dn_h);
      sum_x += dn_x;
      product_x += dn_x * n_x;
      sum_h += dn_h;
      product_h += dn_h * n_h;
    }
  }
  const float count = (float)(4 * s.hidden);
  const Means of_x{sum_lanes(sum_x) / count, sum_lanes(product_x) / count};
  const Means of_h{sum_lanes(sum_h) / count, sum_lanes(product_h) / count};
  through_normalisation(dx, normal_x, columns, deviations[0], of_x);
  through_normalisation(dh, normal_h, columns, deviations[1], of_h);
}

static void layer_norm_backward(const LayerNormBackwardStep& s, float* scratch) {
  for (int64_t row = 0; row < s.rows; ++row) layer_norm_backward_row(s, row, scratch);
}

static const LayerNormLstmKernels layer_norm_lstm_table = {layer_norm_forward, layer_norm_backward};
