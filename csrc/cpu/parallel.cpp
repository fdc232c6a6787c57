#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <vector>

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

#ifdef _OPENMP
struct Range {
  int64_t begin, end;
};

// What a thread begins with: tasks in a row, whose documents often lie in memory in a row. A cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;

  // Many at first, for small tasks, and single ones in the end, so that threads finish together. Empty: none is left.
  Range take() {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < end) {
      const int64_t stop = begin + std::max<int64_t>(1, (end - begin) / 8);
      if (next.compare_exchange_weak(begin, stop, std::memory_order_relaxed)) return {begin, stop};
    }
    return {end, end};
  }
};
#endif

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
  std::vector<Share> shares(static_cast<size_t>(threads));
  for (int t = 0; t < threads; ++t) {
    shares[size_t(t)].next = tasks * t / threads;
    shares[size_t(t)].end = tasks * (t + 1) / threads;
  }
#pragma omp parallel num_threads(threads)
  {
    SubnormalsAreZero mode;
    const int thread = omp_get_thread_num();
    for (int t = 0; t < threads; ++t) {  // its own share, then what the others have not begun
      Share& share = shares[size_t((thread + t) % threads)];
      for (Range range = share.take(); range.begin < range.end; range = share.take()) {
        for (int64_t task = range.begin; task < range.end; ++task) body(context, task, thread);
      }
    }
  }
#endif
}

}  // namespace edgecolbert
