#include "operand.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastattn {

namespace {

// The leaves of CPUID that list the caches, of Intel and of AMD, have one form. What the C library says of the third
// level is, on AMD, the sum over all cores of a socket.
int64_t find_third_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const unsigned leaf = __builtin_cpu_is("amd") ? 0x8000001d : 4;
  for (unsigned cache = 0; cache < 8; ++cache) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(leaf, cache, &a, &b, &c, &d) || (a & 0x1f) == 0) break;
    const int64_t ways = (b >> 22) + 1, partitions = (b >> 12 & 0x3ff) + 1, line = (b & 0xfff) + 1, sets = int64_t{c} + 1;
    if ((a >> 5 & 7) == 3) return ways * partitions * line * sets;
  }
#endif
  return int64_t{32} << 20;
}

}  // namespace

int64_t third_level_bytes() {
  static const int64_t bytes = find_third_level();
  return bytes;
}

}  // namespace fastattn
