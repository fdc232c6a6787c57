// CUDA C++ as g++ understands it, for grids that run on the CPU (see grid.h).
//
// A lane that a warp's function waits for and that left, or that waits elsewhere, is an error. Vector loads must be
// aligned. Shared memory is what the language calls thread_local, which every fiber of a thread has in common.
#pragma once

#include <string.h>

#include "grid.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ thread_local
#define threadIdx (emulated::grid.current->thread)
#define blockIdx (emulated::grid.block)

// The mathematics of C, whose header is a large one.
extern "C" float fmaf(float, float, float), sqrtf(float);

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

namespace emulated {

template <typename To, typename From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

template <typename T>
T loaded(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T))
    fail("a load of %zu bytes from %p, which is not aligned", sizeof(T), at);
  T x;
  memcpy(&x, at, sizeof x);
  return x;
}

// From lane `source(lane)` of the warp.
template <typename T, typename Source>
T exchanged(const char* what, int line, unsigned mask, T x, Source source) {
  const Warp& warp = meet(what, line, mask, &x, sizeof x);
  const int from = source(static_cast<int>(threadIdx.x % LANES));
  if (!(mask >> from & 1)) fail("%s, line %d: lane %d is read and takes no part", what, line, from);
  return warp.template given<T>(from);
}

// A bit for each lane.
inline unsigned ballot(const char* what, int line, unsigned mask, bool x) {
  const Warp& warp = meet(what, line, mask, &x, sizeof x);
  unsigned found = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    if (mask >> lane & 1 && warp.given<bool>(lane)) found |= 1u << lane;
  }
  return found;
}

inline float from_half(unsigned short x) { return bits<_Float16>(x); }
inline float from_bfloat16(unsigned short x) { return bits<float>(static_cast<unsigned>(x) << 16); }

struct Fragments {
  float a[4][2], b[2][2];
};

// a0: row lane / 4, columns 2 (lane % 4) and the next; a1: 8 rows on; a2 and a3: the same, 8 columns on. b0: column
// lane / 4, rows 2 (lane % 4) and the next; b1: 8 rows on. c0, c1: row lane / 4, columns as those of a0; c2, c3: 8 on.
template <float WIDENED(unsigned short)>
void multiply_add(float (&c)[4], const unsigned int (&a)[4], const unsigned int (&b)[2], int line) {
  Fragments mine;
  auto widen = [](float (&two)[2], unsigned word) { two[0] = WIDENED(word & 0xffff), two[1] = WIDENED(word >> 16); };
  for (int n = 0; n < 4; ++n) widen(mine.a[n], a[n]);
  for (int n = 0; n < 2; ++n) widen(mine.b[n], b[n]);
  const Warp& warp = meet("mma", line, ~0u, &mine, sizeof mine);
  const int lane = threadIdx.x % LANES;
  for (int n = 0; n < 4; ++n) {
    const int row = lane / 4 + 8 * (n / 2), column = 2 * (lane % 4) + n % 2;
    double sum = c[n];
    for (int k = 0; k < 16; ++k) {
      const Fragments& left = warp.given<Fragments>(4 * (row % 8) + k % 8 / 2);
      const Fragments& right = warp.given<Fragments>(4 * column + k % 8 / 2);
      sum += double(left.a[row / 8 + 2 * (k / 8)][k % 2]) * right.b[k / 8][k % 2];
    }
    c[n] = static_cast<float>(sum);
  }
}

}  // namespace emulated

inline void __syncthreads(int line = __builtin_LINE()) { emulated::meet_block("__syncthreads", line); }

template <typename T>
T __shfl_sync(unsigned mask, T x, int from, int line = __builtin_LINE()) {
  return emulated::exchanged("__shfl_sync", line, mask, x, [&](int) { return from & 31; });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T x, int by, int line = __builtin_LINE()) {
  return emulated::exchanged("__shfl_up_sync", line, mask, x, [&](int lane) { return lane < by ? lane : lane - by; });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int far, int line = __builtin_LINE()) {
  return emulated::exchanged("__shfl_xor_sync", line, mask, x, [&](int lane) { return lane ^ far; });
}

inline unsigned __ballot_sync(unsigned mask, bool x, int line = __builtin_LINE()) {
  return emulated::ballot("__ballot_sync", line, mask, x);
}

inline bool __any_sync(unsigned mask, bool x, int line = __builtin_LINE()) {
  return emulated::ballot("__any_sync", line, mask, x) != 0;
}

// The lanes that gave the same.
inline unsigned __match_any_sync(unsigned mask, int x, int line = __builtin_LINE()) {
  const emulated::Warp& warp = emulated::meet("__match_any_sync", line, mask, &x, sizeof x);
  unsigned found = 0;
  for (int lane = 0; lane < emulated::LANES; ++lane) {
    if (mask >> lane & 1 && warp.given<int>(lane) == x) found |= 1u << lane;
  }
  return found;
}

// Of shared memory, where no two threads run at once.
inline int atomicAdd(int* at, int by) {
  const int before = *at;
  *at += by;
  return before;
}

template <typename T>
T __ldg(const T* at) {
  return emulated::loaded<T>(at);
}

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  const char nothing = 0;
  emulated::meet("__syncwarp", line, mask, &nothing, sizeof nothing);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __int_as_float(int x) { return emulated::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated::bits<float>(x); }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned found = 0;
  for (int n = 0; n < 4; ++n) found |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * n & 7) & 0xff) << 8 * n;
  return found;
}

// In place of the kernels' own ptx.h.
#define EDGECOLBERT_PTX_H

inline float nan_max(float a, float b) { return a != a || b != b ? __int_as_float(0x7fffffff) : a > b ? a : b; }
inline float half_to_float(unsigned short x) { return emulated::from_half(x); }

inline unsigned short float_to_half(float x) {
  return x != x ? 0x7fff : emulated::bits<unsigned short>(static_cast<_Float16>(x));
}

inline unsigned short float_to_bfloat16(float x) {
  const unsigned word = emulated::bits<unsigned>(x);
  return x != x ? 0x7fff : static_cast<unsigned short>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline unsigned halves_less(unsigned a, unsigned b) {
  auto less = [](unsigned short x, unsigned short y) {
    return unsigned(float_to_half(half_to_float(x) - half_to_float(y)));
  };
  return less(a & 0xffff, b & 0xffff) | less(a >> 16, b >> 16) << 16;
}

template <typename T>
void stream(const void* at, T& x) {
  x = emulated::loaded<T>(at);
}

inline void multiply_add_half(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                              int line = __builtin_LINE()) {
  emulated::multiply_add<emulated::from_half>(c, a, b, line);
}

inline void multiply_add_bfloat16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                  int line = __builtin_LINE()) {
  emulated::multiply_add<emulated::from_bfloat16>(c, a, b, line);
}
