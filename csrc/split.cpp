#include "split.h"

#include <algorithm>
#include <atomic>

#include "tasks.h"
#include "tensor_operand.h"

namespace fastattn {

namespace {

// Rows of the left operand that are packed at a time: 0.8 to 1.2 MB, which leave room for columns of the right one in a
// second-level cache of 2 MB. Where greater depths were summed up in ranges, torch's product was as fast.
constexpr int64_t kDepth = 1024;
constexpr int64_t rows_at_a_time(int64_t depth) { return depth > 768 ? 128 : 256; }

// The bits of the largest size among the numbers of a matrix that is dense along its rows or columns, or of a dense tensor.
uint32_t largest_size(const at::Tensor& tensor) {
  const bool dense = tensor.is_non_overlapping_and_dense();
  const int64_t along = !dense && tensor.stride(1) != 1 ? 0 : 1;
  const int64_t runs = dense ? 1 : tensor.size(1 - along), run = dense ? tensor.numel() : tensor.size(along);
  const int64_t step = dense ? 0 : tensor.stride(1 - along);
  constexpr int64_t grain = 1 << 16;
  const int64_t pieces = (run + grain - 1) / grain, many = std::max<int64_t>(grain / run, 1);  // of a run; runs of a task
  const float* data = tensor.const_data_ptr<float>();
  std::atomic<uint32_t> most{0};
  run_tasks((runs * pieces + many - 1) / many, 0, [&](int64_t task, float*) {
    uint32_t here = 0;
    for (int64_t i = task * many; i < std::min(runs * pieces, (task + 1) * many); ++i) {
      const int64_t first = i % pieces * grain;
      here = std::max(here, split_kernels().largest(data + i / pieces * step + first, std::min(grain, run - first)));
    }
    for (uint32_t known = most.load(); here > known && !most.compare_exchange_weak(known, here);) {
    }
  }, team_size());
  return most.load();
}

// Measured: 1.07 to 1.5 times the speed of torch's product from 1,024 x 384 x 384 to 4,096 x 1,536 x 512 and 1,024 x 4,096
// x 1,024 (rows, columns, depth), 0.95 with 128 columns, 0.6 with 64 rows.
bool worth_splitting(int64_t rows, int64_t columns, int64_t depth) {
  return rows >= 512 && columns >= 192 && depth >= kSplitDepth && depth <= kDepth;
}

}  // namespace

bool splits(const at::Tensor& tensor) {
  if (!has_floats(tensor)) return false;
  if (tensor.numel() == 0) return true;
  constexpr uint32_t least = (127u - 40u) << 23, most = (127u + 62u) << 23;
  const uint32_t size = largest_size(dense_along_an_axis(tensor));
  return size == 0 || (size >= least && size <= most);
}

bool can_split(const at::Tensor& left, const at::Tensor& right) {
  return has_split_products() && left.size(1) == right.size(1) &&
         worth_splitting(left.size(0), right.size(0), left.size(1)) && splits(left) && splits(right);
}

void split_product(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias) {
  const at::Tensor dense_left = dense_along_an_axis(left), dense_right = dense_along_an_axis(right);
  const at::Tensor dense_bias = bias.defined() ? bias.contiguous() : bias;
  const Operand rows = operand_of(dense_left), columns = operand_of(dense_right);
  const SplitKernels& k = split_kernels();
  const int64_t block = split_block(rows.depth), row_blocks = split_blocks(rows.rows);
  const int64_t column_blocks = split_blocks(columns.rows);
  const Aligned<uint16_t> packed(column_blocks * block);
  run_tasks(column_blocks, 0, [&](int64_t task, float*) {
    for (int64_t half = task * 2; half < task * 2 + 2; ++half)
      k.pack_right(columns, half, packed + split_half(half, rows.depth));
  }, team_size());
  // Chunks of rows; columns too where there are few rows.
  const int64_t threads = team_size();
  const int64_t chunk = std::min(rows_at_a_time(rows.depth) / kSplitBlock, (row_blocks + threads - 1) / threads);
  const int64_t row_chunks = (row_blocks + chunk - 1) / chunk;
  const int64_t column_chunks = std::min(column_blocks, std::max<int64_t>(threads / row_chunks, 1));
  run_tasks(row_chunks * column_chunks, chunk * block / 2, [&](int64_t task, float* scratch) {
    const int64_t first = task / column_chunks * chunk, last = std::min(row_blocks, first + chunk);
    const auto [n, n_end] = share(column_blocks, task % column_chunks, column_chunks);
    uint16_t* chunk_rows = reinterpret_cast<uint16_t*>(scratch);
    for (int64_t half = first * 2; half < last * 2; ++half)
      k.pack_left(rows, half, chunk_rows + split_half(half - first * 2, rows.depth));
    SplitProduct p{};
    p.rows = std::min(rows.rows, last * kSplitBlock) - first * kSplitBlock;
    p.columns = std::min(columns.rows, n_end * kSplitBlock) - n * kSplitBlock;
    p.depth = rows.depth;
    p.left = chunk_rows;
    p.right = packed + n * block;
    p.out_row = columns.rows;
    p.out = out.data_ptr<float>() + first * kSplitBlock * p.out_row + n * kSplitBlock;
    k.product(p, bias.defined() ? dense_bias.const_data_ptr<float>() + n * kSplitBlock : nullptr);
  }, threads);
}

}  // namespace fastattn
