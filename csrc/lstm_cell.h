// The gates of the LSTM and their derivatives: once, for the host's vectors and for one element on a device.
//
// The including file defines, for the type V it uses, sigmoid(V) and tanh(V), and FASTATTN_INLINE, the qualifiers of an
// inline function there. No includes and no include guard: it is compiled once per instruction set, see kernels.inc.h.

// Activated gates.
template <class V>
struct Gates {
  V i, f, g, o;
};

template <class V>
FASTATTN_INLINE Gates<V> lstm_activate(V i, V f, V g, V o) {
  return {sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)};
}

// c_t = f c_{t-1} + i g
template <class V>
FASTATTN_INLINE V lstm_cell_state(const Gates<V>& gates, V previous) {
  return gates.f * previous + gates.i * gates.g;
}

template <class V>
struct CellGradient {
  Gates<V> gates;  // of the sums before the activations
  V previous;      // of c_{t-1}
};

// From dc, the whole gradient of c_t, and dout, that of the output gate.
template <class V>
FASTATTN_INLINE CellGradient<V> lstm_gate_gradient(const Gates<V>& gates, V previous, V dc, V dout) {
  CellGradient<V> result;
  result.gates.i = dc * gates.g * gates.i * (1.0f - gates.i);
  result.gates.f = dc * previous * gates.f * (1.0f - gates.f);
  result.gates.g = dc * gates.i * (1.0f - gates.g * gates.g);
  result.gates.o = dout * gates.o * (1.0f - gates.o);
  result.previous = dc * gates.f;
  return result;
}

// From dm, the gradient of m = o tanh(c), and dc, what reaches c_t from later steps. tanh_c is tanh(c_t).
template <class V>
FASTATTN_INLINE CellGradient<V> lstm_cell_gradient(const Gates<V>& gates, V previous, V tanh_c, V dm, V dc) {
  return lstm_gate_gradient(gates, previous, dc + dm * gates.o * (1.0f - tanh_c * tanh_c), dm * tanh_c);
}
