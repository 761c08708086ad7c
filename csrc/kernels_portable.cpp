// The kernels in the instructions every processor of the architecture has: SSE2 on x86-64, NEON on 64-bit Arm.
#include "additive_cpu.h"
#include "attention_cpu.h"
#include "layer_norm_lstm_cpu.h"
#include "lstm_cpu.h"
#include "split_cpu.h"

namespace fastattn {
namespace portable {
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kMaxVectors = 4, kAccumulators = 24, kMaxRows = 8;
#else
constexpr int kMaxVectors = 2, kAccumulators = 12, kMaxRows = 6;
#endif
}  // namespace portable
}  // namespace fastattn

#if defined(__x86_64__)
#define FASTATTN_MAX(a, b) __builtin_ia32_maxps(a, b)
#define FASTATTN_MIN(a, b) __builtin_ia32_minps(a, b)
#endif
#define ISA portable
#define ISA_NAME "portable"
#include "kernels.inc.h"
