// Gradients of document tokens: of every query token that chose one, its row times the gradient of the score.
//
// Which those are is known only here. A block owns a tile of one document's tokens and a slice of their dimensions; it
// sorts the winners of the document's queries by the token that they name, and then gathers, as the gradients of
// queries do. Nothing is added atomically but counts. The sort is stable, and warps take equal parts of the sorted
// list, so that a token that many chose is shared and each sum has one order in every run: in a warp's part that of the
// list by groups, then groups, then warps. A row is multiplied only for the token that it chose, so NaN and infinity
// reach no other.
//
// Constants: DIM; SLICE (dimensions of a block, at most 256; DIM where that is less); WARPS; LAYOUT (EVERY, OWN,
// INDEXED); Q_TYPE, D_TYPE (F16, BF16, F32); WIDE_ARGMAX (int32); Q_PACKED, D_PACKED; NORMALIZE (d within one slice);
// MULTI (a warp's items may be more than `most_items`, which then are sorted in turn, and float32 sums stay in shared
// memory); ALIGNED (rows of queries are multiples of eight dimensions and 16 bytes); Q_STRIDE (from token to token: d,
// or 0 for any other).
//
// Shared memory, in this order: with MULTI sums, float [tile_rows][LANES * EACH]; Items, 32 bytes each, most_items a
// warp; what warps have of rows that began in an earlier one's part, float [WARPS][LANES * EACH]; counts, int
// [WARPS][tile_rows]; where tokens' entries start, int [tile_rows + 1]; the sorted list, u16, 32 an item.

#include "common.h"
#include "gather.h"
#include "ptx.h"
#include "tokens.h"

constexpr int WIDTH = LANES * EACH;
// Rows that a group reads together: with those of the other groups 16, as far as registers go.
constexpr int MOST_AHEAD = Q_TYPE == F32 ? 4 : NORMALIZE ? 6 : 8;
constexpr int WANTED = (16 + GROUPS - 1) / GROUPS;
constexpr int AHEAD = !ALIGNED ? 1 : WANTED < MOST_AHEAD ? WANTED : MOST_AHEAD;
// Items whose winners are on their way together.
constexpr int BATCH = 8;

// Pieces of queries, of up to 32 tokens. Those whose rows a warp gathers together are anywhere in these, so that each
// of their words has an array of its own.
struct Items {
  i64* places;   // of the first token's row, in elements
  i64* entries;  // of its winner
  i64* firsts;   // its number, for `normalize`
  float* weights;
  int* tokens;
};

// A warp's share of a document's items: of those whose number is `warp` modulo WARPS, the ones whose gradient is not 0.
struct Share {
  i64 number, end;  // of the item that a lane looks at next
  // What a lane has: the rest of a query, from token c on.
  i64 place = 0, entry = 0, tokens = 0, c = 0;
  [[maybe_unused]] i64 first_row = 0;
  float weight = 0.0f;

  // Lists up to `most` from `begin` on, and returns how many. A query is `pieces` numbers; a longer one of packed ones
  // goes round.
  template <typename Look>
  __device__ __forceinline__ int list(const Items& items, int begin, int most, i64 pieces, i64 stride_t, int lane,
                                      const Look& look) {
    int count = 0;
    while (count < most) {
      const u32 active = __ballot_sync(ALL, c < tokens);
      if (!active) {
        if (__shfl_sync(ALL, number, 0) >= end) break;
        tokens = 0;
        if (number < end) look(*this);
        number += 32 * WARPS;
        continue;
      }
      const int at = count + __popc(active & ((1u << lane) - 1));
      if (c < tokens && at < most) {
        items.places[begin + at] = place + c * stride_t, items.entries[begin + at] = entry + c;
#if NORMALIZE
        items.firsts[begin + at] = first_row + c;
#endif
        items.weights[begin + at] = weight;
        items.tokens[begin + at] = tokens - c < 32 ? static_cast<int>(tokens - c) : 32;
        c += 32 * pieces;
      }
      count += __popc(active);
    }
    return count < most ? count : most;
  }

