// Scores of documents with one query each, of few tokens: a rerank, a query's own candidates, chosen pairs.
//
// Such a call waits for memory. So document rows go from there straight into the registers that the tensor cores read:
// no shared memory, no barrier. A warp has the query's tokens in registers, as the N side of products of 16 x 8 x 16,
// and walks over tiles of 16 document tokens, with STAGES of them under way. The order of dimensions inside a product
// is free as long as both sides have the same, so a lane reads 16 contiguous bytes: of every 32 dimensions, lane c of
// four has those from 8 c on, and of the last 16, if they are left over, those from 4 c on.
//
// The maximum is kept a lane, and reduced over lanes once a document. Rows beyond the end are copies of the last. WARPS
// of a block share a document, or each has its own (WARPS = 1).
//
// Constants: STEPS (d / 16); TOKENS (of the query, over 8, rounded up); STAGES; WARPS; BLOCK_DOCUMENTS; LAYOUT; BF16;
// INT8 (documents of int8, exact in float16); Q_PACKED (one query, of the length that its boundaries say), D_PACKED,
// D_MASK, ZERO, Q_MASK, SCALED.

#include "common.h"
#include "ptx.h"

constexpr int PAIRS = STEPS / 2;  // of steps, which one load of 16 bytes feeds
constexpr int ITEM = INT8 ? 1 : 2;

__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if BF16
  multiply_add_bfloat16(c, a, b);
#else
  multiply_add_half(c, a, b);
#endif
}

// A row's share of a lane, as it lies in memory.
struct Row {
#if INT8
  uint2 pair[PAIRS + 1];
  u32 last;
#else
  uint4 pair[PAIRS + 1];
  uint2 last;
#endif
};

__device__ __forceinline__ Row read(const u8* row, int quarter) {
  Row found;
#pragma unroll
  for (int n = 0; n < PAIRS; ++n) stream(row + (32 * n + 8 * quarter) * ITEM, found.pair[n]);
  if constexpr (STEPS % 2) stream(row + (32 * PAIRS + 4 * quarter) * ITEM, found.last);
  return found;
}

#if INT8
// Four of int8 as float16, exactly: the byte, its sign turned, in the mantissa of 1024, less 1152.
__device__ __forceinline__ uint2 widened(u32 bytes) {
  bytes ^= 0x80808080u;
  const u32 low = __byte_perm(bytes, 0x64646464u, 0x4140), high = __byte_perm(bytes, 0x64646464u, 0x4342);
  return {halves_less(low, 0x64806480u), halves_less(high, 0x64806480u)};
}
#endif

// Dimensions of a step: two words.
__device__ __forceinline__ uint2 words(const Row& row, int step) {
  if (step == 2 * PAIRS) {
#if INT8
    return widened(row.last);
#else
    return row.last;
#endif
  }
#if INT8
  return widened(step % 2 ? row.pair[step / 2].y : row.pair[step / 2].x);
#else
  const uint4& pair = row.pair[step / 2];
  return step % 2 ? uint2{pair.z, pair.w} : uint2{pair.x, pair.y};
#endif
}

#if D_MASK && !ZERO
// Where the tokens that a mask keeps begin and end; alike in all lanes.
__device__ __forceinline__ void find_kept(const u8* mask, int count, int lane, int& begin, int& end) {
  int bytewise = 0;
  if (reinterpret_cast<i64>(mask) % 4 == 0) {
    const u32* words = reinterpret_cast<const u32*>(mask);
    bytewise = count / 4 * 4;
#pragma unroll 4
    for (int n = lane; n < count / 4; n += 32) {
      const u32 four = words[n];
      if (!four) continue;
      begin = min(begin, 4 * n + (__ffs(four) - 1) / 8);
      end = max(end, 4 * n + 4 - __clz(four) / 8);
    }
  }
  for (int n = bytewise + lane; n < count; n += 32) {
    if (!mask[n]) continue;
    begin = min(begin, n);
    end = max(end, n + 1);
  }
#pragma unroll
  for (int far = 1; far < 32; far <<= 1) {
    begin = min(begin, __shfl_xor_sync(ALL, begin, far));
    end = max(end, __shfl_xor_sync(ALL, end, far));
  }
}
#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS * BLOCK_DOCUMENTS)
    rerank(const u16* __restrict__ q, const u8* __restrict__ d, const u8* __restrict__ q_mask,
           const u8* __restrict__ d_mask, const i64* __restrict__ q_bounds, const i64* __restrict__ d_bounds,
           const i64* __restrict__ query_index, const i64* __restrict__ document_index,
           const float* __restrict__ d_scale, float* __restrict__ scores, i64 q_stride_n, i64 q_stride_t,
           i64 d_stride_n, i64 d_stride_k, i64 d_stride_t, i64 num_queries, i64 num_documents, i64 q_length,
           i64 d_length, i64 num_pairs) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int quarter = lane & 3, line = lane >> 2;
  const i64 pair = static_cast<i64>(blockIdx.x) * BLOCK_DOCUMENTS + warp / WARPS;
  const int share = warp % WARPS;
  bool exists = pair < num_pairs;

#if LAYOUT == EVERY
  const i64 query = 0, document = pair;
#elif LAYOUT == OWN
  const i64 query = exists ? pair / num_documents : 0, document = pair;
#else
  i64 query = exists ? query_index[pair] : 0, document = exists ? document_index[pair] : 0;
  const bool named = query >= 0 && query < num_queries && document >= 0 && document < num_documents;
  if (!named) query = document = 0;
  exists &= named;
#endif
  i64 length = exists ? d_length : 0;
#if D_PACKED
  i64 first_row = 0;
  if (exists) {
    first_row = boundary(d_bounds, document, d_length);
    length = boundary(d_bounds, document + 1, d_length) - first_row;
  }
  const u8* rows = d + first_row * d_stride_t * ITEM;
