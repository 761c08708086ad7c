// Products of float32 matrices as sums of products of bfloat16. Part of kernels.inc.h; the method stands in split_cpu.h.

// The parts of x, each in the upper 16 bits of a float, rounded to nearest with ties away from zero. What is left after
// two of them has at most 8 bits. NaN keeps its first part: rounding could carry its payload into the sign.
static inline void split_vector(vec x, words (&parts)[kSplitParts]) {
  for (int part = 0; part < kSplitParts; ++part) {
    const words rounded = ((words)x + 0x8000u) & 0xffff0000u;
    if (part == 0)
      parts[part] = x == x ? rounded : (words)x | 0x00400000u;
    else
      parts[part] = rounded;
    x -= (vec)parts[part];
  }
}

// One tile of 16 rows and 32 consecutive k; `there` of the rows and `depth` of the k exist.
static inline void split_rows(
    const float* from, int64_t row, int64_t there, int64_t depth, int64_t part_step, uint16_t* to) {
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t k = 0; k < kSplitDepth; k += kLanes) {
      words parts[kSplitParts];
      split_vector(i < there && k < depth ? load_lanes(from + i * row + k, depth - k) : vec{}, parts);
      for (int part = 0; part < kSplitParts; ++part) {
        const half_words upper = __builtin_convertvector(parts[part] >> 16, half_words);
        __builtin_memcpy(to + part * part_step + i * kSplitDepth + k, &upper, sizeof upper);
      }
    }
}

// One tile of 16 pairs of consecutive k and 16 columns.
static inline void split_pairs(
    const float* from, int64_t k_step, int64_t there, int64_t depth, int64_t part_step, uint16_t* to) {
  for (int64_t k = 0; k < kSplitDepth; k += 2)
    for (int64_t i = 0; i < 16; i += kLanes) {
      words even[kSplitParts], odd[kSplitParts];
      const auto read = [&](int64_t at) {
        return i < there && at < depth ? load_lanes(from + at * k_step + i, there - i) : vec{};
      };
      split_vector(read(k), even);
      split_vector(read(k + 1), odd);
      for (int part = 0; part < kSplitParts; ++part) {
        const words both = even[part] >> 16 | odd[part];
        __builtin_memcpy(to + part * part_step + k * 16 + i * 2, &both, sizeof both);
      }
    }
}

// From one kind of tile to the other: 16 rows of 16 pairs, transposed.
static inline void turn_tile(uint16_t* tile) {
  if constexpr (kLanes == 16) {
    vec square[kLanes];
    for (int i = 0; i < kLanes; ++i) __builtin_memcpy(&square[i], tile + i * kSplitDepth, sizeof(vec));
    transpose(square);
    for (int i = 0; i < kLanes; ++i) __builtin_memcpy(tile + i * kSplitDepth, &square[i], sizeof(vec));
  } else {
    uint32_t pairs[16][16];
    __builtin_memcpy(pairs, tile, sizeof pairs);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) __builtin_memcpy(tile + i * kSplitDepth + j * 2, &pairs[j][i], 4);
  }
}

template <bool LEFT>
static void split_pack(const Operand& o, int64_t half, uint16_t* to) {
  const int64_t part_step = split_block(o.depth) / kSplitParts;
  const int64_t first = half * 16, there = max(int64_t{0}, min(int64_t{16}, o.rows - first));
  for (int64_t k = 0; k < o.depth; k += kSplitDepth, to += 2 * kSplitTile) {
    const int64_t depth = min(kSplitDepth, o.depth - k);
    const float* from = o.data + (there > 0 ? first * o.row + k * o.column : 0);
    if (o.column == 1)
      split_rows(from, o.row, there, depth, part_step, to);
    else
      split_pairs(from, o.column, there, depth, part_step, to);
    if (LEFT != (o.column == 1))
      for (int part = 0; part < kSplitParts; ++part) turn_tile(to + part * part_step);
  }
}

#if defined(FASTATTN_AVX512)

