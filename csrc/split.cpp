#include "split.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>

#include "problem.h"

namespace fastattn {

namespace {

// The depth and the rows of the left operand that are packed at a time, at most: with 3 parts 0.8 to 1.2 MB, which leave
// room for columns of the right one in a second-level cache of 2 MB.
constexpr int64_t kDepth = 768, kRows = 256;

// The bits of the largest size among the numbers of a matrix that is dense along its rows or columns, or of a dense tensor.
uint32_t largest_size(const at::Tensor& tensor) {
  const bool dense = tensor.is_non_overlapping_and_dense();
  const int64_t along = !dense && tensor.stride(1) != 1 ? 0 : 1;
  const int64_t runs = dense ? 1 : tensor.size(1 - along), run = dense ? tensor.numel() : tensor.size(along);
  const int64_t step = dense ? 0 : tensor.stride(1 - along);
  constexpr int64_t grain = 1 << 16;
  const int64_t pieces = (run + grain - 1) / grain;  // of a run
  const float* data = tensor.const_data_ptr<float>();
  std::atomic<uint32_t> most{0};
  at::parallel_for(0, runs * pieces, std::max<int64_t>(grain / run, 1), [&](int64_t begin, int64_t end) {
    uint32_t here = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * grain;
      here = std::max(
          here, split_kernels().largest(data + i / pieces * step + first, std::min(grain, run - first)));
    }
    for (uint32_t known = most.load(); here > known && !most.compare_exchange_weak(known, here);) {
    }
  });
  return most.load();
}

// The tensor, or a copy, that is dense as a whole or a matrix dense along an axis.
at::Tensor dense_along_an_axis(const at::Tensor& tensor) {
  const bool rows = tensor.dim() == 2 && (tensor.stride(0) == 1 || tensor.stride(1) == 1);
  return rows || tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
}

SplitOperand operand_of(const at::Tensor& rows) {
  return {rows.const_data_ptr<float>(), rows.size(0), rows.size(1), rows.stride(0), rows.stride(1)};
}

// Packing costs about 0.2 ns for a number of the left operand and 0.4 for one of the right on one thread; a product of
// these sizes saves 0.003 ns a term.
bool worth_splitting(int64_t rows, int64_t columns, int64_t depth) {
  return rows >= 512 && columns >= 128 && depth >= kSplitDepth && columns * depth <= (1 << 23);
}

bool can_split(const at::Tensor& left, const at::Tensor& right) {  // (M, K), (N, K)
  return has_split_products() && worth_splitting(left.size(0), right.size(0), left.size(1)) && splits(left) &&
         splits(right);
}

}  // namespace

bool splits(const at::Tensor& tensor) {
  if (tensor.scalar_type() != at::kFloat || !tensor.device().is_cpu() || tensor.layout() != at::kStrided) return false;
  if (tensor.numel() == 0) return true;
  constexpr uint32_t least = (127u - 64u) << 23, most = (127u + 64u) << 23;
  const uint32_t size = largest_size(dense_along_an_axis(tensor));
  return size == 0 || (size >= least && size <= most);
}

void split_matmul(
    const SplitOperand& left, const SplitOperand& right, const float* bias, float* out, int64_t out_row) {
  const SplitKernels& k = split_kernels();
  const int64_t M = left.rows, N = right.rows, K = left.depth, column_blocks = split_blocks(N);
  const int64_t ranges = std::max<int64_t>((K + kDepth - 1) / kDepth, 1);
  const int64_t most = round_up((K + ranges - 1) / ranges, kSplitDepth);  // depth of a range
  const auto range = [&](SplitOperand o, int64_t r) {
    o.data += r * most * o.column;
    o.depth = std::min(most, K - r * most);
    return o;
  };
  const SplitMemory packed(column_blocks * ranges * split_block(most));
  const auto at_range = [&](int64_t r) { return packed.get() + r * column_blocks * split_block(most); };
  run_tasks(ranges * column_blocks, 0, [&](int64_t task, float*) {
    const SplitOperand o = range(right, task / column_blocks);
    for (int64_t half = task % column_blocks * 2, end = half + 2; half < end; ++half)
      k.pack_right(o, half, at_range(task / column_blocks) + split_half(half, o.depth));
  });
  // Chunks of rows; columns too where there are few rows.
  const int64_t threads = at::get_num_threads(), row_blocks = split_blocks(M);
  const int64_t chunk = std::min(kRows / kSplitBlock, (row_blocks + threads - 1) / threads);
  const int64_t row_chunks = (row_blocks + chunk - 1) / chunk;
  const int64_t column_chunks = std::min(column_blocks, std::max<int64_t>(threads / row_chunks, 1));
  run_tasks(row_chunks * column_chunks, chunk * split_block(most) / 2, [&](int64_t task, float* scratch) {
    const int64_t first = task / column_chunks * chunk, last = std::min(row_blocks, first + chunk);
    const int64_t n = column_blocks * (task % column_chunks) / column_chunks;
    const int64_t n_end = column_blocks * (task % column_chunks + 1) / column_chunks;
    uint16_t* rows = reinterpret_cast<uint16_t*>(scratch);
    for (int64_t r = 0; r < ranges; ++r) {
      const SplitOperand o = range(left, r);
      for (int64_t half = first * 2; half < last * 2; ++half)
        k.pack_left(o, half, rows + split_half(half - first * 2, o.depth));
      SplitProduct p{};
      p.rows = std::min(M, last * kSplitBlock) - first * kSplitBlock;
      p.columns = std::min(N, n_end * kSplitBlock) - n * kSplitBlock;
      p.depth = o.depth;
      p.left = rows;
      p.right = at_range(r) + n * split_block(o.depth);
      p.out = out + first * kSplitBlock * out_row + n * kSplitBlock;
      p.out_row = out_row;
      p.accumulate = r > 0;
      p.bias = bias && r == 0 ? bias + n * kSplitBlock : nullptr;
      p.last = r == ranges - 1;
      k.product(p);
    }
  });
}

at::Tensor split_mm(const at::Tensor& left, const at::Tensor& right) {
  const at::Tensor turned = right.t();
  if (!can_split(left, turned)) return at::mm(left, right);
  const at::Tensor rows = dense_along_an_axis(left), columns = dense_along_an_axis(turned);
  at::Tensor out = at::empty({left.size(0), right.size(1)}, left.options().memory_format(at::MemoryFormat::Contiguous));
  split_matmul(operand_of(rows), operand_of(columns), nullptr, out.data_ptr<float>(), out.size(1));
  return out;
}

at::Tensor split_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  if (!can_split(input, weight)) return at::addmm(bias, input, weight.t());
  const at::Tensor rows = dense_along_an_axis(input), columns = dense_along_an_axis(weight), shift = bias.contiguous();
  at::Tensor out = at::empty({input.size(0), weight.size(0)}, input.options().memory_format(at::MemoryFormat::Contiguous));
  split_matmul(
      operand_of(rows), operand_of(columns), shift.const_data_ptr<float>(), out.data_ptr<float>(), out.size(1));
  return out;
}

}  // namespace fastattn
