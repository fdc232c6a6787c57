// Tokens and winners as the gradients' kernels read them: Q_TYPE and D_TYPE are F16, BF16 or F32, WIDE_ARGMAX is int32.
#ifndef EDGECOLBERT_TOKENS_H
#define EDGECOLBERT_TOKENS_H

#include "common.h"
#include "ptx.h"

#define F16 0
#define BF16 1
#define F32 2

#define SMALLEST_NORM 1e-12f

template <int TYPE>
struct Stored {
  typedef u16 type;
};
template <>
struct Stored<F32> {
  typedef float type;
};

typedef Stored<Q_TYPE>::type query_t;
typedef Stored<D_TYPE>::type document_t;
#if WIDE_ARGMAX
typedef int winner_t;
#else
typedef short winner_t;
#endif

template <int TYPE>
__device__ __forceinline__ float to_float(typename Stored<TYPE>::type x) {
  if constexpr (TYPE == F32) {
    return x;
  } else if constexpr (TYPE == BF16) {
    return __uint_as_float(static_cast<u32>(x) << 16);
  } else {
    return half_to_float(x);
  }
}

template <int TYPE>
__device__ __forceinline__ typename Stored<TYPE>::type rounded(float x) {
  if constexpr (TYPE == F32) {
    return x;
  } else if constexpr (TYPE == BF16) {
    return float_to_bfloat16(x);
  } else {
    return float_to_half(x);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int far = 16; far; far >>= 1) x += __shfl_xor_sync(ALL, x, far);
  return x;
}

#endif
