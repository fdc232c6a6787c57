// Gradients of query tokens: of every document, the gradient of the score times the row that won.
//
// That is a gather, of rows that lie anywhere. A warp owns TOKENS tokens of a query. It notes in shared memory which of
// 32 documents have a gradient and which rows won there; then a group of lanes reads a row, eight dimensions a lane, so
// that a warp reads GROUPS rows at once, of each token, and AHEAD of these together. SHARES warps have the same tokens
// and every SHARES-th 32 documents. Each sum has one order: within a group that of the documents, then groups, then
// warps. Only rows that won are read, so NaN and infinity of others reach nothing.
//
// Constants: DIM; SLICE (dimensions of a block, at most 256; DIM where that is less); TOKENS; WARPS; SHARES; LAYOUT
// (EVERY, OWN, INDEXED); Q_TYPE, D_TYPE (F16, BF16, F32); WIDE_ARGMAX (int32); Q_PACKED, D_PACKED; NORMALIZE (d within
// one slice); SUM (added to a float32 output, without the Jacobian of `normalize`); ALIGNED (rows of documents are
// multiples of eight dimensions and 16 bytes); D_STRIDE (from row to row: d, or 0 for any other); TOGETHER (winners of
// four tokens lie in one aligned word).

#include "common.h"
#include "gather.h"
#include "ptx.h"
#include "tokens.h"

constexpr int AHEAD = ALIGNED ? 2 : 1;

#if SUM
typedef float out_t;
#else
typedef query_t out_t;
#endif

// A score of the query's.
struct Scored {
  float gradient;
  i64 pair, document;
};

// What of 32 documents has a gradient, a line each.
struct Notes {
  float weight[32];
  i64 rows[32];  // where the document's rows start, in elements
#if NORMALIZE
  i64 first[32];  // the number of its first row
#endif
  int winners[32][TOKENS];  // -1 for none
};

