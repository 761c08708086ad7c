// Products of bfloat16 matrices with float32 sums, for the LSTM. Part of kernels.inc.h; for AVX-512 only.
//
// Two instructions make them: TDPBF16PS (AMX), 16 rows of A times a tile of B at a time, and VDPBF16PS, one row. Both
// take B in tiles of 32 x 16 numbers, two rows of B side by side:  tile[k / 2][column][k % 2].  A panel of 64 columns is
// (K / 32, 4 tiles); K is padded with zeros. The instructions are written as assembly: the compiler is told of AVX-512
// alone, and lstm_bf16() says at run time which of them the processor has.

constexpr int64_t kTileDepth = 32, kTileRows = 16, kTileNumbers = kTileDepth * 16;

// Tiles that are asked for so far ahead.
constexpr int64_t kTilesAhead = 4;

static inline int64_t tiles_of(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

#if defined(FASTATTN_AVX512)

// One block of W (4H, K): the gates of 16 units.
static void lstm_pack_gates_bf16(const void* from_weight, int64_t hidden, int64_t depth, int64_t block, void* to) {
  const BFloat16* weight = (const BFloat16*)from_weight;
  BFloat16* panel = (BFloat16*)to;
  const int64_t first = block * kUnits, there = min(kUnits, hidden - first);
  for (int64_t t = 0; t < tiles_of(depth); ++t)
    for (int64_t gate = 0; gate < 4; ++gate, panel += kTileNumbers) {
      const BFloat16* from = weight + (gate * hidden + first) * depth + t * kTileDepth;
      const int64_t here = min(kTileDepth, depth - t * kTileDepth);
      vec square[kLanes];  // pairs of numbers: their bits are moved, not their values
      if (there == kUnits && here == kTileDepth) {
        for (int i = 0; i < kLanes; ++i) {
          prefetch(from + i * depth + kTilesAhead * kTileDepth);  // 0.8 of the time: more rows than the processor follows
          __builtin_memcpy(&square[i], from + i * depth, sizeof(vec));
        }
      } else {
        BFloat16 part[kUnits][kTileDepth] = {};
        for (int64_t i = 0; i < there; ++i)
          for (int64_t j = 0; j < here; ++j) part[i][j] = from[i * depth + j];
        for (int i = 0; i < kLanes; ++i) __builtin_memcpy(&square[i], part[i], sizeof(vec));
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) __builtin_memcpy(panel + i * kLanes * 2, &square[i], sizeof(vec));
    }
}

// One panel of 64 columns of a matrix (K, columns).
static void lstm_pack_columns_bf16(
    const void* from, int64_t depth, int64_t columns, int64_t panel_index, void* to) {
  const BFloat16* matrix = (const BFloat16*)from;
  BFloat16* panel = (BFloat16*)to;
  for (int64_t t = 0; t < tiles_of(depth); ++t)
    for (int64_t first = panel_index * kGateColumns; first < (panel_index + 1) * kGateColumns; first += kLanes)
      for (int64_t k = t * kTileDepth; k < (t + 1) * kTileDepth; k += 2, panel += 2 * kLanes) {
        half_words even{}, odd{};
        const uint64_t bytes = 2 * (uint64_t)max(int64_t{0}, min(kLanes, columns - first));
        if (k < depth) __builtin_memcpy(&even, matrix + k * columns + first, bytes);
        if (k + 1 < depth) __builtin_memcpy(&odd, matrix + (k + 1) * columns + first, bytes);
        const words pairs = __builtin_convertvector(even, words) | (__builtin_convertvector(odd, words) << 16);
        __builtin_memcpy(panel, &pairs, sizeof pairs);
      }
}

// The rows of the left operand, padded with zeros to whole tiles; `row` is then their distance. For `dots` those of whole
// tiles are read where they stand, unless they are 2 or 4 kB apart and fall into the same sets of the cache.
static inline LstmLeft lstm_left_bf16(
    LstmForm form, const BFloat16* from, int64_t from_row, int64_t rows, int64_t depth, float* scratch) {
  if (form == LstmForm::dots && depth % kTileDepth == 0 && from_row % 1024 != 0) return {from, from_row};
  // 32 numbers more than the tiles need, for the sets of the cache.
  const int64_t row = (tiles_of(depth) + 1) * kTileDepth;
  BFloat16* to = (BFloat16*)scratch;
  for (int64_t r = 0; r < round_up(rows, kTileRows); ++r) {
    const int64_t there = r < rows ? depth : 0;
    __builtin_memcpy(to + r * row, from + r * from_row, (uint64_t)there * 2);
    __builtin_memset(to + r * row + there, 0, (uint64_t)(row - there) * 2);
  }
  return {to, row};
}

struct HalfRows {
  const BFloat16* data;
  int64_t row;
};

// Two tiles of columns of `sums` (rows a multiple of 16, 64): sums += left times B. 16 rows, or 32 for which B is read
// once; the tiles 0 to 3 hold the sums, 4 and 5 rows of A, 6 and 7 columns of B.
template <bool TWICE>
static inline void lstm_tiles_amx(HalfRows left, int64_t depth_tiles, const BFloat16* b, float* sums) {
  const int64_t sums_bytes = kGateColumns * 4, a_bytes = left.row * 2, b_bytes = 64;
  const BFloat16 *a = left.data, *below = left.data + kTileRows * left.row;
  float* sums_below = sums + kTileRows * kGateColumns;
  __asm__ volatile("tileloadd (%0,%1), %%tmm0" : : "r"(sums), "r"(sums_bytes) : "memory");
  __asm__ volatile("tileloadd (%0,%1), %%tmm1" : : "r"(sums + 16), "r"(sums_bytes) : "memory");
  if constexpr (TWICE) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm2" : : "r"(sums_below), "r"(sums_bytes) : "memory");
    __asm__ volatile("tileloadd (%0,%1), %%tmm3" : : "r"(sums_below + 16), "r"(sums_bytes) : "memory");
  }
  for (int64_t t = 0; t < depth_tiles; ++t, a += kTileDepth, below += kTileDepth, b += 4 * kTileNumbers) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm6" : : "r"(b), "r"(b_bytes) : "memory");
    __asm__ volatile("tileloadd (%0,%1), %%tmm7" : : "r"(b + kTileNumbers), "r"(b_bytes) : "memory");
    __asm__ volatile("tileloadd (%0,%1), %%tmm4" : : "r"(a), "r"(a_bytes) : "memory");
    __asm__ volatile("tdpbf16ps %tmm6, %tmm4, %tmm0");
    __asm__ volatile("tdpbf16ps %tmm7, %tmm4, %tmm1");
    if constexpr (TWICE) {
      __asm__ volatile("tileloadd (%0,%1), %%tmm5" : : "r"(below), "r"(a_bytes) : "memory");
      __asm__ volatile("tdpbf16ps %tmm6, %tmm5, %tmm2");
      __asm__ volatile("tdpbf16ps %tmm7, %tmm5, %tmm3");
    }
  }
  __asm__ volatile("tilestored %%tmm0, (%0,%1)" : : "r"(sums), "r"(sums_bytes) : "memory");
  __asm__ volatile("tilestored %%tmm1, (%0,%1)" : : "r"(sums + 16), "r"(sums_bytes) : "memory");
  if constexpr (TWICE) {
    __asm__ volatile("tilestored %%tmm2, (%0,%1)" : : "r"(sums_below), "r"(sums_bytes) : "memory");
    __asm__ volatile("tilestored %%tmm3, (%0,%1)" : : "r"(sums_below + 16), "r"(sums_bytes) : "memory");
  }
}

