// CUDA on the host, as far as the kernels of csrc/cuda need it: the keywords, the primitives of device.cuh, launches.
//
// Every thread of a cooperative launch is a fiber on one thread of the host. A fiber runs until it waits: for its
// block, its warp or other blocks. What order they run in is the test's choice (`schedule`): a missing barrier shows as
// a result that depends on it, or that is NaN, for shared memory starts as NaN. Where nobody can go on, the launch
// throws.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define FASTATTN_INLINE inline
#define FASTATTN_SHARED(name) unsigned char* const name = emulator::current->block_state->shared.data()
#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)

namespace emulator {

// Step for step together, in order or shuffled; or each warp as far as it gets before another, the last one first.
enum class Schedule { ascending, random, warp_by_warp };

// Set by the tests.
inline Schedule schedule = Schedule::ascending;
inline int64_t blocks_at_once = 8;

inline int64_t launches = 0;  // of kernels whose blocks wait for each other, so far

struct Index {
  unsigned x;
};

struct Block {
  std::vector<unsigned char> shared;
  uint32_t arrived = 0, generation = 0, threads = 0;
};

struct Warp {
  uint32_t operand[32][6];
  float* sum[32];  // where a lane wants the result
  uint32_t arrived = 0, generation = 0;
};

struct Thread {
  Index thread, block;
  Block* block_state = nullptr;
  Warp* warp = nullptr;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  bool done = false;
  // Ready once *counter has come to `expected`, which it may have passed.
  const uint32_t* counter = nullptr;
  uint32_t expected = 0;

