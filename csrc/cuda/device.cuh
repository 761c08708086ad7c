// The few device primitives that the kernels are made of. Tests compile the same kernels for the host, where
// FASTATTN_EMULATED names the header that provides these primitives and the keywords of CUDA instead.
#pragma once

#include "launch.h"

#ifdef FASTATTN_EMULATED
#include FASTATTN_EMULATED
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define FASTATTN_INLINE __device__ __forceinline__

// A block's dynamic shared memory.
#define FASTATTN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace fastattn::cuda {

using half = __half;
using bfloat16 = __nv_bfloat16;

FASTATTN_INLINE float to_float(float x) { return x; }
FASTATTN_INLINE float to_float(half x) { return __half2float(x); }
FASTATTN_INLINE float to_float(bfloat16 x) { return __bfloat162float(x); }

template <class T>
FASTATTN_INLINE T from_float(float x);
template <>
FASTATTN_INLINE float from_float<float>(float x) { return x; }
template <>
FASTATTN_INLINE half from_float<half>(float x) { return __float2half_rn(x); }
template <>
FASTATTN_INLINE bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }

FASTATTN_INLINE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
FASTATTN_INLINE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// Rounded to the nearest of tf32's 10 bits.
FASTATTN_INLINE uint32_t to_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

// Nothing, but the compiler takes it that x changes here.
FASTATTN_INLINE void opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }

// 16 bytes that another block wrote during this launch: from the L2 cache, the only one that all blocks share. 0 unless
// wanted; predicated, for a branch would keep the loads of a loop apart.
struct Vector16 {
  uint32_t word[4];
};
FASTATTN_INLINE Vector16 load_from_blocks(const void* p, bool wanted) {
  Vector16 v;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@wanted ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(v.word[0]), "=&r"(v.word[1]), "=&r"(v.word[2]), "=&r"(v.word[3])
      : "l"(p), "r"(static_cast<uint32_t>(wanted))
      : "memory");
  return v;
}

// Of every lane of a warp, x of the lane whose number differs in the bits of `distance`.
FASTATTN_INLINE float exchange(float x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }

// sum (16, 8) += A (16, k) B (k, 8), spread over a warp; k is 16 for the 16-bit types and 8 for tf32. A is the four
// registers a, B the two registers b.
template <class T>
FASTATTN_INLINE void mma(
    float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
#define FASTATTN_MMA(TYPE, SHAPE)                                                                                  \
  template <>                                                                                                      \
  FASTATTN_INLINE void mma<TYPE>(                                                                                  \
      float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {             \
    asm("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                   \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                   \
  }
FASTATTN_MMA(half, "m16n8k16.row.col.f32.f16.f16.f32")
FASTATTN_MMA(bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTATTN_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTATTN_MMA

// The barrier between the blocks of a group: a counter that only grows. What any thread of a block wrote before
// arrive() is seen by every thread of a block after its wait(): the block's own barrier orders the threads, release and
// acquire order the blocks. All threads of a block call both.
FASTATTN_INLINE void arrive(uint32_t* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
}
FASTATTN_INLINE void wait(const uint32_t* arrivals, uint32_t expected) {
  if (threadIdx.x == 0) {
    uint32_t count;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrivals) : "memory");
    } while (static_cast<int32_t>(count - expected) < 0);
  }
  __syncthreads();
}

// ---- For the host.

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastattn: ") + what + ": " + cudaGetErrorString(error));
}

template <class Args>
using Kernel = void (*)(Args);

// Blocks of threads that meet at barriers, with `shared` bytes.
template <class Args>
void launch_blocks(Kernel<Args> kernel, int64_t blocks, int threads, int64_t shared, const Args& args, void* stream) {
  void* arguments[] = {const_cast<Args*>(&args)};
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  check(
      cudaLaunchKernel(
          kernel, grid, block, arguments, static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)),
      "launch");
}

// Threads that know nothing of each other.
template <class Args>
void launch(Kernel<Args> kernel, int64_t blocks, int threads, const Args& args, void* stream) {
  launch_blocks(kernel, blocks, threads, 0, args, stream);
}

// All blocks run at once, or the launch fails.
template <class Args>
void launch_together(
    Kernel<Args> kernel, int64_t blocks, int threads, int64_t shared, const Args& args, void* stream) {
  void* arguments[] = {const_cast<Args*>(&args)};
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  check(
      cudaLaunchCooperativeKernel(
          kernel, grid, block, arguments, static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)),
      "cooperative launch");
}

// How many blocks of the kernel the current device runs at once; 0 where it has no cooperative launch or too little
// shared memory. Asks the driver, not the device: allowed while a graph is recorded.
template <class Args>
int64_t blocks_at_once(Kernel<Args> kernel, int threads, int64_t shared) {
  int device = 0, cooperative = 0, processors = 0, most = 0, each = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
  if (!cooperative || shared > most) return 0;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
      "shared memory");
  check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared)), "occupancy");
  return int64_t{each} * processors;
}

}  // namespace fastattn::cuda

#endif

// The gates on a device: one unit of one row at a time, in float32.
namespace fastattn::cuda {

FASTATTN_INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
FASTATTN_INLINE float tanh(float x) { return tanhf(x); }
FASTATTN_INLINE float square_root(float x) { return sqrtf(x); }

#include "../lstm_cell.h"
#include "../layer_norm_cell.h"

// i, f, g, o of one unit, as they are stored.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

template <class T>
FASTATTN_INLINE void store_gates(void* to, int64_t index, const Gates<float>& gates) {
  static_cast<Four<T>*>(to)[index] = {
      from_float<T>(gates.i), from_float<T>(gates.f), from_float<T>(gates.g), from_float<T>(gates.o)};
}

template <class T>
FASTATTN_INLINE Gates<float> load_gates(const void* from, int64_t index) {
  const Four<T> four = static_cast<const Four<T>*>(from)[index];
  return {to_float(four.value[0]), to_float(four.value[1]), to_float(four.value[2]), to_float(four.value[3])};
}

template <class T>
FASTATTN_INLINE float element(const void* from, int64_t index) { return to_float(static_cast<const T*>(from)[index]); }

template <class T>
FASTATTN_INLINE void put(void* to, int64_t index, float x) { static_cast<T*>(to)[index] = from_float<T>(x); }

FASTATTN_INLINE int64_t first_row(const Steps& steps, int64_t t) {
  return steps.first ? steps.first[t] : t * steps.batch;
}

// Rows of the batch that step t has; 0 before the first and after the last.
FASTATTN_INLINE int rows_of(const Steps& steps, int64_t t) {
  if (t < 0 || t >= steps.count) return 0;
  return static_cast<int>(steps.first ? steps.first[t + 1] - steps.first[t] : steps.batch);
}

}  // namespace fastattn::cuda
