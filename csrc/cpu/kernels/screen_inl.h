// The screen: int8 finds the document tokens that can win, and only those are scored in full.
//
// Query and document tokens are rounded to int8, which multiplies four times as much an instruction as fp32. How far an
// int8 similarity can be off is known for every query token (margin_inl.h), so a token that lies further below the best
// one than twice that cannot be the maximum. What is left, two to five tokens of hundreds, is scored by the same
// multiply-adds in the same order as in a tile: the result has the same bits as without the screen. Where too many
// tokens are left, nothing is gained and the tile does the work.
#pragma once

#include "narrow_inl.h"

#ifdef EDGECOLBERT_SCREENS
namespace {

// Of a tile whose tokens are all narrowed.
struct NoFeed {
  static constexpr bool kIdle = true;
  struct Cursor {
    void step() {}
  };
  Cursor begin() { return {}; }
  void end(Cursor) {}
};

// int8 sums of T tokens with R registers of query tokens: `scores` [T][lanes] takes them as int16, `top` the largest.
template <int T, int R, class Feed>
[[gnu::noinline]] void screen_tile(const uint32_t* document, int64_t row_stride, const uint32_t* query, int64_t words,
                                   int16_t* scores, int16_t* top, int shift, Feed& feed) {
  Simd::I sum[T][R];
  const uint32_t* rows[T / 3];
  start_tile<DotI8>(sum, rows, document, row_stride);
  const uint32_t* const query_end = query + words * (R * Simd::width);
  const int64_t steps = Feed::kIdle ? words * (R * Simd::width) : (words + T - 1) / T * (R * Simd::width);
  auto cursor = feed.begin();  // a copy, which can live in registers
  while (query != query_end) {
    const uint32_t* const pause = query_end - query > steps ? query + steps : query_end;
    multiply_add<DotI8>(sum, rows, row_stride, query, pause);
    cursor.step();
  }
  feed.end(cursor);
  typename Scores::V highest = Scores::load(top);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const typename Scores::V packed = Scores::pack(sum[t][0], sum[t][R - 1], shift);
    Scores::store(scores + t * Scores::lanes, packed);
    highest = Scores::maximum(highest, packed);
  }
  Scores::store(top, highest);
}

template <class Element>
class ScreenedScore {
 public:
  explicit ScreenedScore(const ScoreJob& job)
      : job_(job),
        group_(*job.group),
        screen_(*job.screen),
        length_(job.document.length),
        narrow_stride_(widened_stride<DotI8>(job.dim)),
        shift_(shift_of(job.dim)),
        widener_(job),
        pairs_left_(length_ * group_.registers * Simd::width / tokens_of_pair(job.dim)) {}

  // False: too many tokens could win, or the values do not allow it; `best` and `index` are then undefined.
  bool run() {
    for (int64_t lane = 0; lane < group_.registers * Simd::width; lane += Simd::width) {
      Simd::store(job_.best + lane, Simd::broadcast(-__builtin_inff()));
      Simd::store(job_.index + lane, Simd::zero_integer());
    }
    // A query token of zeros: every similarity is 0 and the first token wins. Its margin lets none through.
    for (int64_t lane = 0; lane < group_.registers * Simd::width; ++lane) {
      if (group_.scales[lane] == 0.0f) job_.best[lane] = 0.0f;
    }
    for (int64_t first = 0; first < length_; first += job_.block_tokens) {
      if (!score_block(first, length_ - first < job_.block_tokens ? length_ - first : job_.block_tokens)) return false;
    }
    return true;
  }

 private:
  static constexpr int T = kTileTokens;
  static constexpr int R = kPanelRegisters;
  static constexpr int kMostAttempts = 8;
  static constexpr float kDecay = 1.0f - 1.0f / 256.0f;  // of the guess, a block

  // A pair takes as long as so many tokens of a tile take a lane; few dimensions hide less of what is around its sum.
  static int tokens_of_pair(int dim) { return 4 + 384 / dim; }

  // Sums are below 127 * 255 * dim.
  static int shift_of(int dim) {
    int shift = 0;
    while (127.0f * 255.0f * float(dim) > float(1 << (15 + shift))) ++shift;
    return shift;
  }