static inline vec dot_pairs(vec sum, vec left, vec right) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
  return sum;
}

// ROWS rows of `left` times VECTORS of the four tiles of columns of a panel, added to `sums` (rows, 64). The tiles TILES
// ahead, unless that is 0, are asked for to the cache of level LEVEL.
// Not inlined: among its callers' variables GCC 12 keeps the sums in memory, at half the speed.
template <int ROWS, int VECTORS, int TILES, int LEVEL>
__attribute__((noinline)) static void lstm_block_dot(
    HalfRows left, int64_t depth_tiles, const BFloat16* b, float* sums, bool add) {
  vec sum[ROWS][VECTORS];
  unrolled<ROWS * VECTORS>([&](auto i) __attribute__((always_inline)) {
    const float* from = sums + i / VECTORS * kGateColumns + i % VECTORS * kLanes;
    sum[i / VECTORS][i % VECTORS] = add ? load(from) : vec{};
  });
  for (int64_t t = 0; t < depth_tiles; ++t, b += 4 * kTileNumbers)
    for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
      vec right[VECTORS];
      unrolled<VECTORS>([&](auto v) __attribute__((always_inline)) {
        const BFloat16* from = b + v * kTileNumbers + pair * 2 * kLanes;
        __builtin_memcpy(&right[v], from, sizeof(vec));
        if constexpr (TILES > 0 && ROWS >= 4) __builtin_prefetch(from + TILES * 4 * kTileNumbers, 0, 4 - LEVEL);
      });
      unrolled<ROWS>([&](auto r) __attribute__((always_inline)) {
        float both;
        __builtin_memcpy(&both, left.data + r * left.row + t * kTileDepth + 2 * pair, sizeof both);
        const vec l = __builtin_shufflevector(vec{both}, vec{both}, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        unrolled<VECTORS>([&](auto v) __attribute__((always_inline)) { sum[r][v] = dot_pairs(sum[r][v], l, right[v]); });
      });
    }
  unrolled<ROWS * VECTORS>([&](auto i) __attribute__((always_inline)) {
    store(sums + i / VECTORS * kGateColumns + i % VECTORS * kLanes, sum[i / VECTORS][i % VECTORS]);
  });
}

