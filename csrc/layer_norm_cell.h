// The layer normalisations and the zoneout around the gates of lstm_cell.h, and their derivatives: once, for the host's
// vectors and for one element on a device.
//
//     LN(x) = n = (x - mean) r,   r = 1 / sqrt(variance + eps)
//     sums  = gain_x n_x + gain_h n_h + bias               what the gates are activated from
//     h'    = o tanh(u),   u = gain_c n_c + bias_c         n_c = LN(c')
//     state = z previous + (1 - z) new                     z 0 or 1, or a probability for the expectation
//
// With dn the gradient of n, and likewise the others:
//
//     dx = r (dn - mean(dn) - n mean(dn n))
//     do = dh' tanh(u),   du = dh' o (1 - tanh(u)^2),   dn_c = gain_c du
//
// The including file defines FASTATTN_INLINE, the qualifiers of an inline function there, and square_root(float). No
// includes and no include guard: see lstm_cell.h.

// Mean and r, of the numbers that are normalised together.
struct Moments {
  float mean, deviation;
};

// From the sum of squared distances from the mean of `count` numbers. Taken in a second pass over them: the difference
// of two large sums would lose it.
FASTATTN_INLINE Moments moments_of(float mean, float squares, float count, float eps) {
  return {mean, 1.0f / square_root(squares / count + eps)};
}

template <class V>
FASTATTN_INLINE V normalise(V x, Moments moments) {
  return (x - moments.mean) * moments.deviation;
}

// The share of the input in the sums of a gate, and the whole.
template <class V>
FASTATTN_INLINE V input_share(V normal_x, V gain_x, V bias) {
  return normal_x * gain_x + bias;
}

template <class V>
FASTATTN_INLINE V gate_sum(V share, V normal_h, V gain_h) {
  return share + normal_h * gain_h;
}

template <class V>
FASTATTN_INLINE V zoneout_state(V share, V previous, V fresh) {
  return share * previous + (1.0f - share) * fresh;
}

// mean(dn) and mean(dn n).
struct Means {
  float plain, product;
};

template <class V>
FASTATTN_INLINE V normalisation_gradient(V dn, V normal, float deviation, Means means) {
  return deviation * (dn - means.plain - normal * means.product);
}

template <class V>
struct HiddenGradient {
  V sum, normal, output;  // du, dn_c and do
};

// squashed is tanh(u).
template <class V>
FASTATTN_INLINE HiddenGradient<V> hidden_gradient(V output, V squashed, V gain, V dh) {
  const V sum = dh * output * (1.0f - squashed * squashed);
  return {sum, sum * gain, dh * squashed};
}