  __device__ __forceinline__ bool more() const {
    return __any_sync(ALL, c < tokens) || __shfl_sync(ALL, number, 0) < end;
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS)
    document_gradients(const query_t* __restrict__ q, const document_t* __restrict__ d, const float* __restrict__ grad,
                       const winner_t* __restrict__ argmax, const float* __restrict__ q_inverse,
                       const i64* __restrict__ q_bounds, const i64* __restrict__ d_bounds,
                       const i64* __restrict__ order, const i64* __restrict__ first,
                       const i64* __restrict__ query_index, document_t* __restrict__ out, i64 q_stride_n,
                       i64 q_stride_t, i64 d_stride_n, i64 d_stride_k, i64 d_stride_t, i64 num_queries,
                       i64 num_documents, i64 q_length, i64 d_length, i64 tiles, i64 tile_rows, i64 most_items,
                       i64 pieces) {
  alignas(16) extern __shared__ float sums[];
  __shared__ int counted[WARPS];
  __shared__ int continued[WARPS];  // the row that began in an earlier warp's part, or -1
  [[maybe_unused]] __shared__ bool unfinished[WARPS];
  const int tile = static_cast<int>(tile_rows), most = static_cast<int>(most_items);
  const int all_items = WARPS * most;
  Items items;
  items.places = reinterpret_cast<i64*>(sums + (MULTI ? tile * WIDTH : 0));
  items.entries = items.places + all_items, items.firsts = items.entries + all_items;
  items.weights = reinterpret_cast<float*>(items.firsts + all_items);
  items.tokens = reinterpret_cast<int*>(items.weights + all_items);
  float* parts = reinterpret_cast<float*>(items.tokens + all_items);
  int* counts = reinterpret_cast<int*>(parts + WARPS * WIDTH);
  int* starts = counts + WARPS * tile;
  u16* list = reinterpret_cast<u16*>(starts + tile + 1);

  // The shuffle says that all lanes have one answer.
  const int lane = threadIdx.x & 31, warp = __shfl_sync(ALL, threadIdx.x >> 5, 0);
  const int group = lane / LANES, slice = blockIdx.y * SLICE, k = slice + lane % LANES * EACH;
  const int left = group ? 0 : DIM - k;  // dimensions of a sum that this lane has
  const i64 document = blockIdx.x / tiles;
#if Q_STRIDE
  constexpr int row_stride = Q_STRIDE;
#else
  const i64 row_stride = q_stride_t;
#endif

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

  auto look = [&](Share& share) {
#if LAYOUT == EVERY
    const i64 query = share.number / pieces, pair = query * num_documents + document;
#elif LAYOUT == OWN
    const i64 query = document / num_documents, pair = document;
#else
    const i64 pair = order[share.number / pieces], query = query_index[pair];
#endif
    if (query < 0 || query >= num_queries) return;
    const float g = grad[pair];
    if (g == 0.0f) return;
    share.weight = g, share.c = share.number % pieces * 32;
#if Q_PACKED
    share.first_row = boundary(q_bounds, query, q_length);
    share.tokens = boundary(q_bounds, query + 1, q_length) - share.first_row;
    share.place = share.first_row * row_stride;
    share.entry = share.first_row * num_documents + document * share.tokens;
#else
    share.first_row = query * q_length, share.tokens = q_length;
    share.place = query * q_stride_n, share.entry = pair * q_length;
#endif
  };

  // A document of packed ones may be longer than its tiles, which then go round.
  for (i64 start = (blockIdx.x % tiles) * tile; start < length; start += tiles * tile) {
    const int rows = length - start < tile ? static_cast<int>(length - start) : tile;
    auto write_row = [&](int row, float (&sum)[EACH]) {
#if NORMALIZE
      through_norm<D_TYPE>(sum, d + d_base + (start + row) * d_stride_t + k, left);
#endif
      write<D_TYPE>(out + (out_base + start + row) * DIM + k, sum, left);
    };
    auto finish = [&](int row, float (&sum)[EACH]) {
#if MULTI
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        if (!group) sums[row * WIDTH + lane * EACH + n] += sum[n];
      }
#else
      write_row(row, sum);
#endif
    };

    Share share{begin * pieces + warp + lane * WARPS, end * pieces};
#if MULTI
    for (int n = threadIdx.x; n < rows * WIDTH; n += 32 * WARPS) sums[n] = 0.0f;
    bool more;
    do {
#endif
      // How many of a warp's entries name each token.
      const int mine = warp * most;
      int* my_counts = counts + warp * tile;
      const int count = share.list(items, mine, most, pieces, row_stride, lane, look);
      for (int n = lane; n < rows; n += 32) my_counts[n] = 0;
#if MULTI
      const bool rest = share.more();
      if (lane == 0) unfinished[warp] = rest;
#endif
      __syncwarp();
      // For each item which token of the tile a lane's entry names, or -1; the first pass has them read, the second
      // finds them in a cache.
      auto each_item = [&](const auto& act) {
        for (int from = 0; from < count; from += BATCH) {
          int tokens[BATCH], winners[BATCH];
          i64 entries[BATCH];
#pragma unroll
          for (int n = 0; n < BATCH; ++n) {
            const int item = mine + (from + n < count ? from + n : from);
            tokens[n] = from + n < count ? items.tokens[item] : 0;
            entries[n] = items.entries[item];
          }
#pragma unroll
          for (int n = 0; n < BATCH; ++n) {
            winners[n] = -1;
            if (lane < tokens[n]) winners[n] = argmax[entries[n] + lane];
          }
#pragma unroll
          for (int n = 0; n < BATCH; ++n) {
            const bool here = winners[n] >= start && winners[n] < start + rows;
            if (from + n < count) act(mine + from + n, here ? winners[n] - static_cast<int>(start) : -1);
          }
        }
      };
      each_item([&](int, int row) {
        if (row >= 0) atomicAdd(my_counts + row, 1);
      });
      __syncthreads();

      // A thread has a token: its counts become where, of its entries, each warp's start.
      int total = 0;
      for (int from = 0; from < rows; from += 32 * WARPS) {
        const int row = from + threadIdx.x;
        int of_row = 0;
        if (row < rows) {
#pragma unroll
          for (int w = 0; w < WARPS; ++w) {
            const int of_warp = counts[w * tile + row];
            counts[w * tile + row] = of_row;
            of_row += of_warp;
          }
        }
        int before = of_row;
#pragma unroll
        for (int far = 1; far < 32; far *= 2) {
          const int other = __shfl_up_sync(ALL, before, far);
          if (lane >= far) before += other;
        }
        if (lane == 31) counted[warp] = before;
        __syncthreads();
        before += total - of_row;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
          if (w < warp) before += counted[w];
          total += counted[w];
        }
        if (row < rows) starts[row] = before;
        __syncthreads();
      }
      if (threadIdx.x == 0) starts[rows] = total;
#if MULTI
      more = false;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) more |= unfinished[w];
#endif