// The same for `rows` rows, at most ROWS.
template <int ROWS, int VECTORS, int TILES, int LEVEL>
static inline void lstm_rows_dot(
    int64_t rows, HalfRows left, int64_t depth_tiles, const BFloat16* b, float* sums, bool add) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return lstm_rows_dot<ROWS - 1, VECTORS, TILES, LEVEL>(rows, left, depth_tiles, b, sums, add);
  lstm_block_dot<ROWS, VECTORS, TILES, LEVEL>(left, depth_tiles, b, sums, add);
}

// All four tiles, VECTORS at a time, whose numbers of B are in the first-level cache for all blocks of rows but the first:
// as few blocks as can be, of about the same height.
template <int ROWS, int VECTORS, int TILES, int LEVEL>
static inline void lstm_blocks_dot(
    int64_t rows, HalfRows left, int64_t depth_tiles, const BFloat16* panel, float* sums, bool add) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  for (int v = 0; v < 4; v += VECTORS)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = rows * i / blocks;
      lstm_rows_dot<ROWS, VECTORS, TILES, LEVEL>(
          rows * (i + 1) / blocks - row, {left.data + row * left.row, left.row}, depth_tiles, panel + v * kTileNumbers,
          sums + row * kGateColumns + v * kLanes, add);
    }
}

// VECTORS at a time, with the tiles asked for that `reading` says.
template <int ROWS, int VECTORS>
static inline void lstm_multiply_dots(
    Reading reading, int64_t rows, HalfRows left, int64_t depth_tiles, const BFloat16* panel, float* sums, bool add) {
  const auto product = rows <= reading.whole ? lstm_blocks_dot<ROWS, VECTORS, 1, 1>
                       : reading.ahead       ? lstm_blocks_dot<ROWS, VECTORS, kTilesAhead, 2>
                                             : lstm_blocks_dot<ROWS, VECTORS, 0, 2>;
  product(rows, left, depth_tiles, panel, sums, add);
}

// sums (rows rounded up to 16, 64) = or += left (rows, K) times one panel.
static void lstm_multiply_bf16(
    LstmForm form, Reading reading, int64_t rows, LstmLeft left, int64_t depth, const BFloat16* panel, float* sums,
    bool add) {
  const int64_t depth_tiles = tiles_of(depth);
  const auto from = [&](int64_t row) { return HalfRows{(const BFloat16*)left.data + row * left.row, left.row}; };
  if (form == LstmForm::dots) {
    const auto product = rows <= kAccumulators / 4 ? lstm_multiply_dots<kAccumulators / 4, 4> : lstm_multiply_dots<12, 2>;
    return product(reading, rows, from(0), depth_tiles, panel, sums, add);
  }
  if (!add)
    for (int64_t i = 0; i < round_up(rows, kTileRows) * kGateColumns; i += kLanes) store(sums + i, vec{});
  for (int64_t column = 0; column < 4; column += 2) {
    const BFloat16* b = panel + column * kTileNumbers;
    float* to = sums + column * kLanes;
    int64_t row = 0;
    for (; row + kTileRows < rows; row += 2 * kTileRows)
      lstm_tiles_amx<true>(from(row), depth_tiles, b, to + row * kGateColumns);
    if (row < rows) lstm_tiles_amx<false>(from(row), depth_tiles, b, to + row * kGateColumns);
  }
}

#else

// The other instruction sets have neither; the driver does not ask them.
static void lstm_pack_gates_bf16(const void*, int64_t, int64_t, int64_t, void*) { __builtin_trap(); }
static void lstm_pack_columns_bf16(const void*, int64_t, int64_t, int64_t, void*) { __builtin_trap(); }
static inline LstmLeft lstm_left_bf16(LstmForm, const BFloat16*, int64_t, int64_t, int64_t, float*) {
  __builtin_trap();
}
static void lstm_multiply_bf16(LstmForm, Reading, int64_t, LstmLeft, int64_t, const BFloat16*, float*, bool) {
  __builtin_trap();
}

#endif
