// Gradients of document tokens. A query token that chose document token t adds g q to its row.
//
// Nothing is added atomically. A block owns a tile of one document's tokens and a slice of their dimensions; each of
// its warps owns a copy of the sums in shared memory and every WARPS-th query, and a lane two dimensions of all rows.
// So what a lane reads, adds to and writes back, no other lane touches: the order of a sum is that of the queries, in
// every run. Copies are added up at the end, in order. Only rows that were chosen are touched, so NaN and infinity
// reach no other.
//
// Constants: DIM; SLICE (dimensions of a block, even, at most 64); WARPS; LAYOUT (EVERY, OWN, INDEXED); Q_TYPE, D_TYPE
// (F16, BF16, F32); WIDE_ARGMAX (int32); Q_PACKED, D_PACKED; NORMALIZE (d within one slice); PAIRED (two dimensions lie
// in one aligned word). Sums are float32, and shared memory is WARPS x tile x SLICE of them.

#define EVERY 0
#define OWN 1
#define INDEXED 2
#define F16 0
#define BF16 1
#define F32 2

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

#if Q_TYPE == F32
typedef float query_t;
#else
typedef u16 query_t;
#endif
#if D_TYPE == F32
typedef float document_t;
#else
typedef u16 document_t;
#endif
#if WIDE_ARGMAX
typedef int winner_t;
#else
typedef short winner_t;
#endif

#define ALL 0xffffffffu
#define SMALLEST_NORM 1e-12f
constexpr int LANES = SLICE / 2;
// Rows of a query that are read ahead.
constexpr int AHEAD = 32;
// Additions that are under way together, where no two are to one row.
constexpr int BATCH = 4;

__device__ __forceinline__ float half_to_float(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

template <int TYPE, typename T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (TYPE == F32) {
    return x;
  } else if constexpr (TYPE == BF16) {
    return __uint_as_float(static_cast<u32>(x) << 16);
  } else {
    return half_to_float(x);
  }
}

__device__ __forceinline__ document_t rounded(float x) {
#if D_TYPE == F32
  return x;
#else
  u16 y;
#if D_TYPE == F16
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
  return y;
#endif
}

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