__device__ __forceinline__ void read_winners(int (&found)[TOKENS], const winner_t* argmax, i64 token, i64 q_length) {
#if TOGETHER
#if WIDE_ARGMAX
  const uint4 four = __ldg(reinterpret_cast<const uint4*>(argmax + token));
  found[0] = four.x, found[1] = four.y, found[2] = four.z, found[3] = four.w;
#else
  const uint2 two = __ldg(reinterpret_cast<const uint2*>(argmax + token));
  found[0] = static_cast<short>(two.x), found[1] = static_cast<short>(two.x >> 16);
  found[2] = static_cast<short>(two.y), found[3] = static_cast<short>(two.y >> 16);
#endif
#else
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) found[t] = token + t < q_length ? argmax[token + t] : -1;
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS)
    query_gradients(const query_t* __restrict__ q, const document_t* __restrict__ d, const float* __restrict__ grad,
                    const winner_t* __restrict__ argmax, const float* __restrict__ d_inverse,
                    const i64* __restrict__ q_bounds, const i64* __restrict__ d_bounds, const i64* __restrict__ order,
                    const i64* __restrict__ first, const i64* __restrict__ document_index, out_t* __restrict__ out,
                    i64 q_stride_n, i64 q_stride_t, i64 d_stride_n, i64 d_stride_k, i64 d_stride_t, i64 num_queries,
                    i64 num_documents, i64 q_length, i64 d_length, i64 chunks) {
  // The shuffle says that all lanes have one answer.
  const int lane = threadIdx.x & 31, warp = __shfl_sync(ALL, threadIdx.x >> 5, 0);
  const int share = warp % SHARES;
  const int group = lane / LANES, k = blockIdx.y * SLICE + lane % LANES * EACH;
  const i64 query = blockIdx.x / chunks;
#if D_STRIDE
  constexpr i64 row_stride = D_STRIDE;
#else
  const i64 row_stride = d_stride_t;
#endif

  i64 out_base = query * q_length, length = q_length;
  [[maybe_unused]] i64 q_base = query * q_stride_n;
#if Q_PACKED
  out_base = boundary(q_bounds, query, q_length);
  length = boundary(q_bounds, query + 1, q_length) - out_base;
  q_base = out_base * q_stride_t;
#endif
#if LAYOUT == INDEXED
  const i64 begin = first[query], end = first[query + 1];
#else
  const i64 begin = 0, end = num_documents;
#endif

  auto scored = [&](i64 number) {
    Scored found = {};
    if (number >= end) return found;
#if LAYOUT == INDEXED
    found.pair = order[number];
    found.document = document_index[found.pair];
    if (found.document < 0 || found.document >= num_documents) return found;
#else
    found.pair = query * num_documents + number;
    found.document = number;
#endif
    found.gradient = grad[found.pair];
    return found;
  };

  __shared__ Notes all_notes[WARPS];
  Notes& notes = all_notes[warp];
#if SHARES > 1
  __shared__ float shares[WARPS][TOKENS][LANES * EACH];
#endif
  constexpr int BLOCK_TOKENS = WARPS / SHARES * TOKENS;
  // A query of packed ones may be longer than its chunks, which then go round.
  for (i64 start = blockIdx.x % chunks * BLOCK_TOKENS; start < length; start += chunks * BLOCK_TOKENS) {
    const i64 token = start + warp / SHARES * TOKENS;
    float sum[TOKENS][EACH];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
      for (int n = 0; n < EACH; ++n) sum[t][n] = 0.0f;
    }
    Scored next = scored(begin + 32 * share + lane);
    for (i64 base = begin + 32 * share; base < end && token < length; base += 32 * SHARES) {
      const auto [g, pair, document] = next;
      // It is on its way while this one's rows are.
      next = scored(base + 32 * SHARES + lane);
      const u32 active = __ballot_sync(ALL, g != 0.0f);
      if (!active) continue;
      if (g != 0.0f) {
        const int line = __popc(active & ((1u << lane) - 1));
        [[maybe_unused]] i64 first_row = document * d_length;
        i64 tokens = d_length;
#if D_PACKED
        first_row = boundary(d_bounds, document, d_length);
        tokens = boundary(d_bounds, document + 1, d_length) - first_row;
        notes.rows[line] = first_row * d_stride_t;
#elif LAYOUT == OWN
        first_row += query * num_documents * d_length;
        notes.rows[line] = query * d_stride_n + document * d_stride_k;
#else
        notes.rows[line] = document * d_stride_n;
#endif
#if NORMALIZE
        notes.first[line] = first_row;
#endif
        notes.weight[line] = g;
#if Q_PACKED
        const i64 entry = out_base * num_documents + document * length;
#else
        const i64 entry = pair * q_length;
#endif
        int winners[TOKENS];
        read_winners(winners, argmax + entry, token, length);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) notes.winners[line][t] = winners[t] < tokens ? winners[t] : -1;
      }
      __syncwarp();
      const int count = __popc(active);
      for (int from = 0; from < count; from += AHEAD * GROUPS) {
        Raw<D_TYPE> raw[AHEAD][TOKENS];
        float weight[AHEAD][TOKENS];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
          const int line = from + a * GROUPS + group;
          const bool there = line < count && group < GROUPS;
          const float g_here = there ? notes.weight[line] : 0.0f;
          const document_t* rows = d + (there ? notes.rows[line] : 0) + k;
#pragma unroll
          for (int t = 0; t < TOKENS; ++t) {
            const int winner = there ? notes.winners[line][t] : -1;
            weight[a][t] = winner < 0 ? 0.0f : g_here;
#if NORMALIZE
            if (winner >= 0) weight[a][t] *= d_inverse[notes.first[line] + winner];
#endif
            raw[a][t] = nothing<D_TYPE>();
            if (winner >= 0) raw[a][t] = read<D_TYPE>(rows + winner * row_stride, DIM - k);
          }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
#pragma unroll
          for (int t = 0; t < TOKENS; ++t) add<D_TYPE>(sum[t], weight[a][t], raw[a][t]);
        }
      }
      __syncwarp();
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) add_groups(sum[t], lane);
#if SHARES > 1
    if (share && group == 0) {
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
        for (int n = 0; n < EACH; ++n) shares[warp][t][lane * EACH + n] = sum[t][n];
      }
    }
    __syncthreads();
    if (!share && group == 0) {
      for (int other = 1; other < SHARES; ++other) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
          for (int n = 0; n < EACH; ++n) sum[t][n] += shares[warp + other][t][lane * EACH + n];
        }
      }
    }
    __syncthreads();
    if (share) continue;
#endif
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (token + t >= length) break;
      out_t* to = out + (out_base + token + t) * DIM + k;
      const int left = group ? 0 : DIM - k;
#if SUM
      bool any = false;
#pragma unroll
      for (int n = 0; n < EACH; ++n) any |= sum[t][n] != 0.0f;
      if (any) add_to(to, sum[t], left);
#else
#if NORMALIZE
      through_norm<Q_TYPE>(sum[t], q + q_base + (token + t) * q_stride_t + k, left);
#endif
      write<Q_TYPE>(to, sum[t], left);
#endif
    }
  }
}
