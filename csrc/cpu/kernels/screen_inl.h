// The screen: integers find the document tokens that can win, and only those are scored in full.
//
// Query and document tokens are rounded to integers of 7 or 8 bits, of which an instruction multiplies four times as
// many as of fp32. The token with the largest integer similarity is scored first. How far such a similarity can be off
// is known for every query token (margin_inl.h), so a token whose own lies further than that below the score of the
// first cannot be the maximum. What is left, a few tokens of hundreds, is scored by the same multiply-adds in the same
// order as in a tile: the result has the same bits as without the screen. Where too many tokens are left, nothing is
// gained and the tile does the work.
#pragma once

#include "pairs_inl.h"

#ifdef EDGECOLBERT_SCREENS
namespace {

// By how many bits sums become int16. They are below 127 * 128 * dim, which takes one bit more, but few come near that.
// Those that do are cut off, and tokens at that limit are left if any of them is.
constexpr int shift_of(int dim) {
  if (ScreenInt::sums_halves) return 0;
  const int bits = 32 - __builtin_clz(127u * 128u * unsigned(dim) - 1);
  return bits > 16 ? bits - 16 : 0;
}
template <int dim>
constexpr Constant<shift_of(dim)> shift_of(Constant<dim>) {
  return {};
}

// The largest scores so far, and the tokens that have them: `start` + Scores::tag_of(score).
struct Highest {
  alignas(64) int16_t scores[Scores::lanes];
  alignas(64) int16_t starts[Scores::lanes];
  int16_t start;  // of the tile at hand

  void clear() {
    Scores::store(scores, Scores::lowest());
    Scores::store(starts, Scores::zero());
  }
};

// Integer sums of the T tokens from highest.start on with R registers of query tokens: `scores` [T][lanes] takes them
// as int16, whose lowest bits tell which of the T it is.
template <int T, int R, class Dim, class Feed>
[[gnu::noinline]] void screen_tile(const uint32_t* document, int64_t row_stride, const uint32_t* query,
                                   const int32_t* biases, Dim dim, int16_t* scores, Highest& highest, Feed& feed) {
  const int64_t words = (dim + DotScreen::dims_of_word - 1) / DotScreen::dims_of_word;
  const auto shift = shift_of(dim);
  Simd::I sum[T][R];
  const uint32_t* rows[T / 3];
  start_tile<DotScreen>(sum, rows, document, row_stride);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    sum[0][r] = ScreenInt::negative(Simd::load(biases + r * Simd::width));
#pragma GCC unroll 16
    for (int t = 1; t < T; ++t) sum[t][r] = sum[0][r];
  }
  multiply_add_and_feed<DotScreen>(sum, rows, row_stride, query, words, feed);
  const typename Scores::V before = Scores::load(highest.scores);
  typename Scores::V top = before;
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    Simd::I of_panel[kPanelRegisters];
#pragma GCC unroll 4
    for (int r = 0; r < kPanelRegisters; ++r) of_panel[r] = ScreenInt::total(sum[t][r < R ? r : R - 1]);
    const typename Scores::V packed = Scores::tagged(Scores::pack(of_panel, shift), t);
    Scores::store(scores + t * Scores::lanes, packed);
    top = Scores::maximum(top, packed);
  }
  Scores::store(highest.scores, top);
  Scores::store(highest.starts,
                Scores::where_greater(top, before, Scores::broadcast(highest.start), Scores::load(highest.starts)));
}

template <class Element>
class ScreenedScore {
 public:
  explicit ScreenedScore(const ScoreJob& job)
      : job_(job),
        group_(*job.group),
        screen_(*job.screen),
        length_(job.document.length),
        narrow_stride_(widened_stride<DotScreen>(job.dim)),
        widener_(job),
        hits_(reinterpret_cast<Scores::Hits*>(job.screen->hits)),
        left_(int64_t(kToken * length_ * group_.registers * Simd::width * kForPairs)) {}

  float guess() const { return guess_; }