      // Equal lanes of an item are entries in their order, and items come in theirs.
      each_item([&](int item, int row) {
        const u32 same = __match_any_sync(ALL, row);
        const int before = __popc(same & ((1u << lane) - 1));
        if (row >= 0) list[starts[row] + my_counts[row] + before] = static_cast<u16>(item * 32 + lane);
        __syncwarp();
        if (row >= 0 && !before) my_counts[row] += __popc(same);
        __syncwarp();
      });
      __syncthreads();

#if !MULTI
      for (int n = threadIdx.x; n < rows * LANES; n += 32 * WARPS) {
        const int row = n / LANES, at = slice + n % LANES * EACH;
        if (starts[row] != starts[row + 1]) continue;
        const float zeros[EACH] = {};
        write<D_TYPE>(out + (out_base + start + row) * DIM + at, zeros, DIM - at);
      }
#endif
      float sum[EACH];
      int row = 0, begun = -1;
      if (lane == 0) continued[warp] = -1;
      int at = total * warp / WARPS;
      const int stop = total * (warp + 1) / WARPS;
      if (at < stop) {
        // The token of the first entry is the last whose entries start no later.
        for (int above = rows; above - row > 1;) {
          const int middle = (row + above) / 2;
          if (starts[middle] <= at) {
            row = middle;
          } else {
            above = middle;
          }
        }
      }
      while (at < stop) {
        const int row_end = starts[row + 1], last = row_end < stop ? row_end : stop;
        const bool from_before = starts[row] < at;
#pragma unroll
        for (int n = 0; n < EACH; ++n) sum[n] = 0.0f;
        for (; at < last; at += AHEAD * GROUPS) {
          // Nothing waits for a row before all are asked for.
          int slots[AHEAD];
          i64 places[AHEAD];
          float weights[AHEAD];
          Raw<Q_TYPE> raw[AHEAD];
#pragma unroll
          for (int a = 0; a < AHEAD; ++a) {
            const int entry = at + a * GROUPS + group;
            slots[a] = list[entry < last ? entry : last - 1];
          }
#pragma unroll
          for (int a = 0; a < AHEAD; ++a) {
            const int item = slots[a] / 32, token = slots[a] % 32;
            places[a] = items.places[item] + token * row_stride;
            weights[a] = items.weights[item];
#if NORMALIZE
            weights[a] *= q_inverse[items.firsts[item] + token];
#endif
          }
#pragma unroll
          for (int a = 0; a < AHEAD; ++a) {
            const bool there = at + a * GROUPS + group < last && group < GROUPS;
            weights[a] = there ? weights[a] : 0.0f;
            raw[a] = nothing<Q_TYPE>();
            if (there) raw[a] = read<Q_TYPE>(q + places[a] + k, DIM - k);
          }
#pragma unroll
          for (int a = 0; a < AHEAD; ++a) add<Q_TYPE>(sum, weights[a], raw[a]);
        }
        add_groups(sum, lane);
        at = last;
        if (from_before) {
          if (lane == 0) continued[warp] = row;
#pragma unroll
          for (int n = 0; n < EACH; ++n) {
            if (!group) parts[warp * WIDTH + lane * EACH + n] = sum[n];
          }
        } else if (at == stop) {
          begun = row;
        } else {
          finish(row, sum);
        }
        if (at == stop) break;
        do ++row;
        while (starts[row + 1] == at);
      }
      __syncthreads();
      // The last row of a warp's part may go on in those of the next.
      if (begun >= 0) {
        for (int w = warp + 1; w < WARPS; ++w) {
          if (continued[w] != begun) continue;
#pragma unroll
          for (int n = 0; n < EACH; ++n) {
            if (!group) sum[n] += parts[w * WIDTH + lane * EACH + n];
          }
        }
        finish(begun, sum);
      }
#if MULTI
    } while (more);
    __syncthreads();
    for (int row = warp; row < rows; row += WARPS) {
      float sum[EACH];
#pragma unroll
      for (int n = 0; n < EACH; ++n) sum[n] = group ? 0.0f : sums[row * WIDTH + lane * EACH + n];
      write_row(row, sum);
    }
    __syncthreads();
#endif
  }
}
