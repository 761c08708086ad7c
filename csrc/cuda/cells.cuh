// One unit of one row, forward and backward: what the kernel for one step and the persistent kernels have in common.
//
// Loads stand apart from the maths: the persistent kernels issue them before they wait for the other blocks.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace fastattn::cuda {

// What of the sums of unit j in row n does not depend on h_{t-1}: four rows of W_ih x, four biases.
template <class T>
FASTATTN_INLINE Gates<float> four_rows(const void* from, int64_t index, int64_t hidden) {
  return {
      element<T>(from, index), element<T>(from, index + hidden), element<T>(from, index + 2 * hidden),
      element<T>(from, index + 3 * hidden)};
}

template <class T>
FASTATTN_INLINE Gates<float> input_sums(const ForwardCells& cells, int64_t n, int64_t j) {
  return four_rows<T>(cells.input_gates, (n - cells.input_row) * 4 * cells.hidden + j, cells.hidden);
}

FASTATTN_INLINE Gates<float> operator+(const Gates<float>& a, const Gates<float>& b) {
  return {a.i + b.i, a.f + b.f, a.g + b.g, a.o + b.o};
}

template <class T>
FASTATTN_INLINE Gates<float> bias_sums(const ForwardCells& cells, int64_t j) {
  if (cells.bias_ih == nullptr) return {0.0f, 0.0f, 0.0f, 0.0f};
  return four_rows<T>(cells.bias_ih, j, cells.hidden) + four_rows<T>(cells.bias_hh, j, cells.hidden);
}

// Row n of all rows is row b of the batch.
FASTATTN_INLINE float factor(const HiddenMask& mask, int64_t n, int64_t b, int64_t j) {
  return mask.factor ? mask.factor[(mask.per_step ? n : b) * mask.stride + j] : 1.0f;
}

// m_t; c holds c_{t-1}, then c_t.
template <class T>
FASTATTN_INLINE float forward_cell(
    const ForwardCells& cells, int64_t n, int64_t j, const Gates<float>& sums, float& c) {
  const Gates<float> gates = lstm_activate(sums.i, sums.f, sums.g, sums.o);
  c = lstm_cell_state(gates, c);
  const float m = gates.o * tanh(c);
  put<T>(cells.out, n * cells.out_stride + j, m);
  if (cells.gates) {
    store_gates<T>(cells.gates, n * (cells.gates_stride / 4) + j, gates);
    cells.cells[n * cells.cells_stride + j] = c;
  }
  return m;
}

struct Saved {
  Gates<float> gates;
  float cell, previous, grad_out;  // c_t, c_{t-1}, and the gradient of m_t from outside
};

// c_{t-1} stands in row `previous`, or for -1 in row b of c0.
template <class T>
FASTATTN_INLINE Saved load_saved(const BackwardCells& cells, int64_t n, int64_t previous, int64_t b, int64_t j) {
  Saved saved;
  saved.gates = load_gates<T>(cells.gates, n * (cells.gates_stride / 4) + j);
  saved.cell = cells.cells[n * cells.cells_stride + j];
  saved.previous =
      previous < 0 ? element<T>(cells.c0, b * cells.hidden + j) : cells.cells[previous * cells.cells_stride + j];
  saved.grad_out = cells.grad_out ? element<T>(cells.grad_out, n * cells.grad_out_stride + j) : 0.0f;
  return saved;
}

// Writes the gradient of the sums and returns that of c_{t-1}.
template <class T>
FASTATTN_INLINE float backward_cell(
    const BackwardCells& cells, int64_t n, int64_t j, const Saved& saved, float grad_m, float grad_c) {
  const auto grad = lstm_cell_gradient(
      saved.gates, saved.previous, tanh(saved.cell), saved.grad_out + grad_m, grad_c);
  const int64_t at = n * 4 * cells.unit_stride + j;
  put<T>(cells.grad_gates, at, grad.gates.i);
  put<T>(cells.grad_gates, at + cells.unit_stride, grad.gates.f);
  put<T>(cells.grad_gates, at + 2 * cells.unit_stride, grad.gates.g);
  put<T>(cells.grad_gates, at + 3 * cells.unit_stride, grad.gates.o);
  return grad.previous;
}

}  // namespace fastattn::cuda
