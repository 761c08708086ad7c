// Independent pieces of work on torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "aligned.h"

namespace fastattn {

// Runs task(index, scratch) for every index below `tasks`, on so many of torch's threads. Threads take the next task when
// they are done with one: tasks differ in cost (causal masks, padding), and none writes what another reads or writes.
template <class Task>
void run_tasks(int64_t tasks, int64_t scratch_floats, Task task, int64_t threads = at::get_num_threads()) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    const Floats scratch(scratch_floats);
    for (int64_t index = next++; index < tasks; index = next++) task(index, scratch.get());
  });
}

}  // namespace fastattn
