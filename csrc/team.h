// Threads that work on one recurrence together: torch's OpenMP threads, a number each, and a barrier between steps.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastattn {

// Waits until done() by spinning, because a step of a small LSTM takes microseconds, and gives its time slice away when
// that takes long: on a busy machine a pure spin costs a slice of the scheduler per step, and giving it away at once, too.
template <class Done>
void spin_until(Done done) {
  constexpr int most_spins = 4000;
  for (int spins = 0; !done();) {
    if (++spins > most_spins) std::this_thread::yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
  }
}

// A barrier for a fixed number of threads, used again and again.
class Barrier {
 public:
  void set_members(int64_t members) { members_ = members; }

  void wait() { wait_for(arrive()); }

  // The two halves of wait(), for what a thread can do meanwhile: it has arrived, and the round it arrived in; all have.
  uint32_t arrive() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (members_ > 1 && arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    }
    return round;
  }

  void wait_for(uint32_t round) {
    if (members_ > 1) spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
  }

 private:
  int64_t members_ = 1;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// True in a child of fork() whose parent may have had a team: the threads of libgomp are not there any more, and asking
// for them would wait for ever.
bool forked();

// f(member, members) on every thread of a team of at most `most`, members counted from 0. All run at the same time, so
// they may wait for one another; how many there are is known only inside. f must not throw.
template <class F>
void run_team(int64_t most, F f) {
#if defined(_OPENMP)
  if (most > 1 && !omp_in_parallel() && !forked()) {
#pragma omp parallel num_threads(static_cast<int>(most))
    f(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
    return;
  }
#endif
  f(int64_t{0}, int64_t{1});
}

}  // namespace fastattn
