// Dropout by position: the numbers of fastattn/philox.py, bit for bit. Part of kernels.inc.h.
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. One call of Philox4x32-10 serves the
// 2 x 2 entries whose row and column differ in bit 3 only, so the unit here is 16 x 16 entries.

// Words of kCounters neighbouring columns, in a layout that compilers turn into vector code.
constexpr int kCounters = 16;

static inline void philox(uint32_t (&c)[4][kCounters], uint64_t seed) {
  uint32_t key_a = (uint32_t)seed, key_b = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t a = (uint64_t)c[0][i] * 0xD2511F53u, b = (uint64_t)c[2][i] * 0xCD9E8D57u;
      c[0][i] = (uint32_t)(b >> 32) ^ c[1][i] ^ key_a;
      c[1][i] = (uint32_t)b;
      c[2][i] = (uint32_t)(a >> 32) ^ c[3][i] ^ key_b;
      c[3][i] = (uint32_t)a;
    }
    key_a += 0x9E3779B9u;
    key_b += 0xBB67AE85u;
  }
}

// The factors of rows [row, row + rows) and keys [column, column + columns): keep_scale where kept, else 0.
// columns and column are multiples of kKeyUnit; factors has leading dimension columns.
static void dropout_tile(
    const Problem& p, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t column, int64_t columns,
    float* factors) {
  const uint32_t plane = (uint32_t)(b * p.heads + h);
  for (int64_t base = row & ~int64_t(15); base < row + rows; base += 16)
    for (int64_t low = 0; low < 8; ++low) {
      const int64_t upper_row = base + low - row, lower_row = upper_row + 8;
      const bool upper = upper_row >= 0 && upper_row < rows, lower = lower_row >= 0 && lower_row < rows;
      if (!upper && !lower) continue;
      for (int64_t j = 0; j < columns; j += 32) {
        uint32_t c[4][kCounters];
        for (int i = 0; i < kCounters; ++i) {
          c[0][i] = (uint32_t)(column + j + (i & 7) + (i >> 3) * 16);
          c[1][i] = (uint32_t)(base + low);
          c[2][i] = plane;
          c[3][i] = 0;
        }
        philox(c, p.seed);
        for (int side = 0; side < 2; ++side) {
          if (!(side == 0 ? upper : lower)) continue;
          float* to = factors + (side == 0 ? upper_row : lower_row) * columns + j;
          for (int i = 0; i < kCounters; ++i) {
            const int64_t place = (i & 7) + (i >> 3) * 16;
            to[place] = (c[2 * side][i] >> 8) >= p.drop_below ? p.keep_scale : 0.0f;
            to[place + 8] = (c[2 * side + 1][i] >> 8) >= p.drop_below ? p.keep_scale : 0.0f;
          }
        }
      }
    }
}
