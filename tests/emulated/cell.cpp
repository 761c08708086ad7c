// csrc/lstm_cell.h for one float at a time, called from Python through ctypes.
#include <cmath>

#define FASTATTN_INLINE inline

namespace {

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
float tanh(float x) { return std::tanh(x); }

#include "lstm_cell.h"

}  // namespace

// sums: i, f, g, o before the activations. result: the four gates, c_t, m_t, then with dm and dc the gradients of the
// four sums and of the previous cell.
extern "C" void cell(const float* sums, float previous, float dm, float dc, float* result) {
  const Gates<float> gates = lstm_activate(sums[0], sums[1], sums[2], sums[3]);
  const float c = lstm_cell_state(gates, previous), tanh_c = tanh(c);
  const CellGradient<float> grad = lstm_cell_gradient(gates, previous, tanh_c, dm, dc);
  const float all[] = {gates.i,      gates.f,      gates.g,      gates.o,      c,            gates.o * tanh_c,
                       grad.gates.i, grad.gates.f, grad.gates.g, grad.gates.o, grad.previous};
  for (int k = 0; k < 11; ++k) result[k] = all[k];
}
