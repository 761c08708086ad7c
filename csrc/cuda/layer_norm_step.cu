// One step of the layer-normalised LSTM between two products: one launch in each way, and a row for its threads alone.
#include "layer_norm_row.cuh"

namespace fastattn::cuda {

namespace {

FASTATTN_INLINE bool has(const Zoneout& zoneout) { return zoneout.mask || zoneout.keep != 0.0f; }

// The share of the previous state in the next one, of unit j in row n.
FASTATTN_INLINE float zoneout_share(const Zoneout& zoneout, int64_t n, int64_t j) {
  return zoneout.mask ? static_cast<float>(zoneout.mask[n * zoneout.stride + j]) : zoneout.keep;
}

template <class T>
FASTATTN_INLINE Gates<float> bias_of(const LayerNormWeights& weights, int64_t j, int64_t hidden) {
  return weights.bias ? four_rows<T>(weights.bias, j, hidden) : Gates<float>{0.0f, 0.0f, 0.0f, 0.0f};
}

template <class T>
FASTATTN_INLINE float bias_of_cell(const LayerNormWeights& weights, int64_t j) {
  return weights.bias_c ? element<T>(weights.bias_c, j) : 0.0f;
}

// What a unit's step is computed from; all of it is asked for at once, before the first sum over the row.
struct ForwardUnit {
  Gates<float> product, share, gain_h;
  float hidden, cell;                    // h_{t-1} and c_{t-1}
  float gain_c, bias_c, keep_h, keep_c;  // the last two of zoneout
  float factor;                          // of the next step's mask
};

struct Fresh {
  Gates<float> gates;
  float cell;  // c'
};

template <class T, int THREADS, int UNITS>
__global__ void __launch_bounds__(kBlockThreads<THREADS>) layer_norm_forward_kernel(const LayerNormForwardStep a) {
  FASTATTN_SHARED(memory);
  const int64_t b = row_number<THREADS>(), n = a.first_row + b, H = a.hidden;
  if (b >= a.rows) return;  // all threads of a row
  RowSums<THREADS> row_sums(memory);
  const bool goes_on = a.mask.factor && b < a.next_rows;

  const auto units = values_of<THREADS, UNITS>(H, [&](int, int64_t j) {
    const Gates<float> normal_x = load_gates<float>(a.saved.normal_x, n * H + j);
    const Gates<float> gain_x = four_rows<T>(a.weights.gain_x, j, H), bias = bias_of<T>(a.weights, j, H);
    return ForwardUnit{
        four_rows<float>(a.product, b * 4 * H + j, H),
        input_share(normal_x, gain_x, bias),
        four_rows<T>(a.weights.gain_h, j, H),
        element<T>(a.hidden_state, b * H + j),
        a.cell_state[b * H + j],
        element<T>(a.weights.gain_c, j),
        bias_of_cell<T>(a.weights, j),
        zoneout_share(a.zoneout_h, n, j),
        zoneout_share(a.zoneout_c, n, j),
        goes_on ? factor(a.mask, a.next_row + b, b, j) : 1.0f};
  });
  const Moments of_h = moments<THREADS, UNITS>(
      row_sums, H, static_cast<float>(4 * H), a.eps, [&](int u, int64_t j) { return units(u, j).product; });
  const auto fresh = values_of<THREADS, UNITS>(H, [&](int u, int64_t j) {
    const ForwardUnit unit = units(u, j);
    const Gates<float> sums = gate_sum(unit.share, normalise(unit.product, of_h), unit.gain_h);
    const Gates<float> gates = lstm_activate(sums.i, sums.f, sums.g, sums.o);
    return Fresh{gates, lstm_cell_state(gates, unit.cell)};
  });
  const Moments of_c = moments<THREADS, UNITS>(
      row_sums, H, static_cast<float>(H), a.eps, [&](int u, int64_t j) { return fresh(u, j).cell; });

  for_units<THREADS, UNITS>(H, [&](int u, int64_t j) {
    const ForwardUnit unit = units(u, j);
    const Fresh made = fresh(u, j);
    const float normal_c = normalise(made.cell, of_c);
    float h = made.gates.o * tanh(normal_c * unit.gain_c + unit.bias_c), c = made.cell;
    if (has(a.zoneout_h)) h = zoneout_state(unit.keep_h, unit.hidden, h);
    if (has(a.zoneout_c)) c = zoneout_state(unit.keep_c, unit.cell, c);
    if (a.saved.gates) {
      store_gates<float>(a.saved.normal_h, n * H + j, normalise(unit.product, of_h));
      store_gates<float>(a.saved.gates, n * H + j, made.gates);
      a.saved.cells[n * H + j] = c;
      a.saved.normal_c[n * H + j] = normal_c;
    }
    a.cell_state[b * H + j] = c;
    put<T>(a.hidden_state, b * H + j, h);
    put<T>(a.out, n * a.out_stride + j, h);
    if (a.cells) put<T>(a.cells, n * a.out_stride + j, c);
    if (goes_on) put<T>(a.next_input, b * H + j, to_float(from_float<T>(h)) * unit.factor);
  });
  if (a.saved.gates && threadIdx.x % THREADS == 0) {
    a.saved.deviations[3 * n + 1] = of_h.deviation;
    a.saved.deviations[3 * n + 2] = of_c.deviation;
  }
}

struct BackwardUnit {
  Gates<float> gates, normal_h, gain_h;
  float grad_hidden, grad_cell;  // of h_t and c_t, all that reaches them
  float previous;                // c_{t-1}
  float normal_c, gain_c, bias_c, keep_h, keep_c;
};

// Of the sums that the gates are activated from, of n_h, and of c_{t-1}.
struct SumsGradient {
  Gates<float> sums, normal_h;
  float previous;
};

template <class T, int THREADS, int UNITS>
__global__ void __launch_bounds__(kBlockThreads<THREADS>) layer_norm_backward_kernel(const LayerNormBackwardStep a) {
  FASTATTN_SHARED(memory);
  const int64_t b = row_number<THREADS>(), n = a.first_row + b, H = a.hidden;
  if (b >= a.rows) return;  // all threads of a row
  RowSums<THREADS> row_sums(memory);
  const float r_h = a.saved.deviations[3 * n + 1], r_c = a.saved.deviations[3 * n + 2];

  const auto units = values_of<THREADS, UNITS>(H, [&](int, int64_t j) {
    float dh = a.grad_hidden[b * H + j], dc = a.grad_cell[b * H + j];
    if (b < a.later_rows) dh += a.grad_input[b * H + j] * factor(a.mask, a.later_row + b, b, j);
    if (a.grad_out) dh += element<T>(a.grad_out, n * a.grad_stride + j);
    if (a.grad_cells) dc += element<T>(a.grad_cells, n * a.grad_stride + j);
    return BackwardUnit{
        load_gates<float>(a.saved.gates, n * H + j),
        load_gates<float>(a.saved.normal_h, n * H + j),
        four_rows<T>(a.weights.gain_h, j, H),
        dh,
        dc,
        b < a.previous_rows ? a.saved.cells[(a.previous_row + b) * H + j] : element<T>(a.c0, b * H + j),
        a.saved.normal_c[n * H + j],
        element<T>(a.weights.gain_c, j),
        bias_of_cell<T>(a.weights, j),
        zoneout_share(a.zoneout_h, n, j),
        zoneout_share(a.zoneout_c, n, j)};
  });
  const auto hidden = values_of<THREADS, UNITS>(H, [&](int u, int64_t j) {
    const BackwardUnit unit = units(u, j);
    const float squashed = tanh(unit.normal_c * unit.gain_c + unit.bias_c);
    return hidden_gradient(unit.gates.o, squashed, unit.gain_c, (1.0f - unit.keep_h) * unit.grad_hidden);
  });
  const Means of_c = means<THREADS, UNITS>(row_sums, H, static_cast<float>(H), [&](int u, int64_t j) {
    const float grad = hidden(u, j).normal;
    return Pair{grad, grad * units(u, j).normal_c};
  });
  const auto sums = values_of<THREADS, UNITS>(H, [&](int u, int64_t j) {
    const BackwardUnit unit = units(u, j);
    const HiddenGradient<float> of = hidden(u, j);
    const float dfresh =
        (1.0f - unit.keep_c) * unit.grad_cell + normalisation_gradient(of.normal, unit.normal_c, r_c, of_c);
    const CellGradient<float> grad = lstm_gate_gradient(unit.gates, unit.previous, dfresh, of.output);
    return SumsGradient{grad.gates, grad.gates * unit.gain_h, unit.keep_c * unit.grad_cell + grad.previous};
  });
  const Means of_h = means<THREADS, UNITS>(row_sums, H, static_cast<float>(4 * H), [&](int u, int64_t j) {
    const Gates<float> grad = sums(u, j).normal_h;
    return Pair{total(grad), total(grad * units(u, j).normal_h)};
  });

  for_units<THREADS, UNITS>(H, [&](int u, int64_t j) {
    const BackwardUnit unit = units(u, j);
    const SumsGradient of = sums(u, j);
    const float squashed = hidden(u, j).sum;
    put_four_rows<T>(
        a.grad_product, n * 4 * H + j, H, normalisation_gradient(of.normal_h, unit.normal_h, r_h, of_h));
    store_gates<float>(a.grad_sums, n * H + j, of.sums);
    a.grad_squashed[n * H + j] = squashed;
    a.grad_hidden[b * H + j] = unit.keep_h * unit.grad_hidden;
    a.grad_cell[b * H + j] = of.previous;
  });
}

}  // namespace

void layer_norm_forward_step(Element type, const LayerNormForwardStep& step, void* stream) {
  launch_rows(type, step, stream, [](auto shape) {
    using S = decltype(shape);
    return layer_norm_forward_kernel<typename S::T, S::kThreads, S::kUnits>;
  });
}

void layer_norm_backward_step(Element type, const LayerNormBackwardStep& step, void* stream) {
  launch_rows(type, step, stream, [](auto shape) {
    using S = decltype(shape);
    return layer_norm_backward_kernel<typename S::T, S::kThreads, S::kUnits>;
  });
}

}  // namespace fastattn::cuda
