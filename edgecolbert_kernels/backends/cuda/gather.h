// Sums of rows that lie anywhere, as both gradients are: a lane reads eight dimensions of a row, LANES lanes a row, and
// a warp GROUPS rows at once. The constants are those of the kernel that includes it.
#ifndef EDGECOLBERT_GATHER_H
#define EDGECOLBERT_GATHER_H

#include "common.h"
#include "ptx.h"
#include "tokens.h"

constexpr int EACH = 8;  // dimensions of a lane
constexpr int LANES = (SLICE + EACH - 1) / EACH;
constexpr int GROUPS = 32 / LANES;

// A lane's dimensions of a row, as they lie in memory.
template <int TYPE>
struct Raw {
  uint4 words[TYPE == F32 ? 2 : 1];
};

template <int TYPE>
__device__ __forceinline__ Raw<TYPE> nothing() {
  Raw<TYPE> raw;
  for (uint4& each : raw.words) each = {0, 0, 0, 0};
  return raw;
}

// `left` dimensions are there, where they are not eight. ALIGNED rows are multiples of eight dimensions and 16 bytes.
template <int TYPE>
__device__ __forceinline__ Raw<TYPE> read(const typename Stored<TYPE>::type* row, [[maybe_unused]] int left) {
  Raw<TYPE> raw;
  if (DIM % SLICE && left <= 0) return nothing<TYPE>();
#if ALIGNED
  const uint4* words = reinterpret_cast<const uint4*>(row);
  raw.words[0] = __ldg(words);
  if constexpr (TYPE == F32) raw.words[1] = __ldg(words + 1);
#else
  u32 x[sizeof raw / 4];
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const auto value = n < left ? row[n] : typename Stored<TYPE>::type(0);
    if constexpr (TYPE == F32) {
      x[n] = __float_as_uint(value);
    } else {
      x[n / 2] = n % 2 ? x[n / 2] | static_cast<u32>(value) << 16 : value;
    }
  }
#pragma unroll
  for (int n = 0; n < static_cast<int>(sizeof raw / 16); ++n)
    raw.words[n] = {x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]};
#endif
  return raw;
}

template <int TYPE>
__device__ __forceinline__ void add(float (&sum)[EACH], float by, const Raw<TYPE>& raw) {
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const uint4& four = raw.words[TYPE == F32 ? n / 4 : 0];
    const int at = TYPE == F32 ? n % 4 : n / 2;
    const u32 word = at == 0 ? four.x : at == 1 ? four.y : at == 2 ? four.z : four.w;
    if constexpr (TYPE == F32) {
      sum[n] = fmaf(by, __uint_as_float(word), sum[n]);
    } else {
      sum[n] = fmaf(by, to_float<TYPE>(static_cast<u16>(n % 2 ? word >> 16 : word)), sum[n]);
    }
  }
}

// The groups' sums, in the lanes of the first: each time the second half is added to the first.
__device__ __forceinline__ void add_groups(float (&sum)[EACH], int lane) {
#pragma unroll
  for (int groups = GROUPS, half = (GROUPS + 1) / 2; groups > 1; groups = half, half = (half + 1) / 2) {
    const bool has = lane < (groups - half) * LANES;
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const float other = __shfl_sync(ALL, sum[n], (lane + half * LANES) & 31);
      if (has) sum[n] += other;
    }
  }
}

// Through x / |x|: the part along x is taken out. `left` dimensions of x and of the sum are this lane's, if any.
template <int TYPE>
__device__ __forceinline__ void through_norm(float (&sum)[EACH], const typename Stored<TYPE>::type* row, int left) {
  float x[EACH], squares = 0.0f, product = 0.0f;
  bool live = false;
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const bool there = n < left;
    x[n] = there ? to_float<TYPE>(row[n]) : 0.0f;
    squares = fmaf(x[n], x[n], squares);
    if (!there) continue;
    product = fmaf(x[n], sum[n], product);
    live |= sum[n] != 0.0f;
  }
  live = __any_sync(ALL, live);
  squares = warp_sum(squares), product = warp_sum(product);
  const float norm = sqrtf(squares), inverse = 1.0f / (norm < SMALLEST_NORM ? SMALLEST_NORM : norm);
  const float along = norm < SMALLEST_NORM ? 0.0f : product * inverse;
#pragma unroll
  for (int n = 0; n < EACH; ++n) sum[n] = live ? (sum[n] - x[n] * (inverse * along)) * inverse : 0.0f;
}

// To a row of a contiguous output that starts at a multiple of 16 bytes.
template <int TYPE>
__device__ __forceinline__ void write(typename Stored<TYPE>::type* row, const float (&sum)[EACH], int left) {
  if constexpr (DIM % EACH == 0) {
    if (left <= 0) return;
    uint4* words = reinterpret_cast<uint4*>(row);
    u32 x[TYPE == F32 ? EACH : EACH / 2];
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const auto value = rounded<TYPE>(sum[n]);
      if constexpr (TYPE == F32) {
        x[n] = __float_as_uint(value);
      } else {
        x[n / 2] = n % 2 ? x[n / 2] | static_cast<u32>(value) << 16 : value;
      }
    }
    words[0] = {x[0], x[1], x[2], x[3]};
    if constexpr (TYPE == F32) words[1] = {x[4], x[5], x[6], x[7]};
  } else {
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      if (n < left) row[n] = rounded<TYPE>(sum[n]);
    }
  }
}

// Added to such a row, of float32.
__device__ __forceinline__ void add_to(float* row, float (&sum)[EACH], int left) {
  if constexpr (DIM % EACH == 0) {
    if (left <= 0) return;
    const uint4* words = reinterpret_cast<const uint4*>(row);
    add<F32>(sum, 1.0f, {words[0], words[1]});
  } else {
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      if (n < left) sum[n] += row[n];
    }
  }
  write<F32>(row, sum, left);
}

#endif
