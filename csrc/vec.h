// One vector register of floats, the exponential, the sigmoid and the hyperbolic tangent. Part of kernels.inc.h: compiled
// once per instruction set.
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

// The second operand where either is NaN, which is what MAXPS and MINPS do. GCC 12 makes a comparison and a blend of the
// conditional, which take twice as long.
#if defined(FASTATTN_MAX) && !defined(__clang__)
static inline vec max(vec a, vec b) { return FASTATTN_MAX(a, b); }
static inline vec min(vec a, vec b) { return FASTATTN_MIN(a, b); }
#else
static inline vec max(vec a, vec b) { return a > b ? a : b; }
static inline vec min(vec a, vec b) { return a < b ? a : b; }
#endif

// x within [-bound, bound]; NaN stays NaN.
static inline vec clamp(vec x, float bound) { return min(splat(bound), max(splat(-bound), x)); }

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

template <class F, int... I>
__attribute__((always_inline)) static inline void unrolled_over([[maybe_unused]] F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f of 0, 1, ... COUNT - 1 as constants. GCC 12 unrolls a loop over an array of vectors too late to take the array for
// registers: it is in memory before and after the loop that uses it, for each of which it is loaded and stored.
template <int COUNT, class F>
__attribute__((always_inline)) static inline void unrolled(F f) {
  unrolled_over(f, std::make_integer_sequence<int, COUNT>{});
}

// Keeps v in a register for several uses, each of which GCC 12 would else read from memory.
static inline void keep(vec& v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
}

// A null pointer stays null.
template <class T>
static inline T* offset(T* p, int64_t by) {
  return p ? p + by : nullptr;
}

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

constexpr float kInfinity = __builtin_inff();

// exp(x) = 2**n (1 + m) for -87 <= x <= 88, with m within 2 units in its last place.
//
// x = n log 2 + r with |r| <= log 2 / 2, m = exp(r) - 1. n is rounded by adding 1.5 * 2**23, which leaves it in the low
// bits. The coefficients are the degree-6 minimax fit of exp on that interval with 1 and r fixed (relative error 3e-9).
struct Exponential {
  vec m;
  ivec n;  // shifted to where the exponent of a float stands
};

__attribute__((always_inline)) static inline Exponential exponential(vec x) {
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
  return {q * (r * r) + r, (ivec)shifted << 23};
}

// 2**n
static inline vec power(Exponential e) { return (vec)(e.n + 0x3f800000); }

// exp(x) within 2 units in the last place for x <= 88; 0 below the smallest normal result, NaN for any NaN.
__attribute__((always_inline)) static inline vec exp(vec x) {
  const Exponential e = exponential(x);
  const vec result = (vec)((ivec)(e.m + 1.0f) + e.n);
  return x >= -87.0f ? result : max(vec{}, x);  // of what is not greater than 0, max keeps NaN
}

// a b + c, rounded once where that must not be left to the compiler.
static inline vec multiply_add(vec a, vec b, vec c) {
#if defined(FASTATTN_FMA) && !defined(__clang__)
  return FASTATTN_FMA(a, b, c);
#else
  return a * b + c;
#endif
}

// a / b within 1 unit in the last place, where b, 1 / b and the result are normal. The AVX-512 division of 16 numbers
// takes as long as 16 multiplications; an estimate of 14 bits and one step of Newton's method are four instructions.
static inline vec quotient(vec a, vec b) {
#if defined(FASTATTN_RECIPROCAL_ESTIMATE)
  const vec estimate = FASTATTN_RECIPROCAL_ESTIMATE(b), result = a * estimate;
  return multiply_add(estimate, multiply_add(-result, b, a), result);
#else
  return a / b;
#endif
}

// 1 / (1 + exp(-x)) within 3 units in the last place; about the smallest normal number where it would be less, NaN for
// any NaN: m is one, where bits added to bits could be a number.
__attribute__((always_inline)) static inline vec sigmoid(vec x) {
  const Exponential e = exponential(-clamp(x, 87.0f));
  return quotient(splat(1.0f), power(e) * e.m + (power(e) + 1.0f));
}

// tanh(x) = u / (u + 2) with u = exp(2 |x|) - 1 and the sign of x, within 3 units in the last place, near 0 too, and
// within 1.3 from |x| = 2 on, where 1 - tanh(x)^2 shows what it errs by: u + 2 rounds twice as much for x below 0. NaN for
// NaN. From |x| = 9.01 on it rounds to 1.
__attribute__((always_inline)) static inline vec tanh(vec x) {
  const vec size = min(splat(10.0f), (vec)((ivec)x & 0x7fffffff));
  const Exponential e = exponential(size + size);
  const vec u = power(e) * e.m + (power(e) - 1.0f);
  return (vec)((ivec)quotient(u, u + 2.0f) | ((ivec)x & ~0x7fffffff));
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

// Lane i is the sum of row i's lanes; the rows are spent.
template <int DISTANCE = kLanes / 2>
static inline vec sum_rows(vec (&rows)[kLanes]) {
  if constexpr (DISTANCE == 0) return rows[0];
  for (int i = 0; i < DISTANCE; ++i) {
    swap_blocks<DISTANCE>(rows[i], rows[i + DISTANCE], Lanes{});
    rows[i] += rows[i + DISTANCE];
  }
  return sum_rows<DISTANCE / 2>(rows);
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
