// The matrix product of one tile, blocked over registers. Part of kernels.inc.h.
//
// C (M, N) = or += A (M, K) B (K, N). An element of A is A[m * a_row + k * a_k], so A may be transposed; B and C have
// contiguous rows with leading dimensions b_row and c_row. N is a multiple of kPad: callers pad with zeros.

struct Matrix {
  const float* data;
  int64_t row, column;  // strides
};

// ROWS x VECTORS accumulators stay in registers over the whole K loop. They start at zero and are added to C at the end:
// sums over many keys so become sums of short sums, which round less. With each row of B, ASKED vectors are asked
// for, `ahead_step` numbers after those before, to the cache of level LEVEL.
template <int ROWS, int VECTORS, int ASKED, int LEVEL = 2>
__attribute__((always_inline)) static inline void micro_kernel(
    int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate, const float* ahead, int64_t ahead_step) {
  vec sum[ROWS][VECTORS];
  unrolled<ROWS * VECTORS>([&](auto i) __attribute__((always_inline)) { sum[i / VECTORS][i % VECTORS] = vec{}; });
  for (int64_t k = 0; k < K; ++k) {
    vec right[VECTORS];
    unrolled<VECTORS>([&](auto v) __attribute__((always_inline)) { right[v] = load(b + v * kLanes); });
    unrolled<ASKED>([&](auto v) __attribute__((always_inline)) { __builtin_prefetch(ahead + v * kLanes, 0, 4 - LEVEL); });
    unrolled<ROWS>([&](auto m) __attribute__((always_inline)) {
      const vec left = splat(a[m * a_row]);
      unrolled<VECTORS>([&](auto v) __attribute__((always_inline)) { sum[m][v] += left * right[v]; });
    });
    a += a_k;
    b += b_row;
    ahead += ahead_step;
  }
  unrolled<ROWS * VECTORS>([&](auto i) __attribute__((always_inline)) {
    constexpr int m = i / VECTORS, v = i % VECTORS;
    float* to = c + m * c_row + v * kLanes;
    store(to, accumulate ? load(to) + sum[m][v] : sum[m][v]);
  });
}

// Terms of one short sum.
constexpr int64_t kLongestSum = 128;

template <int ROWS, int VECTORS, int ASKED>
static void micro_rows(
    int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate, const float* ahead, int64_t ahead_step) {
  micro_kernel<ROWS, VECTORS, ASKED>(K, a, a_row, a_k, b, b_row, c, c_row, accumulate, ahead, ahead_step);
}

// M rows, at most ROWS: the kernel of exactly that height.
template <int ROWS, int VECTORS, int ASKED>
static inline void block(
    int64_t M, int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row, float* c,
    int64_t c_row, bool accumulate, const float* ahead, int64_t ahead_step) {
  if constexpr (ROWS > 0) {
    if (M == ROWS)
      return micro_rows<ROWS, VECTORS, ASKED>(
          K, a, a_row, a_k, b, b_row, c, c_row, accumulate, ahead, ahead_step);
    block<ROWS - 1, VECTORS, ASKED>(M, K, a, a_row, a_k, b, b_row, c, c_row, accumulate, ahead, ahead_step);
  }
}

// M rows, at most ROWS, and `asked` vectors, at most ASKED: the kernel of exactly these.
template <int ROWS, int VECTORS, int ASKED>
__attribute__((always_inline)) static inline void block_asking(
    int64_t asked, int64_t M, int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
    float* c, int64_t c_row, bool accumulate, const float* ahead, int64_t ahead_step) {
  if constexpr (ASKED > 0)
    if (asked < ASKED)
      return block_asking<ROWS, VECTORS, ASKED - 1>(
          asked, M, K, a, a_row, a_k, b, b_row, c, c_row, accumulate, ahead, ahead_step);
  block<ROWS, VECTORS, ASKED>(M, K, a, a_row, a_k, b, b_row, c, c_row, accumulate, ahead, ahead_step);
}

