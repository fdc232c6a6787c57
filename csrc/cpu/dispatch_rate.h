// How many instructions a core starts a cycle for this thread: a busy thread on the other hyperthread of the core takes
// about half of them, and no counter of a guest system shows it.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <chrono>

namespace edgecolbert {

// No-operations a cycle, over 0.2 ms: the median of 15 turns, as the system may take a core away in one. Cycles are
// counted by a chain of instructions that take one each, so the clock's frequency does not matter. 0 with a compiler
// that has no such assembly.
inline double dispatch_rate() {
#if defined(__GNUC__)
  using Clock = std::chrono::steady_clock;
  constexpr int turns = 15, blocks = 1024, chains = 256;
  double rates[turns];
  uint64_t link = 0, other = 1;
  for (double& rate : rates) {
    const auto start = Clock::now();
    for (int i = 0; i < blocks; ++i) __asm__ volatile(".rept 64\n\tnop\n\t.endr");
    const auto middle = Clock::now();
    for (int i = 0; i < chains; ++i) {
#pragma GCC unroll 64
      for (int j = 0; j < 64; ++j) {
        link ^= other;
        __asm__ volatile("" : "+r"(link), "+r"(other));
      }
    }
    const auto end = Clock::now();
    rate = double(blocks) / chains * double((end - middle).count()) / double((middle - start).count());
  }
  std::nth_element(rates, rates + turns / 2, rates + turns);
  return rates[turns / 2];
#else
  return 0.0;
#endif
}

}  // namespace edgecolbert