  // With one panel of query registers, tiles narrow tokens on the side; with several, that is done before, and better.
  bool score_block(int64_t first, int64_t tokens) {
    Narrowed narrowed{};
    alignas(64) int16_t top[Scores::lanes];  // of the only panel
    bool scored = screen_.largest > 0.0f && (group_.registers == R || group_.registers == 1);
    if (scored) {
      narrowed = group_.registers == R ? narrow_and_score<R>(first, tokens, screen_.largest, top)
                                       : narrow_and_score<1>(first, tokens, screen_.largest, top);
    }
    float largest = screen_.largest > 0.0f ? screen_.largest : 1.0f, factor = 1.0f;
    for (int attempt = 0; !narrowed.fits(); ++attempt) {
      if (scored || attempt > 0) largest = narrowed.largest_value();
      if (narrowed.largest > kMostSteps) {  // by a little at first; values that were cut off could be of any size
        largest *= factor;
        factor = 64.0f;
      }
      if (attempt == kMostAttempts || !(largest >= kSmallestScreened && largest <= kLargestScreened)) return false;
      scored = false;
      narrowed = narrow(first, tokens, largest);
    }
    largest = narrowed.largest_value();
    screen_.largest = largest > screen_.largest * kDecay ? largest : screen_.largest * kDecay;
    repeat_last(tokens);
    for (int64_t r = 0; r < group_.registers;) {
      const int16_t* const known = r == 0 && scored ? top : nullptr;
      const bool panel = r + R <= group_.registers;
      if (!(panel ? score_panel<R>(r, first, tokens, narrowed, known)
                  : score_panel<1>(r, first, tokens, narrowed, known)))
        return false;
      r += panel ? R : 1;
    }
    return true;
  }

  Narrowed narrow(int64_t first, int64_t tokens, float largest) {
    Narrowed result;
    with_dim(job_.dim, [&](auto dim) {
      Narrower<Element, decltype(dim), true> narrower(job_, widener_, dim, largest);
      narrower.set(first, first + tokens, screen_.narrowed);
      narrower.finish();
      result = narrower.result();
    });
    return result;
  }

  // Rows to fill a tile up.
  void repeat_last(int64_t tokens) {
    uint32_t* const last = screen_.narrowed + (tokens - 1) * narrow_stride_;
    for (int64_t i = 1; i <= T - tokens; ++i) memcpy(last + i * narrow_stride_, last, size_t(narrow_stride_) * 4);
  }

  // A tile narrows the tokens of the next one between its own k-steps.
  template <int registers>
  Narrowed narrow_and_score(int64_t first, int64_t tokens, float largest, int16_t* top) {
    Narrowed result;
    with_dim(job_.dim, [&](auto dim) {
      Narrower<Element, decltype(dim), false> narrower(job_, widener_, dim, largest);
      Scores::store(top, Scores::lowest());
      int64_t ready = tokens < T ? tokens : T;
      narrower.set(first, first + ready, screen_.narrowed);
      narrower.finish();
      repeat_last(ready);
      for (int64_t token = 0; token < tokens; token += T) {
        const int64_t wanted = ready + T < tokens ? ready + T : tokens;
        narrower.set(first + ready, first + wanted, screen_.narrowed + ready * narrow_stride_);
        tile<registers>(start_of(token, tokens), 0, top, narrower);
        narrower.finish();
        ready = wanted;
      }
      result = narrower.result();
    });
    return result;
  }

  static int64_t start_of(int64_t token, int64_t tokens) {
    return token + T > tokens && tokens >= T ? tokens - T : token;
  }

  template <int registers, class Feed>
  void tile(int64_t token, int64_t r, int16_t* top, Feed& feed) {
    const int64_t words = (job_.dim + DotI8::dims_of_word - 1) / DotI8::dims_of_word;
    screen_tile<T, registers>(screen_.narrowed + token * narrow_stride_, narrow_stride_,
                              group_.words_i8 + r * words * Simd::width, words, screen_.scores + token * Scores::lanes,
                              top, shift_, feed);
  }

  // `known`: the largest scores, where the tiles have been done.
  template <int registers>
  bool score_panel(int64_t r, int64_t first, int64_t tokens, const Narrowed& narrowed, const int16_t* known) {
    alignas(64) int16_t top[Scores::lanes];
    Scores::store(top, known ? Scores::load(known) : Scores::lowest());
    if (!known) {
      NoFeed nothing;
      for (int64_t token = 0; token < tokens; token += T) tile<registers>(start_of(token, tokens), r, top, nothing);
    }
    find<registers>(tokens, threshold<registers>(r, first, narrowed, top));
    const int64_t pairs = Scores::list_pairs(screen_.hits, tokens, screen_.pairs);
    pairs_left_ -= pairs;
    if (pairs_left_ < 0) return false;
    score_pairs<registers>(r, first, pairs);
    return true;
  }

