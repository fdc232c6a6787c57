#include "parallel.h"

#include <algorithm>
#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace edgecolbert {
namespace {

std::atomic<bool> in_forked_child{false};

#ifdef _OPENMP
// A fork copies the OpenMP pool's state but not its threads: a parallel region in the child would wait for them
// forever.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

class SubnormalsAreZero {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  SubnormalsAreZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~SubnormalsAreZero() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  SubnormalsAreZero() {}  // AArch64 cores compute with subnormals at full speed
#endif
};

}  // namespace

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

int threads_for(int64_t tasks, int threads) {
  if (!has_openmp() || in_forked_child) return 1;
  return int(std::clamp<int64_t>(std::min<int64_t>(threads, tasks), 1, 1024));
}

void run_tasks(int64_t tasks, int threads, void (*body)(void*, int64_t, int), void* context) {
  if (threads <= 1) {
    SubnormalsAreZero mode;
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
#ifdef _OPENMP
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    SubnormalsAreZero mode;
    const int thread = omp_get_thread_num();
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < tasks) {
      // Many at first, for small tasks, and single ones in the end, so that threads finish together.
      const int64_t end = begin + std::max<int64_t>(1, (tasks - begin) / (int64_t(threads) * 8));
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      for (int64_t task = begin; task < end; ++task) body(context, task, thread);
      begin = next.load(std::memory_order_relaxed);
    }
  }
#endif
}

}  // namespace edgecolbert
