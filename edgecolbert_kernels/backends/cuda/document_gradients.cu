// Gradients of document tokens. A query token that chose document token t adds g q to its row.
//
// Nothing is added atomically. A block owns a tile of one document's tokens and a slice of their dimensions; each of
// its first COPIES warps owns a copy of the sums in shared memory and every COPIES-th query, and a lane two dimensions
// of all rows. So what a lane reads, adds to and writes back, no other lane touches: the order of a sum is that of the
// queries, in every run. Copies are added up at the end, in order, by all WARPS, which also clear them. Only rows that
// were chosen are touched, so NaN and infinity reach no other.
//
// Constants: DIM; SLICE (dimensions of a block, even, at most 64); WARPS; COPIES; LAYOUT (EVERY, OWN, INDEXED); Q_TYPE,
// D_TYPE (F16, BF16, F32); WIDE_ARGMAX (int32); Q_PACKED, D_PACKED; NORMALIZE (d within one slice); TILED (documents
// are longer than a tile); PAIRED (two dimensions lie in one aligned word); Q_STRIDE (from token to token: d, or 0 for
// any other). Sums are float32, and shared memory is COPIES x (tile + 1) x SLICE of them.

#include "common.h"
#include "ptx.h"
#include "tokens.h"

constexpr int LANES = SLICE / 2;
// Rows of a query that are read ahead.
constexpr int AHEAD = 32;
// Additions that are under way together.
constexpr int BATCH = 4;

struct Pair {
  float x, y;
};

// Two dimensions of a query token, as they lie in memory.
struct Raw {
#if Q_TYPE == F32
  float x, y;
#else
  u32 both;
#endif
};

// `left` dimensions are there, where they are not two.
__device__ __forceinline__ Raw read(const query_t* row, [[maybe_unused]] int left) {
  Raw raw;
#if PAIRED
#if Q_TYPE == F32
  float2 two = __ldg(reinterpret_cast<const float2*>(row));
  raw.x = two.x, raw.y = two.y;
#else
  raw.both = __ldg(reinterpret_cast<const u32*>(row));
#endif
#else
  query_t x = left > 0 ? row[0] : query_t(0), y = left > 1 ? row[1] : query_t(0);
#if Q_TYPE == F32
  raw.x = x, raw.y = y;
#else
  raw.both = static_cast<u32>(x) | static_cast<u32>(y) << 16;
#endif
#endif
  return raw;
}

__device__ __forceinline__ Pair widened(Raw raw) {
#if Q_TYPE == F32
  return {raw.x, raw.y};
#else
  return {to_float<Q_TYPE>(static_cast<u16>(raw.both)), to_float<Q_TYPE>(static_cast<u16>(raw.both >> 16))};
#endif
}

__device__ __forceinline__ float2 added(float2 sum, float by, Pair x) {
  return {fmaf(by, x.x, sum.x), fmaf(by, x.y, sum.y)};
}

// Some tokens of a query, a lane each.
struct Item {
  bool exists;
  winner_t winner;  // of the document's tokens, or -1
  float weight;
  [[maybe_unused]] float inverse;  // of the token's norm
  Raw rows[AHEAD];
};

// A warp's share of a document's queries, AHEAD tokens at a time, without those whose gradient is 0.
struct Items {
  i64 document, num_queries, num_documents, number, end;
  int lane;
  // Of a block of queries, a lane each.
  i64 pair = 0, query = 0;
  float g = 0.0f;
  u32 active = 0;
  // Of the present query.
  float weight = 0.0f;
  i64 of_query = 0, entry = 0, first_row = 0, tokens = 0, c = 0;

  __device__ __forceinline__ Items(i64 begin, i64 end, i64 document, i64 num_queries, i64 num_documents, int lane,
                                   int warp)
      : document(document),
        num_queries(num_queries),
        num_documents(num_documents),
        number(begin + warp + lane * COPIES),
        end(end),
        lane(lane) {}

