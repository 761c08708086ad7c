#include "panels.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "tasks.h"
#include "tensor_operand.h"

namespace fastattn {

// Measured against torch's product on EPYC, 2 threads (rows, columns, depth). Zen 4: 1.04 to 1.13 times its speed from
// 1,024 x 384 x 384 to 4,096 x 1,536 x 512, 1,024 x 4,096 x 1,024 and 2,048 x 512 x 3,200; 0.8 to 0.95 where one of them
// is small. Zen 5: 1.1 to 2.6 from 32 x 32 x 32 on, the least with depths around 10, and up to 6 with 4 rows; 0.4 to 0.5
// where the depth is 1 or with 1 or 2 columns of many rows.
static bool worth_panels(int64_t rows, int64_t columns, int64_t depth) {
  switch (preferred_panels()) {
    case Panels::large: return depth >= 128 && columns >= 256 && rows * columns * depth >= 1 << 27;
    case Panels::most: return depth > 1 && columns >= 8 && rows * columns * depth >= 1 << 15;
    default: return false;
  }
}

bool worth_panels(const at::Tensor& left, const at::Tensor& right) {
  return has_floats(left) && has_floats(right) && left.size(1) == right.size(1) &&
         worth_panels(left.size(0), right.size(0), left.size(1));
}

void panel_products(const at::Tensor& left, std::initializer_list<PanelProductOf> of, bool add) {
  const at::Tensor dense_left = dense_along_an_axis(left);
  PanelProduct p{};
  p.left = operand_of(dense_left);
  p.add = add;
  std::vector<at::Tensor> dense;
  std::vector<PanelTerm> terms;
  int64_t count = 0;
  for (const PanelProductOf& one : of) {
    PanelTerm& term = terms.emplace_back();
    term.right = operand_of(dense.emplace_back(dense_along_an_axis(one.right)));
    term.first_panel = std::exchange(count, count + panels(term.right.rows));
    if (one.bias.defined()) term.bias = dense.emplace_back(one.bias.contiguous()).const_data_ptr<float>();
    term.out = one.out.data_ptr<float>();
    term.out_row = term.right.rows;
    term.around = p.left.rows * term.out_row * static_cast<int64_t>(sizeof(float)) > kCacheBytes;
  }
  p.terms = terms.data();
  const PanelKernels& k = panel_kernels();
  const int64_t panel = p.left.depth * kPanelColumns, threads = team_size();
  // As many rows for each thread: of 512, 11 tiles would be 6 for one and 5 for the other of two.
  const auto tiles_of = [&](int64_t rows) { return (p.left.rows + rows - 1) / rows; };
  const int64_t least_tiles = tiles_of(kPanelRows);
  p.rows = tiles_of(least_tiles > threads ? round_up(least_tiles, threads) : least_tiles);
  const int64_t row_tiles = tiles_of(p.rows);
  const int64_t scratch_floats = panel_scratch(p.left.depth, row_tiles > 1);
  Floats packed;
  if (row_tiles > 1) {
    packed = Floats(count * panel);
    p.packed = packed.get();
    p.reading = panel_reading(count * panel * static_cast<int64_t>(sizeof(float)));
    const auto pack = [&](int64_t i) {
      const PanelTerm& term = term_of(p.terms, i);
      k.pack(term.right, i - term.first_panel, packed + i * panel);
    };
    // Where each thread has as many panels, and some of them, it packs its own: no other reads them, and none waits for
    // another. With 2 panels each the left operand, which all threads copy then, costs more than that.
    if (count % threads == 0 && count >= 4 * threads)
      return run_tasks(threads, scratch_floats, [&](int64_t task, float* scratch) {
        const Range mine = share(count, task, threads);
        for (int64_t i = mine.begin; i < mine.end; ++i) pack(i);
        for (int64_t tile = 0; tile < row_tiles; ++tile) k.product(p, tile * p.rows, mine, scratch);
      }, threads);
    run_tasks(count, 0, [&](int64_t task, float*) { pack(task); }, threads);
  }
  // Some tasks for each thread: columns are divided, too, where there are few rows.
  const int64_t parts = std::min(count, std::max<int64_t>(4 * threads / row_tiles, 1));
  run_tasks(row_tiles * parts, scratch_floats, [&](int64_t task, float* scratch) {
    k.product(p, task / parts * p.rows, share(count, task % parts, parts), scratch);
  }, threads);
}

}  // namespace fastattn
