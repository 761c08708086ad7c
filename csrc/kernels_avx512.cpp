// The kernels for AVX-512: 32 registers of 16 floats.
#include "additive_cpu.h"
#include "attention_cpu.h"
#include "layer_norm_lstm_cpu.h"
#include "lstm_cpu.h"
#include "split_cpu.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace fastattn {
namespace avx512 {
constexpr int kLanes = 16, kMaxVectors = 4, kAccumulators = 24, kMaxRows = 12;
}  // namespace avx512
}  // namespace fastattn

#define FASTATTN_AVX512
#define FASTATTN_F16C
#define FASTATTN_RECIPROCAL_ESTIMATE(x) (vec) __builtin_ia32_rcp14ps512_mask(x, x, 0xffff)
// All lanes (0xffff), and the rounding that is set (4).
#define FASTATTN_MAX(a, b) (vec) __builtin_ia32_maxps512_mask(a, b, a, 0xffff, 4)
#define FASTATTN_MIN(a, b) (vec) __builtin_ia32_minps512_mask(a, b, a, 0xffff, 4)
#define FASTATTN_FMA(a, b, c) (vec) __builtin_ia32_vfmaddps512_mask(a, b, c, 0xffff, 4)
#define ISA avx512
#define ISA_NAME "avx512"
#include "kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
