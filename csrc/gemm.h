// The matrix product of one tile, blocked over registers. Part of kernels.inc.h.
//
// C (M, N) = or += A (M, K) B (K, N). An element of A is A[m * a_row + k * a_k], so A may be transposed; B and C have
// contiguous rows with leading dimensions b_row and c_row. N is a multiple of kPad: callers pad with zeros.

struct Matrix {
  const float* data;
  int64_t row, column;  // strides
};

// Where B is larger than the second-level cache, its rows are asked for this many products ahead: on Intel's processors
// 1.3 to 1.8 times the speed for 8 to 16 rows of A and B of 4 to 16 MB, nothing for 1. See asks_ahead.
constexpr int64_t kAhead = 32;

// ROWS x VECTORS accumulators stay in registers over the whole K loop. They start at zero and are added to C at the end:
// sums over many keys so become sums of short sums, which round less.
template <int ROWS, int VECTORS, bool STREAMED>
__attribute__((always_inline)) static inline void micro_kernel(
    int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate) {
  vec sum[ROWS][VECTORS];
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < VECTORS; ++v) sum[m][v] = vec{};
  for (int64_t k = 0; k < K; ++k) {
    vec right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = load(b + v * kLanes);
    if constexpr (STREAMED && ROWS >= 4)
      for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(b + kAhead * b_row + v * kLanes, 0, 2);
    for (int m = 0; m < ROWS; ++m) {
      const vec left = splat(a[m * a_row]);
      for (int v = 0; v < VECTORS; ++v) sum[m][v] += left * right[v];
    }
    a += a_k;
    b += b_row;
  }
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < VECTORS; ++v) {
      float* to = c + m * c_row + v * kLanes;
      store(to, accumulate ? load(to) + sum[m][v] : sum[m][v]);
    }
}

template <int ROWS, int VECTORS, bool STREAMED>
static void micro_rows(
    int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate) {
  micro_kernel<ROWS, VECTORS, STREAMED>(K, a, a_row, a_k, b, b_row, c, c_row, accumulate);
}

// M rows, at most ROWS: the kernel of exactly that height.
template <int ROWS, int VECTORS, bool STREAMED>
static inline void block(
    int64_t M, int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row, float* c,
    int64_t c_row, bool accumulate) {
  if constexpr (ROWS > 0) {
    if (M == ROWS) return micro_rows<ROWS, VECTORS, STREAMED>(K, a, a_row, a_k, b, b_row, c, c_row, accumulate);
    block<ROWS - 1, VECTORS, STREAMED>(M, K, a, a_row, a_k, b, b_row, c, c_row, accumulate);
  }
}

// All rows of a strip of VECTORS registers of columns, in as few blocks as can be, of about the same height.
template <int VECTORS, bool STREAMED>
static void strip(
    int64_t M, int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  constexpr int rows = kAccumulators / VECTORS < kMaxRows ? kAccumulators / VECTORS : kMaxRows;
  const int64_t blocks = (M + rows - 1) / rows;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t m = M * i / blocks;
    block<rows, VECTORS, STREAMED>(
        M * (i + 1) / blocks - m, K, a.data + m * a.row, a.row, a.column, b, b_row, c + m * c_row, c_row, accumulate);
  }
}

template <int VECTORS, bool STREAMED>
static inline void last_strip(
    int64_t vectors, int64_t M, int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate) {
  if constexpr (VECTORS > 0) {
    if (vectors == VECTORS) return strip<VECTORS, STREAMED>(M, K, a, b, b_row, c, c_row, accumulate);
    last_strip<VECTORS - 1, STREAMED>(vectors, M, K, a, b, b_row, c, c_row, accumulate);
  }
}

template <bool STREAMED>
static void gemm_columns(
    int64_t M, int64_t N, int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate) {
  int64_t n = 0;
  for (; n + kMaxVectors * kLanes <= N; n += kMaxVectors * kLanes)
    strip<kMaxVectors, STREAMED>(M, K, a, b + n, b_row, c + n, c_row, accumulate);
  last_strip<kMaxVectors - 1, STREAMED>((N - n) / kLanes, M, K, a, b + n, b_row, c + n, c_row, accumulate);
}

// STREAMED: B comes from beyond the second-level cache, and is asked for.
template <bool STREAMED = false>
static void gemm(
    int64_t M, int64_t N, int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate) {
  constexpr int64_t longest = 128;  // terms of one short sum
  for (int64_t k = 0; k < K; k += longest)
    gemm_columns<STREAMED>(
        M, N, min(longest, K - k), {a.data + k * a.column, a.row, a.column}, b + k * b_row, b_row, c, c_row,
        accumulate || k > 0);
}