  bool ready() const { return !done && (!counter || static_cast<int32_t>(*counter - expected) >= 0); }
};

inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline std::exception_ptr failure;  // of a fiber: no exception leaves its stack

inline void wait_for(const uint32_t& counter, uint32_t expected) {
  current->counter = &counter;
  current->expected = expected;
  if (!current->ready()) swapcontext(&current->context, &scheduler);
  current->counter = nullptr;
}

template <class Last>
void meet(uint32_t& arrived, uint32_t& generation, uint32_t members, Last last) {
  const uint32_t next = generation + 1;
  if (++arrived == members) {
    last();
    arrived = 0;
    generation = next;
  }
  wait_for(generation, next);
}

inline void __syncthreads() {
  Block& block = *current->block_state;
  meet(block.arrived, block.generation, block.threads, [] {});
}

template <class Kernel, class Args>
struct Start {
  Kernel kernel;
  const Args* args;
};
template <class Kernel, class Args>
inline Start<Kernel, Args> start;

template <class Kernel, class Args>
void fiber() {
  try {
    start<Kernel, Args>.kernel(*start<Kernel, Args>.args);
  } catch (...) {
    failure = std::current_exception();
  }
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// Let a thread run until it waits; false if it waits already.
inline bool resume(Thread* thread) {
  if (!thread->ready()) return false;
  current = thread;
  swapcontext(&scheduler, &thread->context);
  current = nullptr;
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  return true;
}

inline void run(const std::vector<std::unique_ptr<Thread>>& threads) {
  std::vector<Thread*> order;
  for (auto& thread : threads) order.push_back(thread.get());
  if (schedule != Schedule::ascending) std::reverse(order.begin(), order.end());
  std::mt19937 random(1);
  bool progress = true;
  while (progress) {
    progress = false;
    if (schedule == Schedule::random) std::shuffle(order.begin(), order.end(), random);
    for (size_t first = 0; first < order.size(); first += 32) {
      bool again = true;
      while (again) {
        again = false;
        for (size_t i = first; i < first + 32; ++i) again |= resume(order[i]);
        progress |= again;
        again &= schedule == Schedule::warp_by_warp;
      }
    }
  }
  for (auto& thread : threads)
    if (!thread->done) throw std::runtime_error("emulator: no thread can go on");
}

constexpr size_t kStack = 64 * 1024;

inline std::unique_ptr<Thread> make_thread(Index block, Index thread, Block& block_state, Warp& warp, void (*body)()) {
  auto made = std::make_unique<Thread>();
  made->thread = thread;
  made->block = block;
  made->block_state = &block_state;
  made->warp = &warp;
  made->stack.reset(new unsigned char[kStack]);
  getcontext(&made->context);
  made->context.uc_stack.ss_sp = made->stack.get();
  made->context.uc_stack.ss_size = kStack;
  made->context.uc_link = nullptr;
  makecontext(&made->context, body, 0);
  return made;
}

// Blocks `first` to `first + blocks` at the same time.
template <class Kernel, class Args>
void launch_fibers(Kernel kernel, unsigned first, int64_t blocks, int threads, int64_t shared, const Args& args) {
  start<Kernel, Args> = {kernel, &args};
  std::vector<Block> block_states(static_cast<size_t>(blocks));
  std::vector<Warp> warps(static_cast<size_t>(blocks * threads / 32));
  std::vector<std::unique_ptr<Thread>> all;
  for (unsigned b = 0; b < blocks; ++b) {
    Block& block = block_states[b];
    block.threads = static_cast<uint32_t>(threads);
    block.shared.assign(static_cast<size_t>(shared), 0xff);
    for (unsigned t = 0; t < block.threads; ++t)
      all.push_back(make_thread({first + b}, {t}, block, warps[(b * block.threads + t) / 32], fiber<Kernel, Args>));
  }
  run(all);
}

}  // namespace emulator

namespace fastattn::cuda {

using emulator::__syncthreads;
inline void __syncwarp() {}  // mma waits for all lanes itself

using half = _Float16;

struct bfloat16 {
  uint16_t bits;
};

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(half x) { return static_cast<float>(x); }
inline float to_float(bfloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

template <class T>
T from_float(float x) {
  return static_cast<T>(x);
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = float_to_bits(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}

inline void opaque(uint32_t&) {}

struct Vector16 {
  uint32_t word[4];
};
inline Vector16 load_from_blocks(const void* p, bool wanted) {
  Vector16 v{};
  if (wanted && reinterpret_cast<uintptr_t>(p) % 16 != 0) throw std::runtime_error("emulator: misaligned load");
  if (wanted) std::memcpy(&v, p, sizeof v);
  return v;
}

inline float exchange(float x, int distance) {
  emulator::Warp& warp = *emulator::current->warp;
  warp.sum[threadIdx.x % 32] = &x;
  emulator::meet(warp.arrived, warp.generation, 32, [&] {
    float all[32];
    for (int lane = 0; lane < 32; ++lane) all[lane] = *warp.sum[lane];
    for (int lane = 0; lane < 32; ++lane) *warp.sum[lane] = all[lane ^ distance];
  });
  return x;
}

inline float operand(half, uint32_t word, int i) {
  half x;
  const auto bits = static_cast<uint16_t>(word >> 16 * i);
  std::memcpy(&x, &bits, sizeof x);
  return to_float(x);
}
inline float operand(bfloat16, uint32_t word, int i) {
  return to_float(bfloat16{static_cast<uint16_t>(word >> 16 * i)});
}
inline float operand(float, uint32_t word, int) {
  if (std::isfinite(bits_to_float(word)) && (word & 0x1fff)) throw std::runtime_error("emulator: not rounded to tf32");
  return bits_to_float(word);
}

// The fragments of the PTX manual for mma.m16n8k16 and, of float, mma.m16n8k8.
template <class T>
void multiply_warp(emulator::Warp& warp) {
  constexpr int each = 4 / sizeof(T);  // elements in a register
  float a[16][8 * each], b[8 * each][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, k = lane % 4 * each;
    const uint32_t* word = warp.operand[lane];
    for (int i = 0; i < each; ++i) {
      a[row][k + i] = operand(T{}, word[0], i);
      a[row + 8][k + i] = operand(T{}, word[1], i);
      a[row][k + 4 * each + i] = operand(T{}, word[2], i);
      a[row + 8][k + 4 * each + i] = operand(T{}, word[3], i);
      b[k + i][row] = operand(T{}, word[4], i);
      b[k + 4 * each + i][row] = operand(T{}, word[5], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8 * each; ++k)
        warp.sum[lane][i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
}

template <class T>
void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulator::Warp& warp = *emulator::current->warp;
  const unsigned lane = threadIdx.x % 32;
  const uint32_t operands[6] = {a0, a1, a2, a3, b0, b1};
  std::copy(operands, operands + 6, warp.operand[lane]);
  warp.sum[lane] = sum;
  emulator::meet(warp.arrived, warp.generation, 32, [&] { multiply_warp<T>(warp); });
}

inline void arrive(uint32_t* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) ++*arrivals;
}
inline void wait(const uint32_t* arrivals, uint32_t expected) {
  if (threadIdx.x == 0) emulator::wait_for(*arrivals, expected);
  __syncthreads();
}

template <class Args>
using Kernel = void (*)(Args);

// The kernels of a plain launch have no barriers: thread after thread.
template <class Args>
void launch(Kernel<Args> kernel, int64_t blocks, int threads, const Args& args, void*) {
  emulator::Thread thread;
  emulator::current = &thread;
  for (int64_t b = 0; b < blocks; ++b)
    for (int t = 0; t < threads; ++t) {
      thread.block = {static_cast<unsigned>(b)};
      thread.thread = {static_cast<unsigned>(t)};
      kernel(args);
    }
  emulator::current = nullptr;
}

// Block after block, from the last one where the schedule is not `ascending`.
template <class Args>
void launch_blocks(Kernel<Args> kernel, int64_t blocks, int threads, int64_t shared, const Args& args, void*) {
  const bool ascending = emulator::schedule == emulator::Schedule::ascending;
  for (int64_t i = 0; i < blocks; ++i) {
    const auto block = static_cast<unsigned>(ascending ? i : blocks - 1 - i);
    emulator::launch_fibers(kernel, block, 1, threads, shared, args);
  }
}

template <class Args>
void launch_together(Kernel<Args> kernel, int64_t blocks, int threads, int64_t shared, const Args& args, void*) {
  if (blocks > emulator::blocks_at_once) throw std::runtime_error("emulator: more blocks than run at once");
  ++emulator::launches;
  emulator::launch_fibers(kernel, 0, blocks, threads, shared, args);
}

template <class Args>
int64_t blocks_at_once(Kernel<Args>, int, int64_t) {
  return emulator::blocks_at_once;
}

}  // namespace fastattn::cuda