  // Scores from which on a token may be the best one.
  template <int registers>
  typename Scores::V threshold(int64_t r, int64_t first, const Narrowed& narrowed, const int16_t* top) const {
    const Simd::F rest = Simd::broadcast(narrowed.rest), norm = Simd::broadcast(narrowed.norm);
    alignas(64) float margin[registers * Simd::width];
    Simd::I steps[registers];
    for (int i = 0; i < registers; ++i) {
      const float* const factors = group_.margins + 2 * (r + i) * Simd::width;
      const Simd::F sum =
          Simd::multiply_add(Simd::load(factors), rest, Simd::multiply(Simd::load(factors + Simd::width), norm));
      Simd::store(margin + i * Simd::width, sum);
      steps[i] = Simd::to_integer(sum);
    }
    // Two more: scores are rounded down, and so is this.
    const typename Scores::V threshold = Scores::subtract(
        Scores::subtract(Scores::load(top), Scores::pack(steps[0], steps[registers - 1], shift_)), Scores::two());
    if (first == 0) return threshold;
    // The best of the blocks before may be out of reach already.
    alignas(64) int32_t sums[registers * Simd::width];
    for (int i = 0; i < registers * Simd::width; ++i) {
      const int64_t lane = r * Simd::width + i;
      const double scale = group_.scales[lane];
      const double sum = double(job_.best[lane]) * double(narrowed.steps) / scale + double(group_.biases[lane]) -
                         0.5 * double(margin[i]) - 1.0;
      sums[i] = sum > -1e9 && sum < 1e9 ? int32_t(sum) : -1000000000;
    }
    const typename Scores::V earlier =
        Scores::pack(Simd::load(sums), Simd::load(sums + (registers - 1) * Simd::width), shift_);
    return Scores::maximum(threshold, Scores::subtract(earlier, Scores::two()));
  }

  // The lanes of every token that reach the threshold.
  template <int registers>
  [[gnu::noinline]] void find(int64_t tokens, typename Scores::V threshold) {
    const uint32_t wanted = registers == 1 ? Scores::kFirstRegister : ~0u;
    for (int64_t t = 0; t < tokens; ++t)
      screen_.hits[t] = Scores::at_least(Scores::load(screen_.scores + t * Scores::lanes), threshold) & wanted;
  }

  // Two registers of pairs at a time hide the latency of their sums; the last ones may repeat a pair.
  template <int registers>
  [[gnu::noinline]] void score_pairs(int64_t r, int64_t first, int64_t pairs) {
    constexpr int batch = 2 * Simd::width;
    const int64_t padded = round_up(pairs, batch);
    for (int64_t p = pairs; p < padded; ++p) screen_.pairs[p] = screen_.pairs[pairs - 1];
    for (int64_t p = 0; p < padded; p += batch) {
      alignas(64) float values[batch];
      alignas(64) int32_t lanes[batch], tokens[batch];
      for (int i = 0; i < batch; ++i) {
        lanes[i] = int32_t(screen_.pairs[p + i] & 0xff);
        tokens[i] = int32_t(first) + int32_t(screen_.pairs[p + i] >> 8);
      }
      score_batch<registers>(r, tokens, lanes, values);
      float* const best = job_.best + r * Simd::width;
      if (job_.argmax) {
        take(values, lanes, tokens, best, job_.index + r * Simd::width);
      } else {
        for (int i = 0; i < batch; ++i) best[lanes[i]] = best[lanes[i]] > values[i] ? best[lanes[i]] : values[i];
      }
    }
  }

  // No branches: whether a token is better than the one before it is as good as random.
  static void take(const float* values, const int32_t* lanes, const int32_t* tokens, float* best, int32_t* index) {
    for (int i = 0; i < 2 * Simd::width; ++i) {
      const int lane = lanes[i];
      const float before = best[lane];
      int32_t greater = -int32_t((values[i] > before) | ((values[i] == before) & (tokens[i] < index[lane])));
      __asm__("" : "+r"(greater));  // else the compiler makes a branch of it
      best[lane] = before > values[i] ? before : values[i];
      index[lane] ^= (index[lane] ^ tokens[i]) & greater;
    }
  }