// All rows of a strip of VECTORS registers of columns, in as few blocks as can be, of about the same height.
//
// STREAMED: each block asks for a part of the K rows that follow, so that what is to come does so all the time: the first
// block alone would wait for as much as memory gives in the time of several. Beyond the third-level cache of Zen 5 that
// is 1.1 to 1.2 times the speed of asking for rows 32 before the first block meets them. Where the rows are not dense,
// a block asks for its vectors of each.
template <int VECTORS, bool STREAMED>
static void strip(
    int64_t M, int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  constexpr int rows = kAccumulators / VECTORS < kMaxRows ? kAccumulators / VECTORS : kMaxRows;
  const int64_t blocks = (M + rows - 1) / rows;
  if (blocks == 0) return;
  const int64_t least = M / blocks, higher = M % blocks;  // the height of a block, and how many have one row more
  const bool dense = b_row == VECTORS * kLanes;
  const int64_t each = (VECTORS + blocks - 1) / blocks;  // vectors that a block asks for at a time
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t here = least + (i < higher ? 1 : 0);
    if constexpr (STREAMED)
      block_asking<rows, VECTORS, VECTORS>(
          dense || i * each < VECTORS ? each : 0, here, K, a.data, a.row, a.column, b, b_row, c, c_row, accumulate,
          b + K * b_row + (dense ? i * K * b_row / blocks : i * each * kLanes), dense ? b_row / blocks : b_row);
    else
      block<rows, VECTORS, 0>(here, K, a.data, a.row, a.column, b, b_row, c, c_row, accumulate, b, 0);
    a.data += here * a.row;
    c += here * c_row;
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

// STREAMED: B comes from beyond the second-level cache, and is asked for: 1.3 to 1.8 times the speed for 8 to 16 rows of
// A and B of 4 to 16 MB on Intel's processors. See panel_reading.
template <bool STREAMED = false>
static void gemm(
    int64_t M, int64_t N, int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate) {
  for (int64_t k = 0; k < K; k += kLongestSum)
    gemm_columns<STREAMED>(
        M, N, min(kLongestSum, K - k), {a.data + k * a.column, a.row, a.column}, b + k * b_row, b_row, c, c_row,
        accumulate || k > 0);
}

// The rows of B that a block of few rows asks for.
constexpr int64_t kNearRows = 40;

// ROWS rows, at most kMaxRows, of as many columns as registers hold, over the whole K: each number of B is read once, and
// asked for shortly before. One row alone does better without.
template <int ROWS, int VECTORS>
__attribute__((noinline)) static void whole_block(
    int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  for (int64_t k = 0; k < K; k += kLongestSum)
    micro_kernel<ROWS, VECTORS, ROWS == 1 ? 0 : VECTORS, 1>(
        min(kLongestSum, K - k), a.data + k * a.column, a.row, a.column, b + k * b_row, b_row, c, c_row,
        accumulate || k > 0, b + (k + kNearRows) * b_row, b_row);
}

// M rows, 1 to ROWS, and N columns, a multiple of kMaxVectors vectors.
template <int ROWS>
static inline void whole_blocks(
    int64_t M, int64_t N, int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate) {
  if constexpr (ROWS > 1)
    if (M < ROWS) return whole_blocks<ROWS - 1>(M, N, K, a, b, b_row, c, c_row, accumulate);
  constexpr int vectors = ROWS * kMaxVectors <= kAccumulators ? kMaxVectors : kMaxVectors / 2;
  for (int64_t n = 0; n < N; n += vectors * kLanes)
    whole_block<ROWS, vectors>(K, a, b + n, b_row, c + n, c_row, accumulate);
}

// A product with B as `reading` says.
static void gemm(
    Reading reading, int64_t M, int64_t N, int64_t K, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool accumulate) {
  if (M > 0 && M <= min(reading.whole, kMaxRows) && N % (kMaxVectors * kLanes) == 0)
    whole_blocks<kMaxRows>(M, N, K, a, b, b_row, c, c_row, accumulate);
  else
    (reading.ahead ? gemm<true> : gemm<false>)(M, N, K, a, b, b_row, c, c_row, accumulate);
}
