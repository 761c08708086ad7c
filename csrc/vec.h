// One vector register of floats, and the exponential. Part of kernels.inc.h: compiled once per instruction set.
//
// GCC and Clang lower arithmetic on these types to the widest instructions the including file is compiled for.

typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t ivec __attribute__((vector_size(kLanes * 4)));

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

constexpr float kInfinity = __builtin_inff();

// exp(x), within 2 units in the last place; 0 below the smallest normal result, inf above the largest, NaN for NaN.
//
// x = n log 2 + r with |r| <= log 2 / 2. n is rounded by adding 1.5 * 2**23, which leaves it in the low bits. The
// coefficients are the degree-6 minimax fit of exp on that interval with 1 and r fixed (relative error 3e-9).
static inline vec exp(vec x) {
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
  const vec large = x > 88.0f ? splat(kInfinity) : x;  // keeps NaN
  return x < -87.0f ? vec{} : (x <= 88.0f ? result : large);
}

static inline float sum_lanes(vec v) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

static inline float max_lanes(vec v) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

static inline float exp(float x) { return exp(splat(x))[0]; }
