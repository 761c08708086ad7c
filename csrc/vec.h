// One vector register of floats, the exponential and the hyperbolic tangent. Part of kernels.inc.h: compiled once per
// instruction set.
//
// GCC and Clang lower arithmetic on these types to the widest instructions the including file is compiled for.

typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t ivec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t half_words __attribute__((vector_size(kLanes * 2)));

static inline vec load(const float* p) {
  vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, vec v) { __builtin_memcpy(p, &v, sizeof v); }

// x - 0 is x for every x, so this costs one broadcast instruction.
static inline vec splat(float x) { return x - vec{}; }

static inline vec max(vec a, vec b) { return a > b ? a : b; }

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// A null pointer stays null.
template <class T>
static inline T* offset(T* p, int64_t by) {
  return p ? p + by : nullptr;
}

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

constexpr float kInfinity = __builtin_inff();

// exp(x) for x <= 88, within 2 units in the last place; 0 below the smallest normal result, NaN for any NaN.
//
// x = n log 2 + r with |r| <= log 2 / 2. n is rounded by adding 1.5 * 2**23, which leaves it in the low bits. The
// coefficients are the degree-6 minimax fit of exp on that interval with 1 and r fixed (relative error 3e-9).
__attribute__((always_inline)) static inline vec exp(vec x) {
  const vec shifter = splat(12582912.0f);
  const vec shifted = x * 1.44269504f + shifter;
  const vec n = shifted - shifter;
  vec r = x - n * 0.693145752f;  // the upper bits of log 2: the product is exact
  r = r - n * 1.42860677e-6f;
  vec q = splat(0.001381459878757596f);
  q = q * r + 0.008368716575205326f;
  q = q * r + 0.04166838899254799f;
  q = q * r + 0.1666652113199234f;
  q = q * r + 0.4999999403953552f;
  const vec mantissa = (q * r) * r + r + 1.0f;
  const vec result = (vec)((ivec)mantissa + ((ivec)shifted << 23));
  return x >= -87.0f ? result : max(vec{}, x);  // of what is not greater than 0, max keeps NaN
}

// 1 / x for normal x with a normal result, within 1 unit in the last place. The AVX-512 division of 16 numbers takes as
// long as 16 multiplications; an estimate of 14 bits and one step of Newton's method are three instructions.
static inline vec reciprocal(vec x) {
#if defined(FASTATTN_RECIPROCAL_ESTIMATE)
  const vec estimate = FASTATTN_RECIPROCAL_ESTIMATE(x);
  return estimate * (2.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

// tanh(x) within 2 units in the last place, near 0 too; NaN for NaN.
//
// Near 0 the odd polynomial of degree 11 with 1 fixed that fits tanh on [-0.625, 0.625] best (relative error 5e-9);
// elsewhere 1 - 2 / (exp(2 |x|) + 1), which from 20 on is 1.
__attribute__((always_inline)) static inline vec tanh(vec x) {
  const vec square = x * x;
  vec q = splat(-0.005704985000193119f);
  q = q * square + 0.02063908614218235f;
  q = q * square - 0.05373971536755562f;
  q = q * square + 0.13331441581249237f;
  q = q * square - 0.3333328068256378f;
  const vec small = x + x * square * q;
  const vec size = x < 0.0f ? -x : x;
  const vec large = 1.0f - 2.0f * reciprocal(exp(2.0f * (size > 20.0f ? splat(20.0f) : size)) + 1.0f);
  return size < 0.625f ? small : (x < 0.0f ? -large : large);
}

// Lane i of the result is lane i ^ DISTANCE of v.
template <int DISTANCE, int... I>
static inline vec exchange(vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ DISTANCE)...);
}

using Lanes = std::make_integer_sequence<int, kLanes>;

template <int DISTANCE = kLanes / 2>
static inline float sum_lanes(vec v) {
  if constexpr (DISTANCE == 0)
    return v[0];
  else
    return sum_lanes<DISTANCE / 2>(v + exchange<DISTANCE>(v, Lanes{}));
}

template <int DISTANCE = kLanes / 2>
static inline float max_lanes(vec v) {
  if constexpr (DISTANCE == 0)
    return v[0];
  else
    return max_lanes<DISTANCE / 2>(max(v, exchange<DISTANCE>(v, Lanes{})));
}

// Swap the off-diagonal blocks of size DISTANCE of rows a and b, DISTANCE apart: one step of a transposition.
template <int DISTANCE, int... I>
static inline void swap_blocks(vec& a, vec& b, std::integer_sequence<int, I...>) {
  const vec upper = __builtin_shufflevector(a, b, ((I & DISTANCE) == 0 ? I : kLanes + I - DISTANCE)...);
  b = __builtin_shufflevector(a, b, ((I & DISTANCE) == 0 ? I + DISTANCE : kLanes + I)...);
  a = upper;
}

// Transpose kLanes rows of kLanes floats in registers.
template <int DISTANCE = kLanes / 2>
static inline void transpose(vec (&rows)[kLanes]) {
  if constexpr (DISTANCE > 0) {
    for (int i = 0; i < kLanes; ++i)
      if ((i & DISTANCE) == 0) swap_blocks<DISTANCE>(rows[i], rows[i + DISTANCE], Lanes{});
    transpose<DISTANCE / 2>(rows);
  }
}

static inline float exp(float x) { return exp(splat(x))[0]; }

// Lanes [0, count) of a vector; the others are neither read nor written, and read as zero.
static inline vec load_lanes(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}

static inline void store_lanes(float* p, vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
