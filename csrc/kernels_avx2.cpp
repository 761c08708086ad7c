// The kernels for AVX2 with FMA: 16 registers of 8 floats.
#include "additive_cpu.h"
#include "attention_cpu.h"
#include "layer_norm_lstm_cpu.h"
#include "lstm_cpu.h"
#include "split_cpu.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace fastattn {
namespace avx2 {
constexpr int kLanes = 8, kMaxVectors = 2, kAccumulators = 12, kMaxRows = 6;
}  // namespace avx2
}  // namespace fastattn

#define FASTATTN_F16C
#define FASTATTN_MAX(a, b) __builtin_ia32_maxps256(a, b)
#define FASTATTN_MIN(a, b) __builtin_ia32_minps256(a, b)
#define ISA avx2
#define ISA_NAME "avx2"
#include "kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