  // False: too many tokens could win, or the values do not allow it; `best` and `index` are then undefined.
  bool run() {
    // A query token of zeros: every similarity is 0 and the first token wins. Its margin lets none through.
    const Simd::I lowest = Simd::bits(Simd::broadcast(-__builtin_inff()));
    for (int64_t lane = 0; lane < group_.registers * Simd::width; lane += Simd::width) {
      const Simd::I best =
          Simd::where_equal(Simd::load(group_.scales + lane), Simd::zero(), Simd::zero_integer(), lowest);
      Simd::store(job_.best + lane, Simd::from_bits(best));
      Simd::store(job_.index + lane, Simd::zero_integer());
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

  // What pairs may take of the time of the fp32 tile, of which the screen itself takes the rest.
  static constexpr float kForPairs = ScreenInt::sums_halves ? 1.0f / 2 : 2.0f / 3;
  // What a token takes a lane of the fp32 tile is `kToken`. Few dimensions hide less of what is
  // around a sum.
  static constexpr int64_t kToken = 4;
  static int64_t cost_of_product(int dim) { return 2 * kToken + 240 / dim; }
  static int64_t cost_of_pair(int dim) { return 4 * kToken + 1536 / dim; }
  static int64_t cost_of_lane(int dim) { return cost_of_pair(dim) / 2; }

  // Many panels pay for exact errors. For few of them the first one's tiles narrow tokens on the side, where there are
  // registers for that.
  bool score_block(int64_t first, int64_t tokens) {
    Narrowed narrowed{};
    Highest highest;  // of the first panel
    bool scored = kNarrowsOnTheSide && screen_.largest > 0.0f && !many_panels();
    if (scored) {
      narrowed = group_.registers >= R ? narrow_and_score<R>(first, tokens, screen_.largest, highest)
                                       : narrow_and_score<1>(first, tokens, screen_.largest, highest);
    }
    float largest = screen_.largest > 0.0f ? screen_.largest : 1.0f, factor = 1.0f;
    bool too_long = false;
    guess_ = 0.0f;
    for (int attempt = 0; !narrowed.fits(); ++attempt) {
      if (scored || attempt > 0) {
        largest = narrowed.best_guess();
        too_long = narrowed.largest <= kMostSteps && narrowed.norm > DotScreen::kLongestDocument;
      }
      if (narrowed.largest > kMostSteps) {  // by a little at first; values that were cut off could be of any size
        largest *= factor;
        factor = 64.0f;
      }
      if (attempt == kMostAttempts || !(largest >= kSmallestScreened && largest <= kLargestScreened)) return false;
      scored = false;
      narrowed = narrow(first, tokens, largest);
    }
    if (!(narrowed.largest_value() >= kSmallestScreened && narrowed.largest_value() <= kLargestScreened)) return false;
    // Where rounding makes tokens longer, the better guess would be too low again.
    guess_ = too_long ? kGuessedSteps / narrowed.steps : narrowed.best_guess();
    screen_.largest = guess_ > screen_.largest * kDecay ? guess_ : screen_.largest * kDecay;
    repeat_last(tokens);
    for (int64_t r = 0; r < group_.registers;) {
      const Highest* const known = r == 0 && scored ? &highest : nullptr;
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
      Narrower<Element, decltype(dim), exact> narrower(job_, widener_, dim, largest, kNarrowsOnTheSide);
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

  // A tile narrows the tokens of the next one between its own k-steps. One panel: two tiles take turns, and never leave
  // the nearest cache.
  template <int registers>
  Narrowed narrow_and_score(int64_t first, int64_t tokens, float largest, Highest& highest) {
    Narrowed result;
    const bool again = group_.registers > registers;  // others want the tokens as well
    with_dim(job_.dim, [&](auto dim) {
      Narrower<Element, decltype(dim), false> narrower(job_, widener_, dim, largest, true);
      highest.clear();
      const int64_t ready = tokens < T ? tokens : T;
      uint32_t *rows = screen_.narrowed, *other = rows + T * narrow_stride_;
      narrower.set(first, first + ready, rows);
      narrower.finish();
      repeat_last(ready);
      for (int64_t start = 0, left = tokens - T;; left = tokens - start - T) {
        const int64_t next = left < T ? start + left : start + T;
        uint32_t* const next_rows = again ? screen_.narrowed + next * narrow_stride_ : other;
        narrower.set(first + next, left > 0 ? first + next + T : first + next, next_rows);
        tile<registers>(dim, rows, start, 0, highest, narrower);
        narrower.finish();
        if (left <= 0) break;
        start = next;
        other = rows;
        rows = next_rows;
      }
      result = narrower.result();
    });
    return result;
  }

  static int64_t start_of(int64_t token, int64_t tokens) {
    return token + T > tokens && tokens >= T ? tokens - T : token;
  }

  template <int registers, class Dim, class Feed>
  void tile(Dim dim, const uint32_t* rows, int64_t token, int64_t r, Highest& highest, Feed& feed) {
    const int64_t words = (dim + DotScreen::dims_of_word - 1) / DotScreen::dims_of_word;
    highest.start = int16_t(token);
    screen_tile<T, registers>(rows, narrow_stride_, group_.words_i8 + r * words * Simd::width,
                              group_.biases + r * Simd::width, dim, screen_.scores + token * Scores::lanes, highest,
                              feed);
  }

  // Of this document the tokens from `token` on, or the next one.
  Ahead ahead(int64_t token) const {
    const Tokens& now = job_.document;
    const int bytes = job_.dim * int(sizeof(Element));
    if (token < length_ && !now.kept)
      return Ahead(now.data + token * now.token_stride, now.token_stride, length_ - token, bytes);
    return Ahead(job_.next.data, job_.next.token_stride, token < length_ ? 0 : job_.next.length, bytes);
  }

  // `known`: the largest scores, where the tiles have been done.
  template <int registers>
  bool score_panel(int64_t r, int64_t first, int64_t tokens, const Narrowed& narrowed, const Highest* known) {
    Highest highest;
    if (!known) {
      highest.clear();
      with_dim(job_.dim, [&](auto dim) {
        const auto all = [&](auto feed) {
          for (int64_t token = 0; token < tokens; token += T) {
            const int64_t start = start_of(token, tokens);
            tile<registers>(dim, screen_.narrowed + start * narrow_stride_, start, r, highest, feed);
          }
        };
        if constexpr (!kNarrowsOnTheSide) {
          if (r == 0 && widener_.feedable()) return all(ahead(first + tokens));
        }
        all(NoFeed());
      });
      known = &highest;
    }
    PairScore<Element> scorer(job_, widener_, r, first);
    int32_t likely[Scores::lanes];  // token of every score, not of every lane
    for (int i = 0; i < Scores::lanes; ++i) {
      const int32_t token = known->starts[i] + Scores::tag_of(known->scores[i]);
      likely[i] = token < int32_t(tokens) ? token : int32_t(tokens) - 1;  // tiles are filled up with the last one
    }
    left_ -= registers * Simd::width * cost_of_lane(job_.dim);
    scorer.template score_lanes<registers>(likely);
    find<registers>(tokens, threshold<registers>(r, narrowed));
    for (int i = 0; i < Scores::lanes; ++i) hits_[likely[i]] &= Scores::Hits(~(1u << i));
    int64_t pairs = Scores::list_pairs(hits_, tokens, screen_.pairs);
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

  // Scores from which on a token may be better than the best of its lane.
  template <int registers>
  typename Scores::V threshold(int64_t r, const Narrowed& narrowed) const {
    Simd::I steps[R];
    for (int i = 0; i < registers; ++i) {
      const float* const factors = group_.margins + kMarginFactors * (r + i) * Simd::width;
      const auto times = [&](MarginFactor factor, float x) {
        return Simd::multiply(Simd::load(factors + factor * Simd::width), Simd::broadcast(x));
      };
      const Simd::F margin =
          Simd::add(narrowed.measured ? times(kOfRest, narrowed.rest) : times(kOfHalfSteps, narrowed.lost / kHalfStep),
                    times(kOfNorm, narrowed.norm));
      const Simd::F best =
          Simd::multiply(Simd::load(job_.best + (r + i) * Simd::width), times(kOfSteps, narrowed.steps));
      // What rounding can cost here: a share of the similarity, and a step.
      const Simd::F rounding =
          Simd::multiply_add(Simd::from_bits(Simd::absolute_bits(best)), Simd::broadcast(1e-6f), Simd::broadcast(1.0f));
      steps[i] = Simd::to_integer(Simd::subtract(best, Simd::add(margin, rounding)));
    }
    for (int i = registers; i < R; ++i) steps[i] = steps[registers - 1];
    return Scores::tagged(Scores::pack(steps, shift_of(job_.dim)), 0);
  }

  // The lanes of every token that reach the threshold.
  template <int registers>
  [[gnu::noinline]] void find(int64_t tokens, typename Scores::V threshold) {
    Scores::find(screen_.scores, tokens, threshold, registers == 1 ? Scores::kFirstRegister : Scores::kAll, hits_);
  }

  const ScoreJob& job_;
  const QueryGroup& group_;
  Screen& screen_;
  const int64_t length_, narrow_stride_;
  Widener<DotF32, Element> widener_;
  Scores::Hits* const hits_;
  int64_t left_;     // for pairs
  float guess_ = 0;  // that the last block would have liked; 0: its values do not allow int8
};

constexpr int32_t kMostFailures = 6;  // in a row that make the pause longer

}  // namespace
#endif

namespace {

#ifndef EDGECOLBERT_SCREENS
constexpr int64_t kShortestScreened = kNever, kShortestScreenedFast = kNever;
constexpr int kScreenedDimensions = 0;
constexpr bool kNarrowsOnTheSide = true;
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
  ScreenedScore<Element> scorer(job);
  if (scorer.run()) {
    ++screen.done;
    screen.failures = 0;
    return true;
  }
  screen.largest = scorer.guess();  // it may have been too coarse
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
