// The driver of the attention that reads keys where they are.
#include "attend.h"

#include <algorithm>

#include "tasks.h"

namespace fastattn {

// Keys of a split: 256 kB of keys at a head dimension of 64, next to which joining takes nothing.
constexpr int64_t kSplitKeys = 1024;

void attend_directly(Direct direct) {
  const Problem& p = direct.problem;
  direct.tile_rows = even_tiles(p.rows, kDirectRows);
  direct.tile_heads = std::clamp<int64_t>(kDirectRows / direct.tile_rows, 1, p.group());
  // Many rows make tasks enough.
  direct.split_keys = p.rows <= kDirectRows ? kSplitKeys : round_up(std::max<int64_t>(p.keys, 1), kPanel);
  Floats partial;
  if (direct.splits() > 1) {
    partial = Floats(direct.splits() * p.batch * p.heads * p.rows * direct.partial_row());
    direct.partial = partial.get();
  }
  const Kernels& k = kernels();
  run_tasks(direct.tasks(), k.direct_scratch(direct), [&](int64_t task, float* scratch) {
    k.direct_tile(direct, task, scratch);
  });
  run_tasks(direct.joins(), 0, [&](int64_t task, float*) { k.direct_join(direct, task); });
}

}  // namespace fastattn
