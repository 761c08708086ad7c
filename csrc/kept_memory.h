// Large memory of kernels, kept from one call for the next.
//
// The C library gives large blocks back to the system when they are freed, so that the next call meets each of their
// pages for the first time: one row of 512 units, 64 steps, took 5.9 ms in place of 2.7 in two processes of three.
// Results and gradients stand there, too, whose storages come back when nobody holds them any more: a training step of
// one row of 512 units, 200 steps, took 15.2 ms with 1,000 new pages in each, 12.3 without.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

namespace fastattn {

// Most that is kept: what stands in it longest goes first.
constexpr size_t kMostKept = size_t{64} << 20;

struct Block {
  void* memory = nullptr;  // at a multiple of 64 bytes, not initialised
  size_t bytes = 0;        // at least those asked for
};

// Throws std::bad_alloc.
Block take_block(size_t bytes);
void give_back(Block block) noexcept;

// An uninitialised contiguous tensor in such a block, which goes back with its storage.
at::Tensor kept_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives what is kept back to the system. Returns how many bytes that were.
int64_t release_kept_memory();

}  // namespace fastattn
