// What both kernels start from: names, numbers of layouts, and where packed sequences lie.
#ifndef EDGECOLBERT_COMMON_H
#define EDGECOLBERT_COMMON_H

#define EVERY 0
#define OWN 1
#define INDEXED 2

#define ALL 0xffffffffu  // lanes of a warp

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

// Where sequence `number` starts; within the buffer whatever stands there.
__device__ __forceinline__ i64 boundary(const i64* bounds, i64 number, i64 rows) {
  i64 at = bounds[number];
  return at < 0 ? 0 : at > rows ? rows : at;
}

#endif
