// The thread pool's face: torch's own pool (it obeys torch.set_num_threads), without torch's headers.
#pragma once

#include <cstdint>

namespace palm::cpu {

// Calls body(context, lo, hi) on disjoint ranges that cover [begin, end); defined in bindings.cpp.
void parallel_range(int64_t begin, int64_t end, int64_t grain,
                    void (*body)(void* context, int64_t lo, int64_t hi), void* context);
int64_t thread_count();

namespace ISA {

// body(lo, hi) over [0, n), at least `grain` items a call, one range a thread.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, F&& body) {
  if (n <= 0) return;
  auto call = [](void* context, int64_t lo, int64_t hi) { (*static_cast<decltype(&body)>(context))(lo, hi); };
  parallel_range(0, n, grain, call, &body);
}

// body(task) for every task in [0, n), handed out one by one in order: for tasks of unequal length, longest
// first. `setup` makes a thread's own state once; body receives it.
template <class S, class F>
inline void parallel_tasks(int64_t n, S&& setup, F&& body) {
  int64_t next = 0;
  const int64_t threads = thread_count();
  parallel_for(n < threads ? n : threads, 1, [&](int64_t lo, int64_t hi) {
    auto state = setup();
    if (hi - lo == n) {  // alone: no counter needed
      for (int64_t task = lo; task < hi; ++task) body(state, task);
      return;
    }
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= n) return;
      body(state, task);
    }
  });
}

// The smallest bad row that any thread met, or -1: `report(row)` may be called from every thread.
struct FirstBad {
  int64_t row = INT64_MAX;
  void report(int64_t bad) {
    int64_t seen = __atomic_load_n(&row, __ATOMIC_RELAXED);
    while (bad < seen &&
           !__atomic_compare_exchange_n(&row, &seen, bad, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  int64_t result() const { return row == INT64_MAX ? -1 : row; }
};

}  // namespace ISA
}  // namespace palm::cpu
