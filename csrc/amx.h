// The configuration of AMX. Part of kernels.inc.h.

#if defined(FASTATTN_AVX512)

// Tells AMX that all tiles are 16 rows of 64 bytes, for a scope.
class Tiles {
 public:
  explicit Tiles(bool used) : used_(used) {
    if (!used_) return;
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() {
    if (used_) __asm__ volatile("tilerelease");
  }

 private:
  bool used_;
};

#else

// Processors without it; products of tiles are emulated there, see split_tile.h.
struct Tiles {
  explicit Tiles(bool) {}
};

#endif