// The tiles 0 to 3 hold the sums of 2 x 2 tiles, 4 and 5 rows of the left operand, 6 and 7 columns of the right one. The
// instructions are written as assembly, for the compiler is told of AVX-512 alone.
template <int ROWS>
struct TileProduct {
  static void left(const uint16_t* from) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm4" : : "r"(from), "r"(int64_t{64}) : "memory");
    if constexpr (ROWS == 2)
      __asm__ volatile("tileloadd (%0,%1), %%tmm5" : : "r"(from + kSplitTile), "r"(int64_t{64}) : "memory");
  }
  static void right(const uint16_t* from) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm6" : : "r"(from), "r"(int64_t{64}) : "memory");
    __asm__ volatile("tileloadd (%0,%1), %%tmm7" : : "r"(from + kSplitTile), "r"(int64_t{64}) : "memory");
  }
  static void multiply() {
    __asm__ volatile("tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1");
    if constexpr (ROWS == 2) __asm__ volatile("tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  static void zero() {
    __asm__ volatile("tilezero %tmm0\n\ttilezero %tmm1");
    if constexpr (ROWS == 2) __asm__ volatile("tilezero %tmm2\n\ttilezero %tmm3");
  }
  static void load(const float* from, int64_t row) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm0" : : "r"(from), "r"(row * 4) : "memory");
    __asm__ volatile("tileloadd (%0,%1), %%tmm1" : : "r"(from + 16), "r"(row * 4) : "memory");
    if constexpr (ROWS == 2) {
      __asm__ volatile("tileloadd (%0,%1), %%tmm2" : : "r"(from + 16 * row), "r"(row * 4) : "memory");
      __asm__ volatile("tileloadd (%0,%1), %%tmm3" : : "r"(from + 16 * row + 16), "r"(row * 4) : "memory");
    }
  }
  static void store(float* to, int64_t row) {
    __asm__ volatile("tilestored %%tmm0, (%0,%1)" : : "r"(to), "r"(row * 4) : "memory");
    __asm__ volatile("tilestored %%tmm1, (%0,%1)" : : "r"(to + 16), "r"(row * 4) : "memory");
    if constexpr (ROWS == 2) {
      __asm__ volatile("tilestored %%tmm2, (%0,%1)" : : "r"(to + 16 * row), "r"(row * 4) : "memory");
      __asm__ volatile("tilestored %%tmm3, (%0,%1)" : : "r"(to + 16 * row + 16), "r"(row * 4) : "memory");
    }
  }
};

#else

// The same in float32, for tests on processors without the instructions.
template <int ROWS>
struct TileProduct {
  float sums[2][2][16][16];
  const uint16_t *rows, *columns;

  void left(const uint16_t* from) { rows = from; }
  void right(const uint16_t* from) { columns = from; }
  void zero() { __builtin_memset(sums, 0, sizeof sums); }
  void multiply() {
    for (int i = 0; i < 16 * ROWS; ++i)
      for (int j = 0; j < 32; ++j) {
        float sum = 0.0f;
        for (int k = 0; k < kSplitDepth; ++k) {
          const float x = float_of((uint32_t)rows[i * kSplitDepth + k] << 16);
          const float y = float_of((uint32_t)columns[j / 16 * kSplitTile + k / 2 * 32 + j % 16 * 2 + k % 2] << 16);
          sum += x * y;
        }
        sums[i / 16][j / 16][i % 16][j % 16] += sum;
      }
  }
  void load(const float* from, int64_t row) {
    for (int i = 0; i < 16 * ROWS; ++i)
      for (int j = 0; j < 32; ++j) sums[i / 16][j / 16][i % 16][j % 16] = from[i * row + j];
  }
  void store(float* to, int64_t row) {
    for (int i = 0; i < 16 * ROWS; ++i)
      for (int j = 0; j < 32; ++j) to[i * row + j] = sums[i / 16][j / 16][i % 16][j % 16];
  }
};

#endif

// out (16 ROWS, 32) = or += left times right over `steps` of 32 in depth. The small products come first: where they begin
// a sum, they round in their own size.
template <int ROWS>
static void split_multiply(
    const uint16_t* left, const uint16_t* right, int64_t part_step, int64_t steps, float* out, int64_t out_row,
    bool add) {
  constexpr int64_t step = 2 * kSplitTile;
  const uint16_t *left2 = left + part_step, *left3 = left2 + part_step;
  const uint16_t *right2 = right + part_step, *right3 = right2 + part_step;
  TileProduct<ROWS> product;
  if (add)
    product.load(out, out_row);
  else
    product.zero();
  for (int64_t t = 0; t < steps * step; t += step) {
    product.right(right + t);
    product.left(left3 + t);
    product.multiply();
    product.left(left2 + t);
    product.multiply();
    product.right(right2 + t);
    product.multiply();
  }
  for (int64_t t = 0; t < steps * step; t += step) {
    product.left(left + t);
    product.right(right3 + t);
    product.multiply();
    product.right(right2 + t);
    product.multiply();
  }
  for (int64_t t = 0; t < steps * step; t += step) {
    product.left(left + t);
    product.right(right + t);
    product.multiply();
  }
  product.store(out, out_row);
}