#elif LAYOUT == OWN
  [[maybe_unused]] const i64 first_row = document * d_length;
  const u8* rows = d + (query * d_stride_n + pair % num_documents * d_stride_k) * ITEM;
#else
  [[maybe_unused]] const i64 first_row = document * d_length;
  const u8* rows = d + document * d_stride_n * ITEM;
#endif
  const int count = static_cast<int>(length > 0 ? length : 0);
#if D_MASK && !ZERO
  // Tokens from the first to the last that is kept; what stands before and behind them is not read.
  int begin = count, end = 0;
  find_kept(d_mask + first_row, count, lane, begin, end);
#else
  const int begin = 0, end = count;
#endif
  const int first_tile = begin / 16, tiles = (end + 15) / 16;
  const i64 stride = d_stride_t * ITEM;

  Row upper[STAGES], lower[STAGES];
  auto load = [&](int stage, int tile) {
    const int first = 16 * tile + line, last = end - 1;
    upper[stage] = read(rows + (first < last ? first : last) * stride, quarter);
    lower[stage] = read(rows + (first + 8 < last ? first + 8 : last) * stride, quarter);
  };
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) {
    const int tile = first_tile + share + stage * WARPS;
    if (tile < tiles) load(stage, tile);
  }

#if Q_PACKED
  const i64 q_start = boundary(q_bounds, 0, q_length), q_count = boundary(q_bounds, 1, q_length) - q_start;
#else
  [[maybe_unused]] const i64 q_start = query * q_length;
  const i64 q_count = q_length;
#endif
  u32 b[TOKENS][STEPS][2];
  bool kept[TOKENS];
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) {
    const int token = 8 * n + line;
    kept[n] = token < q_count;
#if Q_MASK
    if (kept[n]) kept[n] = q_mask[q_start + token] != 0;
#endif
#if Q_PACKED
    const u16* row = q + (q_start + token) * q_stride_t;
#else
    const u16* row = q + query * q_stride_n + token * q_stride_t;
#endif
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int k = step == 2 * PAIRS ? 32 * PAIRS + 4 * quarter : 32 * (step / 2) + 8 * quarter + 4 * (step % 2);
      uint2 two = {0, 0};
      if (kept[n]) two = __ldg(reinterpret_cast<const uint2*>(row + k));
      b[n][step][0] = two.x, b[n][step][1] = two.y;
    }
  }

  float best[TOKENS][2];
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) best[n][0] = best[n][1] = -__int_as_float(0x7f800000);
  const bool found = end > 0;

  for (int tile = first_tile + share; tile < tiles; tile += STAGES * WARPS) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      const int now = tile + stage * WARPS;
      if (now >= tiles) break;
#if D_MASK
      const int first = 16 * now + line, last = end - 1;
      const bool keep_upper = d_mask[first_row + (first < last ? first : last)] != 0;
      const bool keep_lower = d_mask[first_row + (first + 8 < last ? first + 8 : last)] != 0;
      const float masked = ZERO ? 0.0f : -__int_as_float(0x7f800000);
#endif
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) {
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          const uint2 above = words(upper[stage], step), below = words(lower[stage], step);
          multiply_add(c, {above.x, below.x, above.y, below.y}, b[n][step]);
        }
#if D_MASK
        if (!keep_upper) c[0] = c[1] = masked;
        if (!keep_lower) c[2] = c[3] = masked;
#endif
        best[n][0] = nan_max(best[n][0], nan_max(c[0], c[2]));
        best[n][1] = nan_max(best[n][1], nan_max(c[1], c[3]));
      }
      if (now + STAGES * WARPS < tiles) load(stage, now + STAGES * WARPS);
    }
  }

  // Columns 8 n + 2 quarter and the next; over the eight lines of a warp.
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) {
#pragma unroll
    for (int far = 4; far < 32; far <<= 1) {
      best[n][0] = nan_max(best[n][0], __shfl_xor_sync(ALL, best[n][0], far));
      best[n][1] = nan_max(best[n][1], __shfl_xor_sync(ALL, best[n][1], far));
    }
  }

#if WARPS > 1
  __shared__ float shared_best[WARPS * BLOCK_DOCUMENTS][8 * TOKENS];
  if (line == 0) {
#pragma unroll
    for (int n = 0; n < TOKENS; ++n) {
      shared_best[warp][8 * n + 2 * quarter] = best[n][0];
      shared_best[warp][8 * n + 2 * quarter + 1] = best[n][1];
    }
  }
  __syncthreads();
  if (share) return;
#pragma unroll
  for (int other = 1; other < WARPS; ++other) {
#pragma unroll
    for (int n = 0; n < TOKENS; ++n) {
      best[n][0] = nan_max(best[n][0], shared_best[warp + other][8 * n + 2 * quarter]);
      best[n][1] = nan_max(best[n][1], shared_best[warp + other][8 * n + 2 * quarter + 1]);
    }
  }
#endif

  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) {
    // `kept` goes by the token that a lane has read, the maximum by column.
    const u32 lines = __ballot_sync(ALL, kept[n] && quarter == 0);
    if (lines >> (8 * quarter) & 1) sum += best[n][0];
    if (lines >> (8 * quarter + 4) & 1) sum += best[n][1];
  }
  sum += __shfl_xor_sync(ALL, sum, 1);
  sum += __shfl_xor_sync(ALL, sum, 2);
  if (lane == 0 && pair < num_pairs) {
    float score = found ? sum : 0.0f;
#if SCALED
    if (found) score *= d_scale[document];
#endif
#if LAYOUT == INDEXED
    if (!named) score = __int_as_float(0x7fc00000);
#endif
    scores[pair] = score;
  }
}