  __device__ __forceinline__ bool next(const float* grad, const i64* order, const i64* query_index, const i64* q_bounds,
                                       i64 q_length) {
    c += AHEAD;
    while (c >= tokens) {
      while (!active) {
        if (__shfl_sync(ALL, number, 0) >= end) return false;
        g = 0.0f;
        if (number < end) {
#if LAYOUT == EVERY
          query = number;
          pair = number * num_documents + document;
#elif LAYOUT == OWN
          query = document / num_documents;
          pair = document;
#else
          pair = order[number];
          query = query_index[pair];
#endif
          if (query >= 0 && query < num_queries) g = grad[pair];
        }
        active = __ballot_sync(ALL, g != 0.0f);
        number += 32 * COPIES;
      }
      const int from = __ffs(active) - 1;
      active &= active - 1;
      weight = __shfl_sync(ALL, g, from);
      of_query = __shfl_sync(ALL, query, from);
#if Q_PACKED
      first_row = boundary(q_bounds, of_query, q_length);
      tokens = boundary(q_bounds, of_query + 1, q_length) - first_row;
      entry = first_row * num_documents + document * tokens;
#else
      first_row = of_query * q_length;
      tokens = q_length;
      entry = __shfl_sync(ALL, pair, from) * q_length;
#endif
      c = 0;
    }
    return true;
  }

