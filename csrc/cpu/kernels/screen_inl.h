// The screen: int8 finds the document tokens that can win, and only those are scored in full.
//
// Query and document tokens are rounded to int8, which multiplies four times as much an instruction as fp32. How far an
// int8 similarity can be off is known for every query token (margin_inl.h), so a token that lies further below the best
// one than twice that cannot be the maximum. What is left, a few tokens of hundreds, is scored by the same
// multiply-adds in the same order as in a tile: the result has the same bits as without the screen. Where too many
// tokens are left, nothing is gained and the tile does the work.
#pragma once

#include "pairs_inl.h"

#ifdef EDGECOLBERT_SCREENS
namespace {

// By how many bits sums become int16: they are below 127 * 255 * dim.
constexpr int shift_of(int dim) { return 17 - __builtin_clz(127u * 255u * unsigned(dim) - 1); }

// int8 sums of T tokens with R registers of query tokens: `scores` [T][lanes] takes them as int16, `top` the largest.
template <int T, int R, class Dim, class Feed>
[[gnu::noinline]] void screen_tile(const uint32_t* document, int64_t row_stride, const uint32_t* query, Dim dim,
                                   int16_t* scores, int16_t* top, Feed& feed) {
  const int64_t words = (dim + DotI8::dims_of_word - 1) / DotI8::dims_of_word;
  const int shift = shift_of(dim);
  Simd::I sum[T][R];
  const uint32_t* rows[T / 3];
  start_tile<DotI8>(sum, rows, document, row_stride);
  multiply_add_and_feed<DotI8>(sum, rows, row_stride, query, words, feed);
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
        widener_(job),
        left_(kToken * length_ * group_.registers * Simd::width * 2 / 3) {}

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
  static constexpr float kDecay = 1.0f - 1.0f / 512.0f;  // of the guess, a block

  // What pairs may take: what a token takes a lane of the fp32 tile is `kToken`. Few dimensions hide less of what is
  // around a sum.
  static constexpr int64_t kToken = 4;
  static int64_t cost_of_product(int dim) { return 2 * kToken + 240 / dim; }
  static int64_t cost_of_pair(int dim) { return 4 * kToken + 1536 / dim; }

  // Many panels pay for exact errors. For few of them the first one's tiles narrow tokens on the side, where there are
  // registers for that.
  bool score_block(int64_t first, int64_t tokens) {
    Narrowed narrowed{};
    alignas(64) int16_t top[Scores::lanes];  // of the first panel
    bool scored = Simd::registers == 32 && screen_.largest > 0.0f && !many_panels();
    if (scored) {
      narrowed = group_.registers >= R ? narrow_and_score<R>(first, tokens, screen_.largest, top)
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

  bool many_panels() const { return group_.registers > 8 * R; }

  Narrowed narrow(int64_t first, int64_t tokens, float largest) {
    return many_panels() ? narrow<true>(first, tokens, largest) : narrow<false>(first, tokens, largest);
  }

  template <bool exact>
  Narrowed narrow(int64_t first, int64_t tokens, float largest) {
    Narrowed result;
    with_dim(job_.dim, [&](auto dim) {
      Narrower<Element, decltype(dim), exact> narrower(job_, widener_, dim, largest);
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
        tile<registers>(dim, start_of(token, tokens), 0, top, narrower);
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

  template <int registers, class Dim, class Feed>
  void tile(Dim dim, int64_t token, int64_t r, int16_t* top, Feed& feed) {
    const int64_t words = (dim + DotI8::dims_of_word - 1) / DotI8::dims_of_word;
    screen_tile<T, registers>(screen_.narrowed + token * narrow_stride_, narrow_stride_,
                              group_.words_i8 + r * words * Simd::width, dim, screen_.scores + token * Scores::lanes,
                              top, feed);
  }

  // `known`: the largest scores, where the tiles have been done.
  template <int registers>
  bool score_panel(int64_t r, int64_t first, int64_t tokens, const Narrowed& narrowed, const int16_t* known) {
    alignas(64) int16_t top[Scores::lanes];
    Scores::store(top, known ? Scores::load(known) : Scores::lowest());
    if (!known) {
      with_dim(job_.dim, [&](auto dim) {
        NoFeed nothing;
        for (int64_t token = 0; token < tokens; token += T)
          tile<registers>(dim, start_of(token, tokens), r, top, nothing);
      });
    }
    find<registers>(tokens, threshold<registers>(r, first, narrowed, top));
    PairScore<Element> scorer(job_, widener_, r, first);
    int64_t pairs = Scores::list_pairs(screen_.hits, tokens, screen_.pairs);
    if (scorer.many(pairs)) {
      left_ -= pairs * cost_of_product(job_.dim);
      if (left_ < 0) return false;
      pairs = scorer.template keep_best<registers>(pairs, (narrowed.norm + narrowed.rest) / narrowed.steps);
    }
    left_ -= pairs * cost_of_pair(job_.dim);
    if (left_ < 0) return false;
    scorer.template score<registers>(pairs);
    return true;
  }

  // How far below the best one a token can win, in steps.
  Simd::F margin_of(int64_t r, const Narrowed& narrowed) const {
    const float* const factors = group_.margins + kMarginFactors * r * Simd::width;
    const auto times = [&](MarginFactor factor, float x) {
      return Simd::multiply(Simd::load(factors + factor * Simd::width), Simd::broadcast(x));
    };
    return Simd::add(narrowed.measured ? times(kOfRest, narrowed.rest) : times(kOfHalfSteps, 1.0f),
                     times(kOfNorm, narrowed.norm));
  }

  // Scores from which on a token may be the best one.
  template <int registers>
  typename Scores::V threshold(int64_t r, int64_t first, const Narrowed& narrowed, const int16_t* top) const {
    alignas(64) float margin[registers * Simd::width];
    Simd::I steps[registers];
    for (int i = 0; i < registers; ++i) {
      const Simd::F sum = margin_of(r + i, narrowed);
      Simd::store(margin + i * Simd::width, sum);
      steps[i] = Simd::to_integer(sum);
    }
    // Two more: scores are rounded down, and so is this.
    const typename Scores::V threshold = Scores::subtract(
        Scores::subtract(Scores::load(top), Scores::pack(steps[0], steps[registers - 1], shift_of(job_.dim))),
        Scores::two());
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
        Scores::pack(Simd::load(sums), Simd::load(sums + (registers - 1) * Simd::width), shift_of(job_.dim));
    return Scores::maximum(threshold, Scores::subtract(earlier, Scores::two()));
  }

  // The lanes of every token that reach the threshold.
  template <int registers>
  [[gnu::noinline]] void find(int64_t tokens, typename Scores::V threshold) {
    const uint32_t wanted = registers == 1 ? Scores::kFirstRegister : ~0u;
    for (int64_t t = 0; t < tokens; ++t)
      screen_.hits[t] = Scores::at_least(Scores::load(screen_.scores + t * Scores::lanes), threshold) & wanted;
  }

  const ScoreJob& job_;
  const QueryGroup& group_;
  Screen& screen_;
  const int64_t length_, narrow_stride_;
  Widener<DotF32, Element> widener_;
  int64_t left_;  // for pairs, of two thirds of the time of the fp32 tile: int8 takes a third
};

constexpr int32_t kMostFailures = 6;  // in a row that make the pause longer

}  // namespace
#endif

namespace {

#ifndef EDGECOLBERT_SCREENS
constexpr int64_t kShortestScreened = kNever, kShortestScreenedFast = kNever;
#endif

// False: the tile of fp32 has to. Bits do not tell which of them did, so it may depend on the documents before.
template <class Element>
bool score_screened([[maybe_unused]] const ScoreJob& job) {
#ifdef EDGECOLBERT_SCREENS
  if (!job.group->margins) return false;
  Screen& screen = *job.screen;
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
  const int64_t shortest = job.group->words_i16 ? kShortestScreenedFast : kShortestScreened;
  const bool screen = job.screen && job.document.length >= shortest;
  if (screen ? score_screened<Element>(job) : score_integers<Element>(job)) return;
  if (job.argmax ? DocumentScore<DotF32, Element, Pick::argmax>(job).run()
                 : DocumentScore<DotF32, Element, Pick::maximum>(job).run())
    return;
  DocumentScore<DotF32, Element, Pick::argmax_or_nan>(job).run();
}

}  // namespace
