// Tiles of a result on their way to memory. Part of kernels.inc.h.

// Writes around the caches; `to` is a multiple of a vector.
static inline void stream(float* to, vec x) {
#if defined(FASTATTN_AVX512)
  __asm__ volatile("vmovntps %1, %0" : "=m"(*(vec*)to) : "v"(x));
#else
  store(to, x);
#endif
}

// Orders what was streamed before what this thread writes later.
static inline void stream_end() {
#if defined(FASTATTN_AVX512)
  __asm__ volatile("sfence" : : : "memory");
#endif
}

// to (rows, columns) = from, plus the bias. STREAMED: around the caches, whole vectors alone.
template <bool STREAMED = false>
static void copy_tile(
    const float* from, int64_t from_row, int64_t rows, int64_t columns, const float* bias, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      vec x = load_lanes(from + i * from_row + j, columns - j);
      if (bias) x += load_lanes(bias + j, columns - j);
      if constexpr (STREAMED)
        stream(to + i * to_row + j, x);
      else
        store_lanes(to + i * to_row + j, x, columns - j);
    }
}