  // Where the query's rows start.
  __device__ __forceinline__ i64 place(i64 q_stride_n, i64 q_stride_t) const {
#if Q_PACKED
    return first_row * q_stride_t;
#else
    return of_query * q_stride_n;
#endif
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    document_gradients(const query_t* __restrict__ q, const document_t* __restrict__ d, const float* __restrict__ grad,
                       const winner_t* __restrict__ argmax, const float* __restrict__ q_inverse,
                       const i64* __restrict__ q_bounds, const i64* __restrict__ d_bounds,
                       const i64* __restrict__ order, const i64* __restrict__ first,
                       const i64* __restrict__ query_index, document_t* __restrict__ out, i64 q_stride_n,
                       i64 q_stride_t, i64 d_stride_n, i64 d_stride_k, i64 d_stride_t, i64 num_queries,
                       i64 num_documents, i64 q_length, i64 d_length, i64 tiles, i64 tile_rows) {
  extern __shared__ float sums[];
  const int tile = static_cast<int>(tile_rows);
  const int lane = threadIdx.x & 31, warp = __shfl_sync(ALL, threadIdx.x >> 5, 0);
  const i64 document = blockIdx.x / tiles;
  const int k0 = blockIdx.y * SLICE, k = k0 + 2 * lane;

  i64 out_base = document * d_length, length = d_length;
#if LAYOUT == OWN
  [[maybe_unused]] i64 d_base = document / num_documents * d_stride_n + document % num_documents * d_stride_k;
#else
  [[maybe_unused]] i64 d_base = document * d_stride_n;
#endif
#if D_PACKED
  out_base = boundary(d_bounds, document, d_length);
  length = boundary(d_bounds, document + 1, d_length) - out_base;
  d_base = out_base * d_stride_t;
#endif
#if LAYOUT == EVERY
  const i64 begin = 0, end = num_queries;
#elif LAYOUT == OWN
  const i64 begin = document, end = document + 1;
#else
  const i64 begin = first[document], end = first[document + 1];
#endif

  const int copy = (tile + 1) * SLICE;  // of the sums, a warp's, with a row for what is not of this tile
  float* mine = sums + warp * copy + 2 * lane;
#if Q_STRIDE
  constexpr int row_stride = Q_STRIDE;
#else
  const i64 row_stride = q_stride_t;
#endif
  // A document of packed ones may be longer than its tiles, which then go round.
  for (i64 start = (blockIdx.x % tiles) * tile; start < length; start += tiles * tile) {
    const int rows = length - start < tile ? static_cast<int>(length - start) : tile;
    Items items(begin, end, document, num_queries, num_documents, lane, warp);
    Item even, odd;
    even.exists = false;
    auto fetch = [&](Item& item) {
      item.exists = items.next(grad, order, query_index, q_bounds, q_length);
      if (!item.exists) return;
      const bool there = items.c + lane < items.tokens;
      // Nothing is done with them before `add`, so that nothing waits for them here.
      item.winner = -1;
      if (there) item.winner = argmax[items.entry + items.c + lane];
      item.weight = items.weight;
#if NORMALIZE
      item.inverse = there ? q_inverse[items.first_row + items.c + lane] : 0.0f;
#endif
      const query_t* row =
          q + items.place(q_stride_n, q_stride_t) + items.c * row_stride + (lane < LANES && k < DIM ? k : k0);
      const int count = items.tokens - items.c < AHEAD ? static_cast<int>(items.tokens - items.c) : AHEAD;
      if (count == AHEAD) {
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) item.rows[n] = read(row + n * row_stride, DIM - k);
      } else {
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) item.rows[n] = read(row + (n < count ? n : 0) * row_stride, DIM - k);
      }
    };
    auto add = [&](const Item& item) {
      // The token of this tile that a lane's query token chose; the row behind the last for none.
      const bool here = item.winner >= start && item.winner < start + rows;
      const int winner = here ? item.winner - static_cast<int>(start) : tile;
      const u32 inside = __ballot_sync(ALL, here);
      if (!inside) return;
      // Bit n: query token n chose the row that token n - 1, n - 2, n - 3 did.
      u32 same[BATCH];
#pragma unroll
      for (int back = 1; back < BATCH; ++back)
        same[back] = __ballot_sync(ALL, __shfl_up_sync(ALL, winner, back) == winner);
      const int offset = winner * SLICE;
      float* at[AHEAD];
      [[maybe_unused]] float by[AHEAD];
#pragma unroll
      for (int n = 0; n < AHEAD; ++n) {
        at[n] = mine + __shfl_sync(ALL, offset, n);
#if NORMALIZE
        by[n] = item.weight * __shfl_sync(ALL, item.inverse, n);
#else
        by[n] = item.weight;
#endif
      }
      if (lane >= LANES) return;
      // Additions of a batch are under way together. One to the row of an earlier one goes on from its sum; which, is a
      // choice without a branch. What goes into the row behind the last, nobody reads.
#pragma unroll
      for (int n = 0; n < AHEAD; n += BATCH) {
#if TILED
        if (!(inside >> n & ((1u << BATCH) - 1))) continue;
#endif
        float2 sum[BATCH];
#pragma unroll
        for (int m = 0; m < BATCH; ++m) sum[m] = *reinterpret_cast<const float2*>(at[n + m]);
#pragma unroll
        for (int m = 0; m < BATCH; ++m) {
#pragma unroll
          for (int back = m; back > 0; --back) {
            if (same[back] >> (n + m) & 1) sum[m] = sum[m - back];
          }
          sum[m] = added(sum[m], by[n + m], widened(item.rows[n + m]));
        }
#pragma unroll
        for (int m = 0; m < BATCH; ++m) *reinterpret_cast<float2*>(at[n + m]) = sum[m];
      }
    };
    // The rows and winners of the next item are on their way while one is added.
    if (warp < COPIES) fetch(even);
    for (int n = threadIdx.x; n < COPIES * copy; n += 32 * WARPS) sums[n] = 0.0f;
    __syncthreads();
    while (even.exists) {
      fetch(odd);
      add(even);
      if (!odd.exists) break;
      fetch(even);
      add(odd);
    }
    __syncthreads();

#if NORMALIZE
    // Through x / |x|: the part along x is taken out. A warp takes a row, all of which lies in this slice.
    for (int t = warp; t < rows; t += WARPS) {
      float a[2], x[2], squares = 0.0f, product = 0.0f;
      bool live = false;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int at = 2 * lane + m;
        a[m] = x[m] = 0.0f;
        if (at < DIM) {
          for (int w = 0; w < COPIES; ++w) a[m] += sums[w * copy + t * SLICE + at];
          x[m] = to_float<D_TYPE>(d[d_base + (start + t) * d_stride_t + at]);
        }
        squares = fmaf(x[m], x[m], squares);
        product = fmaf(x[m], a[m], product);
        live |= a[m] != 0.0f;
      }
      live = __any_sync(ALL, live);
      squares = warp_sum(squares), product = warp_sum(product);
      const float norm = sqrtf(squares), inverse = 1.0f / (norm < SMALLEST_NORM ? SMALLEST_NORM : norm);
      const float along = norm < SMALLEST_NORM ? 0.0f : product * inverse;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int at = 2 * lane + m;
        const float found = live ? (a[m] - x[m] * (inverse * along)) * inverse : 0.0f;
        if (at < DIM) out[(out_base + start + t) * DIM + at] = rounded<D_TYPE>(found);
      }
    }
#else
    for (int n = threadIdx.x; n < rows * SLICE; n += 32 * WARPS) {
      const int t = n / SLICE, at = k0 + n % SLICE;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < COPIES; ++w) sum += sums[w * copy + n];
      if (at < DIM) out[(out_base + start + t) * DIM + at] = rounded<D_TYPE>(sum);
    }
#endif
    __syncthreads();
  }
}
