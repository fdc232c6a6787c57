// The tile: T document tokens x R registers of query tokens.
//
// T * R accumulators stay in registers over all dimensions. A k-step costs R loads and T broadcasts for T * R
// multiply-adds. Between k-steps the tile widens tokens of the next tile: conversions use units that the multiply-adds
// leave idle, while run after one another they would cost a tenth (fp32) to a quarter (int16) of the time.
#pragma once

#include "widen_inl.h"

namespace {

enum class Pick { maximum, argmax, argmax_or_nan };

// `steps` k-steps: rows and query move on by them.
template <class Dot, int steps, int T, int R>
[[gnu::always_inline]] inline void multiply_add_steps(typename Dot::V (&sum)[T][R], const uint32_t* (&rows)[T / 3],
                                                      int64_t row_stride, const uint32_t*& query) {
#pragma GCC unroll 4
  for (int step = 0; step < steps; ++step) {
    typename Dot::V q[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) q[r] = Dot::load(query + (step * R + r) * Simd::width);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const typename Dot::V d = Dot::broadcast(rows[t / 3] + (t % 3) * row_stride + step);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) Dot::multiply_add(sum[t][r], q[r], d);
    }
  }
  query += steps * R * Simd::width;
#pragma GCC unroll 16
  for (int i = 0; i < T / 3; ++i) {
    rows[i] += steps;
    __asm__("" : "+r"(rows[i]));  // else the compiler keeps T pointers and spills them
  }
}

// One k-step, whose word of every document token is a lane of `documents`.
template <class Dot, int lane, int T, int R>
[[gnu::always_inline]] inline void multiply_add_lane(typename Dot::V (&sum)[T][R],
                                                     const typename Dot::V (&documents)[T], const uint32_t* query) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename Dot::V q = Dot::load(query + (lane * R + r) * Simd::width);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) Dot::template multiply_add_lane<lane>(sum[t][r], q, documents[t]);
  }
}

// Four k-steps. A load brings four words of a document token, and no broadcast takes a turn of the multiply-adds'
// units.
template <class Dot, int T, int R>
[[gnu::always_inline]] inline void multiply_add_lanes(typename Dot::V (&sum)[T][R], const uint32_t* (&rows)[T / 3],
                                                      int64_t row_stride, const uint32_t*& query) {
  typename Dot::V documents[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) documents[t] = Dot::load(rows[t / 3] + (t % 3) * row_stride);
  multiply_add_lane<Dot, 0>(sum, documents, query);
  multiply_add_lane<Dot, 1>(sum, documents, query);
  multiply_add_lane<Dot, 2>(sum, documents, query);
  multiply_add_lane<Dot, 3>(sum, documents, query);
  query += 4 * R * Simd::width;
#pragma GCC unroll 16
  for (int i = 0; i < T / 3; ++i) {
    rows[i] += 4;
    __asm__("" : "+r"(rows[i]));  // as above
  }
}

template <class Dot, int T, int R>
[[gnu::always_inline]] inline void multiply_add(typename Dot::V (&sum)[T][R], const uint32_t* (&rows)[T / 3],
                                                int64_t row_stride, const uint32_t*& query, const uint32_t* query_end) {
  constexpr int steps = Dot::steps_of_round;
  if constexpr (Simd::multiplies_lanes) {
    while (query_end - query >= 4 * R * Simd::width) multiply_add_lanes<Dot>(sum, rows, row_stride, query);
  } else if constexpr (steps > 1) {
    while (query_end - query >= steps * R * Simd::width) multiply_add_steps<Dot, steps>(sum, rows, row_stride, query);
  }
  while (query != query_end) multiply_add_steps<Dot, 1>(sum, rows, row_stride, query);
}

template <class Dot, int T, int R>
[[gnu::always_inline]] inline void start_tile(typename Dot::V (&sum)[T][R], const uint32_t* (&rows)[T / 3],
                                              const uint32_t* document, int64_t row_stride) {
  static_assert(T % 3 == 0, "rows are addressed in threes: base, base + stride, base + 2 * stride");
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[t][r] = Dot::zero();
  }
#pragma GCC unroll 16
  for (int i = 0; i < T / 3; ++i) rows[i] = document + 3 * i * row_stride;
}

// For a tile that has nothing to widen.
struct NoFeed {
  static constexpr int kTokensOfStep = 0;
  void finish() {}
};

// All k-steps of a tile. Between them `feed` widens tokens of another one.
template <class Dot, int T, int R, class Feeder>
[[gnu::always_inline]] inline void multiply_add_and_feed(typename Dot::V (&sum)[T][R], const uint32_t* (&rows)[T / 3],
                                                         int64_t row_stride, const uint32_t* query, int64_t words,
                                                         Feeder& feed) {
  const uint32_t* const query_end = query + words * (R * Simd::width);
  if constexpr (Feeder::kTokensOfStep == 0) {
    multiply_add<Dot>(sum, rows, row_stride, query, query_end);
  } else {
    constexpr int steps_of_tile = (T + Feeder::kTokensOfStep - 1) / Feeder::kTokensOfStep;
    constexpr int together = Simd::multiplies_lanes ? 4 : 1;
    const int64_t steps = round_up((words + steps_of_tile - 1) / steps_of_tile, together) * (R * Simd::width);
    auto&& cursor = feed.begin();
    while (query != query_end) {
      const uint32_t* const pause = query_end - query > steps ? query + steps : query_end;
      multiply_add<Dot>(sum, rows, row_stride, query, pause);
      cursor.step();
    }
    feed.end(cursor);
  }
}

// best[lane] = max(best[lane], <query lane, document token>), and where asked the token of the maximum.
template <class Dot, int T, int R, Pick pick, class Feeder>
[[gnu::noinline]] void score_tile(const uint32_t* document, int64_t row_stride, const uint32_t* query, int64_t words,
                                  typename Dot::Lane* best, int32_t* index, int32_t first_token, Feeder& feed) {
  using V = typename Dot::V;
  V sum[T][R];
  const uint32_t* rows[T / 3];
  start_tile<Dot>(sum, rows, document, row_stride);
  multiply_add_and_feed<Dot>(sum, rows, row_stride, query, words, feed);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    V top = Dot::load(best + r * Simd::width);
    if constexpr (pick == Pick::maximum) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) top = Dot::maximum(sum[t][r], top);
    } else {
      Simd::I winner = Simd::load(index + r * Simd::width);
      if constexpr (pick == Pick::argmax) {
        V tile_top = sum[0][r];
#pragma GCC unroll 16
        for (int t = 1; t < T; ++t) tile_top = Dot::maximum(tile_top, sum[t][r]);
        Simd::I tile_winner = Simd::broadcast(first_token + T - 1);
#pragma GCC unroll 16
        for (int t = T - 2; t >= 0; --t)  // the first of equals
          tile_winner = Simd::where_equal(sum[t][r], tile_top, Simd::broadcast(first_token + t), tile_winner);
        Simd::take_greater(top, winner, tile_top, tile_winner);
      } else {
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) Simd::take_greater_or_nan(top, winner, sum[t][r], Simd::broadcast(first_token + t));
      }
      Simd::store(index + r * Simd::width, winner);
    }
    Dot::store(best + r * Simd::width, top);
  }
}

}  // namespace