  template <int registers>
  [[gnu::noinline]] void score_batch(int64_t r, const int32_t* tokens, const int32_t* lanes, float* values) {
    if constexpr (sizeof(Element) > 1) {
      constexpr int dims_of_step = 16 / int(sizeof(Element));
      if (widener_.feedable() && job_.dim % dims_of_step == 0) {
        const Tokens& document = job_.document;
        const Element* rows[2 * Simd::width];
        for (int i = 0; i < 2 * Simd::width; ++i) {
          const int64_t token = document.kept ? document.kept[tokens[i]] : tokens[i];
          rows[i] = reinterpret_cast<const Element*>(document.data + token * document.token_stride);
        }
        multiply_add_pairs<registers, dims_of_step>(r, rows, lanes, values);
        return;
      }
    }
    const float* rows[2 * Simd::width];
    for (int i = 0; i < 2 * Simd::width; ++i) {
      uint32_t* const row = screen_.rows + i * widener_.stride();
      widener_.widen(tokens[i], tokens[i] + 1, row);
      rows[i] = reinterpret_cast<const float*>(row);
    }
    multiply_add_pairs<registers, 4>(r, rows, lanes, values);
  }

  // Lanes are pairs: the document's rows are turned around, the query's lanes picked.
  template <int registers, int dims_of_step, class Row>
  void multiply_add_pairs(int64_t r, const Row* const* rows, const int32_t* lanes, float* values) {
    const float* query = reinterpret_cast<const float*>(group_.words_f32) + r * job_.dim * Simd::width;
    const Simd::I picked[2] = {Simd::load(lanes), Simd::load(lanes + Simd::width)};
    Simd::F sum[2] = {Simd::zero(), Simd::zero()};
    int dim = 0;
    for (; dim + dims_of_step <= job_.dim; dim += dims_of_step)
      multiply_add_step<registers, dims_of_step, dims_of_step>(rows, dim, query, picked, sum);
    if constexpr (dims_of_step == 4) {  // rows are filled up
      if (job_.dim - dim == 1) multiply_add_step<registers, 4, 1>(rows, dim, query, picked, sum);
      if (job_.dim - dim == 2) multiply_add_step<registers, 4, 2>(rows, dim, query, picked, sum);
      if (job_.dim - dim == 3) multiply_add_step<registers, 4, 3>(rows, dim, query, picked, sum);
    }
    Simd::store(values, sum[0]);
    Simd::store(values + Simd::width, sum[1]);
  }

  template <int registers, int dims_of_step, int dims, class Row>
  [[gnu::always_inline]] static void multiply_add_step(const Row* const* rows, int64_t dim, const float*& query,
                                                       const Simd::I (&picked)[2], Simd::F (&sum)[2]) {
#pragma GCC unroll 2
    for (int batch = 0; batch < 2; ++batch) {
      Simd::F document[dims_of_step];
      Simd::transpose(rows + batch * Simd::width, dim, document);
#pragma GCC unroll 8
      for (int k = 0; k < dims; ++k) {
        Simd::I row[registers];
#pragma GCC unroll 4
        for (int i = 0; i < registers; ++i) row[i] = Simd::bits(Simd::load(query + (k * registers + i) * Simd::width));
        sum[batch] = Simd::multiply_add(Simd::from_bits(Simd::pick(row, picked[batch])), document[k], sum[batch]);
      }
    }
    query += dims * registers * Simd::width;
  }

  const ScoreJob& job_;
  const QueryGroup& group_;
  Screen& screen_;
  const int64_t length_, narrow_stride_;
  const int shift_;
  Widener<DotF32, Element> widener_;
  int64_t pairs_left_;
};

constexpr int32_t kMostFailures = 6;  // in a row that make the pause longer

}  // namespace
#endif

namespace {

// False: the tile of fp32 has to. Bits do not tell which of them did, so it may depend on the documents before.
template <class Element>
bool score_screened([[maybe_unused]] const ScoreJob& job) {
#ifdef EDGECOLBERT_SCREENS
  Screen& screen = *job.screen;
  if (job.document.length < kShortestScreened) return false;
  if (screen.pause > 0) {
    --screen.pause;
    return false;
  }
  ++screen.tried;
  if (ScreenedScore<Element>(job).run()) {
    ++screen.done;
    screen.failures = 0;
    return true;
  }
  screen.largest = 0.0f;
  if (screen.failures < kMostFailures) ++screen.failures;
  screen.pause = (1 << screen.failures) - 1;
#endif
  return false;
}

template <class Element>
void score(const ScoreJob& job) {
  if (job.group->margins ? score_screened<Element>(job) : score_integers<Element>(job)) return;
  if (job.argmax ? DocumentScore<DotF32, Element, Pick::argmax>(job).run()
                 : DocumentScore<DotF32, Element, Pick::maximum>(job).run())
    return;
  DocumentScore<DotF32, Element, Pick::argmax_or_nan>(job).run();
}

}  // namespace
