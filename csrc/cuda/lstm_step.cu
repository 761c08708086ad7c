// The kernels of the step-by-step path, and the small ones around both paths: one thread for each element.
#include <algorithm>
#include <cstring>

#include "cells.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;

FASTATTN_INLINE int64_t thread_number() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

template <class T>
__global__ void __launch_bounds__(kThreads) forward_step_kernel(const ForwardStep a) {
  const int64_t H = a.cells.hidden, b = thread_number() / H, j = thread_number() % H;
  if (b >= a.rows) return;
  const int64_t n = a.first_row + b;
  const Gates<float> sums = input_sums<T>(a.cells, n, j) + bias_sums<T>(a.cells, j) +
                            four_rows<T>(a.hidden_gates, b * 4 * H + j, H);
  const float m = forward_cell<T>(a.cells, n, j, sums, a.cell_state[b * H + j]);
  if (a.hidden_state) put<T>(a.hidden_state, b * H + j, m);
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_step_kernel(const BackwardStep a) {
  const int64_t H = a.cells.hidden, b = thread_number() / H, j = thread_number() % H;
  if (b >= a.rows) return;
  const int64_t n = a.first_row + b;
  const Saved saved = load_saved<T>(a.cells, n, b < a.previous_rows ? a.previous_row + b : -1, b, j);
  float& grad_c = a.grad_cell[b * H + j];
  grad_c = backward_cell<T>(a.cells, n, j, saved, element<T>(a.grad_state, b * H + j), grad_c);
}

template <class T>
__global__ void __launch_bounds__(kThreads) unprojected_kernel(const Unprojected a) {
  const int64_t n = thread_number() / a.hidden, j = thread_number() % a.hidden;
  if (n >= a.rows) return;
  const float o = load_gates<T>(a.gates, n * (a.gates_stride / 4) + j).o;
  put<T>(a.out, n * a.hidden + j, o * tanh(a.cells[n * a.cells_stride + j]));
}

// One block for each 32 rows of a step: blocks are numbered step after step as if every step had the whole batch.
constexpr int64_t kPreviousRows = 32;

template <class T>
__global__ void __launch_bounds__(kThreads) previous_states_kernel(const Previous a) {
  const int64_t pieces = (a.steps.batch + kPreviousRows - 1) / kPreviousRows;
  const int64_t t = blockIdx.x / pieces, begin = blockIdx.x % pieces * kPreviousRows;
  const int64_t before = a.reverse ? t + 1 : t - 1;
  const int64_t n = first_row(a.steps, t), carried = rows_of(a.steps, before);
  const int64_t source = carried > 0 ? first_row(a.steps, before) : 0;
  const int64_t left = rows_of(a.steps, t) - begin;
  const int64_t count = (left < kPreviousRows ? left : kPreviousRows) * a.state;
  const T *out = static_cast<const T*>(a.out), *h0 = static_cast<const T*>(a.h0);
  for (int64_t e = threadIdx.x; e < count; e += kThreads) {
    const int64_t b = begin + e / a.state, j = e % a.state;
    const T h = b < carried ? out[(source + b) * a.out_stride + j] : h0[b * a.state + j];
    put<T>(a.result, (n + b) * a.state + j, to_float(h) * factor(a.mask, n + b, b, j));
  }
}

// 4 KiB of arguments is what every driver takes.
constexpr int64_t kUpload = 480;

struct Upload {
  int64_t* to;
  int64_t count;
  int64_t value[kUpload];
};

__global__ void __launch_bounds__(kThreads) upload_kernel(const Upload a) {
  for (int64_t e = threadIdx.x; e < a.count; e += kThreads) a.to[e] = a.value[e];
}

// The instance of a kernel for a type; no launch where there is nothing to do.
template <class Args>
void launch_for(
    Element type, Kernel<Args> half_kernel, Kernel<Args> bfloat16_kernel, Kernel<Args> single_kernel, int64_t blocks,
    const Args& args, void* stream) {
  if (blocks == 0) return;
  const Kernel<Args> kernel = type == Element::half       ? half_kernel
                              : type == Element::bfloat16 ? bfloat16_kernel
                                                          : single_kernel;
  launch(kernel, blocks, kThreads, args, stream);
}

int64_t blocks_for(int64_t elements) { return (elements + kThreads - 1) / kThreads; }

}  // namespace

void forward_step(Element type, const ForwardStep& step, void* stream) {
  launch_for<ForwardStep>(
      type, forward_step_kernel<half>, forward_step_kernel<bfloat16>, forward_step_kernel<float>,
      blocks_for(step.rows * step.cells.hidden), step, stream);
}

void backward_step(Element type, const BackwardStep& step, void* stream) {
  launch_for<BackwardStep>(
      type, backward_step_kernel<half>, backward_step_kernel<bfloat16>, backward_step_kernel<float>,
      blocks_for(step.rows * step.cells.hidden), step, stream);
}

void unprojected(Element type, const Unprojected& args, void* stream) {
  launch_for<Unprojected>(
      type, unprojected_kernel<half>, unprojected_kernel<bfloat16>, unprojected_kernel<float>,
      blocks_for(args.rows * args.hidden), args, stream);
}

void previous_states(Element type, const Previous& args, void* stream) {
  const int64_t pieces = (args.steps.batch + kPreviousRows - 1) / kPreviousRows;
  launch_for<Previous>(
      type, previous_states_kernel<half>, previous_states_kernel<bfloat16>, previous_states_kernel<float>,
      args.steps.count * pieces, args, stream);
}

void upload(const int64_t* values, int64_t count, int64_t* to, void* stream) {
  for (int64_t begin = 0; begin < count; begin += kUpload) {
    Upload piece{to + begin, std::min(kUpload, count - begin), {}};
    std::memcpy(piece.value, values + begin, static_cast<size_t>(piece.count) * sizeof(int64_t));
    launch<Upload>(upload_kernel, 1, kThreads, piece, stream);
  }
}

}  // namespace fastattn::cuda
