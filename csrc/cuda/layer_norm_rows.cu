// What the layer-normalised LSTM computes of all rows at once, before or after the recurrence.
#include "layer_norm_row.cuh"

namespace fastattn::cuda {

namespace {

template <int THREADS, int UNITS>
__global__ void __launch_bounds__(kBlockThreads<THREADS>) normalise_inputs_kernel(const NormaliseInputs a) {
  FASTATTN_SHARED(memory);
  const int64_t n = row_number<THREADS>(), H = a.hidden;
  if (n >= a.rows) return;  // all threads of a row
  RowSums<THREADS> row_sums(memory);
  const auto product =
      values_of<THREADS, UNITS>(H, [&](int, int64_t j) { return four_rows<float>(a.product, n * 4 * H + j, H); });
  const Moments of_x = moments<THREADS, UNITS>(row_sums, H, static_cast<float>(4 * H), a.eps, product);
  for_units<THREADS, UNITS>(H, [&](int u, int64_t j) {
    store_gates<float>(a.normal_x, n * H + j, normalise(product(u, j), of_x));
  });
  if (a.deviations && threadIdx.x % THREADS == 0) a.deviations[3 * n] = of_x.deviation;
}

// Of a unit: dn_x and n_x.
struct OfInput {
  Gates<float> grad, normal;
};

template <class T, int THREADS, int UNITS>
__global__ void __launch_bounds__(kBlockThreads<THREADS>) input_gradients_kernel(const InputGradients a) {
  FASTATTN_SHARED(memory);
  const int64_t n = row_number<THREADS>(), H = a.hidden;
  if (n >= a.rows) return;  // all threads of a row
  RowSums<THREADS> row_sums(memory);
  const auto input = values_of<THREADS, UNITS>(H, [&](int, int64_t j) {
    return OfInput{
        load_gates<float>(a.grad_sums, n * H + j) * four_rows<T>(a.gain_x, j, H),
        load_gates<float>(a.normal_x, n * H + j)};
  });
  const Means of_x = means<THREADS, UNITS>(row_sums, H, static_cast<float>(4 * H), [&](int u, int64_t j) {
    const OfInput of = input(u, j);
    return Pair{total(of.grad), total(of.grad * of.normal)};
  });
  for_units<THREADS, UNITS>(H, [&](int u, int64_t j) {
    const OfInput of = input(u, j);
    put_four_rows<T>(
        a.grad_product, n * 4 * H + j, H, normalisation_gradient(of.grad, of.normal, a.deviations[3 * n], of_x));
  });
}

// A thread for each unit of a chunk of rows: no sum is shared, so the order of additions is always the same.
constexpr int kColumnThreads = 128;

__global__ void __launch_bounds__(kColumnThreads) column_sums_kernel(const ColumnSums a) {
  const int64_t H = a.hidden, pieces = (H + kColumnThreads - 1) / kColumnThreads;
  const int64_t chunk = blockIdx.x / pieces, j = blockIdx.x % pieces * kColumnThreads + threadIdx.x;
  if (j >= H) return;
  const int64_t begin = chunk * kChunkRows, end = begin + kChunkRows < a.rows ? begin + kChunkRows : a.rows;
  Gates<float> gain_x{}, gain_h{}, bias{};
  float gain_c = 0.0f, bias_c = 0.0f;
#pragma unroll 4
  for (int64_t n = begin; n < end; ++n) {
    const Gates<float> grad = load_gates<float>(a.grad_sums, n * H + j);
    const float squashed = a.grad_squashed[n * H + j];
    gain_x = gain_x + grad * load_gates<float>(a.saved.normal_x, n * H + j);
    gain_h = gain_h + grad * load_gates<float>(a.saved.normal_h, n * H + j);
    bias = bias + grad;
    gain_c += squashed * a.saved.normal_c[n * H + j];
    bias_c += squashed;
  }
  float* to = a.result + chunk * 14 * H + j;
  put_four_rows<float>(to, 0, H, gain_x);
  put_four_rows<float>(to, 4 * H, H, gain_h);
  put_four_rows<float>(to, 8 * H, H, bias);
  to[12 * H] = gain_c;
  to[13 * H] = bias_c;
}

}  // namespace

void normalise_inputs(const NormaliseInputs& args, void* stream) {
  launch_rows(Element::single, args, stream, [](auto shape) {
    using S = decltype(shape);
    return normalise_inputs_kernel<S::kThreads, S::kUnits>;
  });
}

void input_gradients(Element type, const InputGradients& args, void* stream) {
  launch_rows(type, args, stream, [](auto shape) {
    using S = decltype(shape);
    return input_gradients_kernel<typename S::T, S::kThreads, S::kUnits>;
  });
}

void column_sums(const ColumnSums& args, void* stream) {
  const int64_t chunks = (args.rows + kChunkRows - 1) / kChunkRows;
  const int64_t pieces = (args.hidden + kColumnThreads - 1) / kColumnThreads;
  if (chunks > 0) launch<ColumnSums>(column_sums_kernel, chunks * pieces, kColumnThreads, args, stream);
}

}  // namespace fastattn::cuda
