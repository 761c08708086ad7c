// Reading and writing tensors of every type as float32 tiles. Part of kernels.inc.h.

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

static inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

static inline float to_float(float x) { return x; }
static inline float to_float(double x) { return (float)x; }
static inline float to_float(BFloat16 x) { return float_of((uint32_t)x.bits << 16); }

// The exponents of the two formats differ by 112 in their bias. A subnormal half is a multiple of 2**-24; no step here
// makes a subnormal float of it, which the LSTM's threads take for zero.
static inline float to_float(Half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t subnormal = bits_of((float)(int32_t)(x.bits & 0x3ffu) * 0x1p-24f);
  uint32_t bits = magnitude < 1u << 23 ? subnormal : magnitude + (112u << 23);
  bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bits;
  return float_of(bits | (uint32_t)(x.bits & 0x8000u) << 16);
}

static inline void from_float(float x, float* y) { *y = x; }
static inline void from_float(float x, double* y) { *y = x; }

// Round to nearest, ties to even: half a unit less one, plus the last bit that stays.
static inline void from_float(float x, BFloat16* y) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  y->bits = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline void from_float(float x, Half* y) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  // Below 2**-14 a half is a multiple of 2**-24, the unit of 0.5f: adding 0.5 rounds to it.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  y->bits = (uint16_t)(result | (bits >> 16 & 0x8000u));
}

// kLanes numbers of any type.
static inline vec load_as(const float* p) { return load(p); }
static inline vec load_as(const BFloat16* p) {
  half_words bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (vec)(__builtin_convertvector(bits, words) << 16);
}
#if defined(FASTATTN_F16C)
static inline vec load_as(const Half* p) {
  half_words bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  vec wide;
  __asm__("vcvtph2ps %1, %0" : "=v"(wide) : "v"(bits));
  return wide;
}
#endif
template <class T>
static inline vec load_as(const T* p) {
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = to_float(p[i]);
  return load(wide);
}

static inline void store_as(float* p, vec v) { store(p, v); }
static inline void store_as(BFloat16* p, vec v) {  // as from_float: to nearest, ties to even
  const words bits = (words)v;
  const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const half_words narrow = __builtin_convertvector(v == v ? rounded : words{} + 0x7fc0u, half_words);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
template <class T>
static inline void store_as(T* p, vec v) {
  float wide[kLanes];
  store(wide, v);
  for (int i = 0; i < kLanes; ++i) from_float(wide[i], p + i);
}

// Calls f with a null pointer of the element type: the type as a compile-time argument.
template <class F>
static inline void with_float_type(Type type, F f) {
  switch (type) {
    case Type::half: return f((Half*)nullptr);
    case Type::bfloat16: return f((BFloat16*)nullptr);
    case Type::twice: return f((double*)nullptr);
    default: return f((float*)nullptr);
  }
}

static inline char* at(const Tensor4& t, int64_t i, int64_t j, int64_t k, int64_t l) {
  return (char*)t.data + element_size(t.type) * (i * t.stride[0] + j * t.stride[1] + k * t.stride[2] + l * t.stride[3]);
}

// Asks for the row some rows on: rows of one head are far apart where the heads of a row stand side by side, and the
// processor does not guess them. Beyond the end nothing is read.
static inline void prefetch_row(const Tensor4& t, int64_t b, int64_t h, int64_t row, int64_t columns) {
  constexpr int64_t ahead = 8, line = 64;
  const char *from = at(t, b, h, row + ahead, 0), *end = at(t, b, h, row + ahead, columns);
  for (; from < end; from += line) prefetch(from);
}

// Rows [row, row + rows) of t[b, h], times a factor, to dst with leading dimension dst_row; columns from `columns` to
// its multiple of kPad are zero.
static void load_rows(
    const Tensor4& t, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t columns, float factor, float* dst,
    int64_t dst_row) {
  const int64_t padded = round_up(columns, kPad), step = t.stride[3];
  with_float_type(t.type, [&](auto* type) {
    using T = __typeof__(*type);
    for (int64_t i = 0; i < rows; ++i) {
      const T* src = (const T*)at(t, b, h, row + i, 0);
      float* to = dst + i * dst_row;
      prefetch_row(t, b, h, row + i, columns);
      int64_t j = 0;
      if (step == 1)
        for (; j + kLanes <= columns; j += kLanes) store(to + j, load_as(src + j) * factor);
      for (; j < columns; ++j) to[j] = to_float(src[j * step]) * factor;
      for (int64_t j = columns; j < padded; ++j) to[j] = 0.0f;
    }
  });
}

// The same rows transposed into one panel (columns, kPanel); rows from `rows` to `filled`, a multiple of kPad, are zero.
static void load_panel(
    const Tensor4& t, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t filled, int64_t columns, float* dst) {
  with_float_type(t.type, [&](auto* type) {
    using T = __typeof__(*type);
    const int64_t step = t.stride[2];
    for (int64_t i0 = 0; i0 < filled; i0 += kLanes) {
      const T* src = (const T*)at(t, b, h, row + i0, 0);
      const int64_t there = min(kLanes, rows - i0);
      for (int64_t j0 = 0; j0 < columns; j0 += kLanes) {
        const int64_t here = min(kLanes, columns - j0);
        const bool asks = j0 * sizeof(T) % 64 == 0;  // for the next rows; beyond the end nothing is read
        vec square[kLanes] = {};
        for (int64_t i = 0; i < there; ++i) {
          const T* from = src + i * step + j0 * t.stride[3];
          if (asks) prefetch(from + kLanes * step);
          if (here == kLanes && t.stride[3] == 1) {
            square[i] = load_as(from);
            continue;
          }
          float part[kLanes] = {};
          for (int64_t j = 0; j < here; ++j) part[j] = to_float(from[j * t.stride[3]]);
          square[i] = load(part);
        }
        transpose(square);
        for (int64_t j = 0; j < here; ++j) store(dst + (j0 + j) * kPanel + i0, square[j]);
      }
    }
  });
}

// One row of n floats, times a factor, to dst of the given type.
static void store_row(const float* src, int64_t n, float factor, void* dst, Type type) {
  with_float_type(type, [&](auto* to) {
    to = (__typeof__(to))dst;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store_as(to + j, load(src + j) * factor);
    for (; j < n; ++j) from_float(src[j] * factor, to + j);
  });
}