// Steps in depth at a time: 32 columns of so many are 24 kB, half of a first-level cache.
constexpr int64_t kSplitSteps = 4;

// Adds up to `steps` steps from step t on for the block of rows from m and of columns from n on.
static inline void split_chunk(
    const SplitProduct& p, int64_t m, int64_t n, int64_t t, int64_t steps, int64_t rows, float* sums, int64_t sums_row,
    bool add) {
  const int64_t block = split_block(p.depth), step = t * 2 * kSplitTile;
  (rows > 16 ? split_multiply<2> : split_multiply<1>)(
      p.left + m / kSplitBlock * block + step, p.right + n / kSplitBlock * block + step, block / kSplitParts,
      min(steps, split_depth(p.depth) - t), sums, sums_row, add);
}

// Stores the product, or adds it to p.out, which is in a cache. Within the scope of Tiles.
static void split_gemm(const SplitProduct& p, bool accumulate) {
  alignas(64) float edge[kSplitBlock * kSplitBlock];
  // One block of rows leaves nothing of the right operand to be read again.
  const int64_t steps = p.rows > kSplitBlock ? kSplitSteps : split_depth(p.depth);
  for (int64_t n = 0; n < p.columns; n += kSplitBlock)
    for (int64_t t = 0; t < split_depth(p.depth); t += steps)
      for (int64_t m = 0; m < p.rows; m += kSplitBlock) {
        const int64_t rows = min(kSplitBlock, p.rows - m), columns = min(kSplitBlock, p.columns - n);
        float* out = p.out + m * p.out_row + n;
        const bool add = accumulate || t > 0;
        if (columns == kSplitBlock && rows % 16 == 0) {
          split_chunk(p, m, n, t, steps, rows, out, p.out_row, add);
          continue;
        }
        if (add) copy_tile(out, p.out_row, rows, columns, nullptr, edge, kSplitBlock);
        split_chunk(p, m, n, t, steps, rows, edge, kSplitBlock, add);
        copy_tile(edge, kSplitBlock, rows, columns, nullptr, out, p.out_row);
      }
}

// Stores the product in an `out` that is larger than the caches. Its sums are complete before they are written, around the caches
// where that can be: waiting for each of its lines would take as long as the products.
static void split_product(const SplitProduct& p, const float* bias) {
  const Tiles configured(true);
  constexpr int64_t most_rows = 256;  // 32 kB of sums
  alignas(64) float panel[most_rows * kSplitBlock];
  const bool around = p.out_row % 16 == 0 && (uintptr_t)p.out % 64 == 0;
  for (int64_t n = 0; n < p.columns; n += kSplitBlock)
    for (int64_t first = 0; first < p.rows; first += most_rows) {
      const int64_t end = min(p.rows, first + most_rows), columns = min(kSplitBlock, p.columns - n);
      for (int64_t t = 0; t < split_depth(p.depth); t += kSplitSteps)
        for (int64_t m = first; m < end; m += kSplitBlock)
          split_chunk(
              p, m, n, t, kSplitSteps, min(kSplitBlock, end - m), panel + (m - first) * kSplitBlock, kSplitBlock, t > 0);
      (around && columns == kSplitBlock ? copy_tile<true> : copy_tile<false>)(
          panel, kSplitBlock, end - first, columns, bias ? bias + n : nullptr, p.out + first * p.out_row + n, p.out_row);
    }
  stream_end();
}

// The bits of sizes are ordered as the sizes are.
static uint32_t split_largest(const float* from, int64_t count) {
  words most[4] = {};
  const auto take = [](words& most, vec x) {
    const words size = (words)x & 0x7fffffffu;
    most = size > most ? size : most;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int v = 0; v < 4; ++v) take(most[v], load(from + i + v * kLanes));
  for (; i < count; i += kLanes) take(most[0], load_lanes(from + i, count - i));
  uint32_t largest = 0;
  for (int v = 0; v < 4; ++v)
    for (int lane = 0; lane < kLanes; ++lane) largest = most[v][lane] > largest ? most[v][lane] : largest;
  return largest;
}

static const SplitKernels split_table = {split_pack<true>, split_pack<false>, split_product, split_largest};