__device__ __forceinline__ Raw read(const query_t* row, int k, int last) {
  Raw raw;
#if PAIRED
#if Q_TYPE == F32
  float2 two = __ldg(reinterpret_cast<const float2*>(row + k));
  raw.x = two.x, raw.y = two.y;
#else
  raw.both = __ldg(reinterpret_cast<const u32*>(row + k));
#endif
#else
  query_t x = k < last ? row[k] : query_t(0), y = k + 1 < last ? row[k + 1] : query_t(0);
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

__device__ __forceinline__ i64 boundary(const i64* bounds, i64 number, i64 rows) {
  i64 at = bounds[number];
  return at < 0 ? 0 : at > rows ? rows : at;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int far = 16; far; far >>= 1) x += __shfl_xor_sync(ALL, x, far);
  return x;
}

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
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
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

  float* mine = sums + warp * (tile * SLICE) + 2 * lane;
  // A document of packed ones may be longer than its tiles, which then go round.
  for (i64 start = (blockIdx.x % tiles) * tile; start < length; start += tiles * tile) {
    const int rows = length - start < tile ? static_cast<int>(length - start) : tile;
    for (int n = threadIdx.x; n < WARPS * tile * SLICE; n += 32 * WARPS) sums[n] = 0.0f;
    __syncthreads();

    for (i64 block = begin + warp; block < end; block += 32 * WARPS) {
      const i64 number = block + lane * WARPS;
      i64 pair = 0, query = 0;
      float g = 0.0f;
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
      for (u32 active = __ballot_sync(ALL, g != 0.0f); active; active &= active - 1) {
        const int from = __ffs(active) - 1;
        const float weight = __shfl_sync(ALL, g, from);
        const i64 of_query = __shfl_sync(ALL, query, from);
#if Q_PACKED
        const i64 q_start = boundary(q_bounds, of_query, q_length);
        i64 tokens = boundary(q_bounds, of_query + 1, q_length) - q_start;
        tokens = tokens < 0 ? 0 : tokens;
        const i64 entry = q_start * num_documents + document * tokens;
        [[maybe_unused]] const i64 number_of_row = q_start;
        const query_t* row = q + q_start * q_stride_t;
#else
        const i64 tokens = q_length;
        [[maybe_unused]] const i64 number_of_row = of_query * q_length;
        const i64 entry = __shfl_sync(ALL, pair, from) * q_length;
        const query_t* row = q + of_query * q_stride_n;
#endif
        for (i64 c = 0; c < tokens; c += AHEAD) {
          const bool exists = c + lane < tokens;
          // The token of this tile that a lane's query token chose; `tile` for none.
          int winner = exists ? argmax[entry + c + lane] : -1;
          winner = winner >= start && winner < start + rows ? winner - static_cast<int>(start) : tile;
          const u32 todo = __ballot_sync(ALL, winner < tile);
          if (!todo) continue;
          float factor = weight;
#if NORMALIZE
          if (exists) factor *= q_inverse[number_of_row + c + lane];
#endif
          const int last_row = tokens - c < AHEAD ? static_cast<int>(tokens - c) - 1 : AHEAD - 1;
          Raw ahead[AHEAD];
          if (lane < LANES) {
#pragma unroll
            for (int n = 0; n < AHEAD; ++n)
              ahead[n] = read(row + (c + (n < last_row ? n : last_row)) * q_stride_t, k, DIM);
          }
          // Lanes whose row is also that of an earlier one of their batch.
          const u32 earlier =
              __match_any_sync(ALL, winner) & ((1u << lane) - 1) & (((1u << BATCH) - 1) << (lane & -BATCH));
          const u32 twice = __ballot_sync(ALL, winner < tile && earlier);
#pragma unroll
          for (int n = 0; n < AHEAD; n += BATCH) {
            const u32 batch = ((1u << BATCH) - 1) << n;
            if (!(todo & batch)) continue;
            int at[BATCH];
            float by[BATCH];
#pragma unroll
            for (int m = 0; m < BATCH; ++m) {
              at[m] = __shfl_sync(ALL, winner, n + m) * SLICE;
#if NORMALIZE
              by[m] = __shfl_sync(ALL, factor, n + m);
#else
              by[m] = factor;
#endif
            }
            if (lane >= LANES) continue;
            if ((todo & batch) == batch && !(twice & batch)) {
              Pair sum[BATCH];
#pragma unroll
              for (int m = 0; m < BATCH; ++m) {
                const float2 two = *reinterpret_cast<const float2*>(mine + at[m]);
                sum[m] = {two.x, two.y};
              }
#pragma unroll
              for (int m = 0; m < BATCH; ++m) {
                const Pair x = widened(ahead[n + m]);
                const float2 two = {fmaf(by[m], x.x, sum[m].x), fmaf(by[m], x.y, sum[m].y)};
                *reinterpret_cast<float2*>(mine + at[m]) = two;
              }
            } else {
#pragma unroll
              for (int m = 0; m < BATCH; ++m) {
                if (!(todo >> (n + m) & 1)) continue;
                float2* place = reinterpret_cast<float2*>(mine + at[m]);
                const Pair x = widened(ahead[n + m]);
                float2 two = *place;
                two.x = fmaf(by[m], x.x, two.x), two.y = fmaf(by[m], x.y, two.y);
                *place = two;
              }
            }
          }
        }
      }
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
          for (int w = 0; w < WARPS; ++w) a[m] += sums[(w * tile + t) * SLICE + at];
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
        if (at < DIM) out[(out_base + start + t) * DIM + at] = rounded(found);
      }
    }
#else
    for (int n = threadIdx.x; n < rows * SLICE; n += 32 * WARPS) {
      const int t = n / SLICE, at = k0 + n % SLICE;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += sums[w * (tile * SLICE) + n];
      if (at < DIM) out[(out_base + start + t) * DIM + at] = rounded(sum);
    }
#endif
    __syncthreads();
  }
}
