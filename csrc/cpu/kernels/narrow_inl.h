// Document tokens rounded to integers of 7 or 8 bits for the screen.
//
// A block of them has one scale, which is guessed from the documents before: a document is then read once. Integers
// that were cut off show in the largest of them, and tokens that are too long in the norm: the block is done again with
// a better guess.
#pragma once

#include "margin_inl.h"
#include "score_inl.h"

#ifdef EDGECOLBERT_SCREENS
namespace {

// A value of the guessed size becomes so many steps; more than kMostSteps could be cut off.
constexpr float kGuessedSteps = float(DotScreen::kDocumentLimit) * 15 / 16;
constexpr float kMostSteps = float(DotScreen::kDocumentLimit) - 1.1f,
                kFewestSteps = float(DotScreen::kDocumentLimit) / 8;

// What is known of a block's integers v, which stand for v / steps.
struct Narrowed {
  float largest;     // of |v_k|, and not much more: |(v_k, v_k+1)| of neighbours
  float norm, rest;  // no token has a larger |v|, nor |steps d - v|
  bool measured;     // rest was: else it is `lost` a dimension
  float lost;        // in steps
  float steps;

  // None was cut off, no token is too long, and they are not too coarse.
  bool fits() const {
    const bool fine = largest >= kFewestSteps || norm >= DotScreen::kLongestDocument / 8;
    return fine && largest <= kMostSteps && norm <= DotScreen::kLongestDocument;
  }
  // A bound of |x|, and not much more, unless values were cut off.
  float largest_value() const { return (largest + lost) / steps; }
  // The guess that would fit these tokens if it were not for the rounding of their norm. Where a -128 was among them
  // the norm may be NaN: then the largest value decides.
  float best_guess() const {
    const float by_norm = 1.02f * norm / DotScreen::kLongestDocument * kGuessedSteps / steps;
    return by_norm > largest_value() ? by_norm : largest_value();
  }
};

template <bool first>
struct Choose {
  template <class A, class B>
  using Type = A;
};
template <>
struct Choose<false> {
  template <class A, class B>
  using Type = B;
};

// One register of bytes: `extents` of several would not add up.
constexpr bool has_few(Constant<48>) { return 4 * Simd::width >= 48; }
constexpr bool has_few(int) { return false; }

// Products of half floats are rounded as well. An integer is then off by half a step, 2^-5 for a product below 2^7, and
// where subnormal halves count as zeros by one of these.
constexpr float kMostStepsOfHalves = 4096.0f;
inline float lost_of_halves(float steps) { return kHalfStep + 0x1p-5f + 0x1p-14f * steps; }
template <class Row>
constexpr bool kMultipliesHalves = false;
template <>
constexpr bool kMultipliesHalves<F16> = ScreenInt::multiplies_halves;

// On the side of a tile asks for tokens that are rounded afterwards: done at once, that would wait for them.
class Ahead {
 public:
  static constexpr int kTokensOfStep = 1;

  Ahead(const char* row, int64_t stride, int64_t tokens, int bytes)
      : row_(row), stride_(stride), left_(tokens), bytes_(bytes) {}

  [[gnu::always_inline]] Ahead& begin() { return *this; }
  [[gnu::always_inline]] void end(const Ahead&) {}
  [[gnu::always_inline]] void step() {
    if (left_ <= 0) return;
    --left_;
    for (int byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(row_ + byte, 0, 2);
    row_ += stride_;
  }
  void finish() {}

 private:
  const char* row_;
  const int64_t stride_;
  int64_t left_;
  const int bytes_;
};

// Rounds tokens of a document, at once or on the side of a tile. `exact`: measures what rounding lost, which else is
// bounded by half a step a dimension. That takes twice as long, and pays off when many panels of queries meet the
// tokens.
template <class Element, class Dim, bool exact>
class Narrower {
 public:
  static constexpr int kTokensOfStep = 1;

  // `prefetch`: asks for the tokens behind those that it rounds.
  Narrower(const ScoreJob& job, Widener<DotF32, Element>& widener, Dim dim, float largest, bool prefetch)
      : tokens_(job.document),
        dim_(dim),
        stride_(widened_stride<DotScreen>(dim)),
        prefetch_end_(prefetch ? end_of_rows<Element>(job.document, dim) - kPrefetchBytes : 0),
        widener_(widener),
        rolls_(widener.feedable() && !job.document.kept),
        halves_(kHalves && kGuessedSteps / largest <= kMostStepsOfHalves),
        steps_(halves_ ? widen(half_of(kGuessedSteps / largest)) : kGuessedSteps / largest) {}

  // Tokens [begin, end) are next, and go to `out`. A tile narrows rows that lie side by side; others are done at once.
  void set(int64_t begin, int64_t end, uint32_t* out) {
    next_ = begin;
    end_ = end;
    out_ = out;
    if (!rolls_) finish();
  }

  // Over tokens the largest sum in every lane: together they bound the norm of any token. The more values a lane sums,
  // the tighter, and the dearer: few dimensions make do with `extents`, which tell whether values were cut off.
  struct Extents : SeenNan {
    Simd::I extents;
  };
  struct Squares : Extents {
    Simd::I squares;  // of ScreenInt::tokens_of_sum tokens
  };
  struct Sums : Extents {
    Simd::F norms, rests;  // four lanes a token
  };
  static constexpr bool kSquares = !exact && !has_few(Dim());
  using Seen = typename Choose<exact>::template Type<Sums, typename Choose<kSquares>::template Type<Squares, Extents>>;

  // Of one token: sums of four neighbours in each of its registers, and squares of what rounding lost.
  struct Told {
    Simd::I squares;
    Simd::F lost;
  };

  // What a tile copies, so that the compiler can keep it in registers.
  class Cursor {
   public:
    [[gnu::always_inline]] explicit Cursor(const Narrower& of)
        : dim_(of.dim_),
          scale_(Simd::broadcast(of.steps_)),
          halves_(of.halves_),
          row_(of.tokens_.data + of.next_ * of.tokens_.token_stride),
          row_stride_(of.tokens_.token_stride),
          prefetch_end_(of.prefetch_end_),
          left_(of.end_ - of.next_),
          out_(of.out_),
          seen_(of.seen_) {}

    [[gnu::always_inline]] void step() {
      if (left_ > 0) see(next(), seen_);
    }

   private:
    friend Narrower;

    [[gnu::always_inline]] Told next() {
      --left_;
      if (intptr_t(row_) < prefetch_end_) {
        for (int byte = 0; byte < dim_ * int(sizeof(Element)); byte += 64)
          __builtin_prefetch(row_ + kPrefetchBytes + byte);
      }
      const Told told = round(reinterpret_cast<const Element*>(row_), dim_, scale_, halves_, out_, seen_);
      row_ += row_stride_;
      out_ += widened_stride<DotScreen>(dim_);
      return told;
    }

    const Dim dim_;
    const Simd::F scale_;
    const bool halves_;
    const char* row_;
    const int64_t row_stride_;
    const intptr_t prefetch_end_;
    int64_t left_;
    uint32_t* out_;
    Seen seen_;
  };

  [[gnu::always_inline]] Cursor begin() const { return Cursor(*this); }
  [[gnu::always_inline]] void end(const Cursor& cursor) {
    next_ = end_ - cursor.left_;
    out_ = cursor.out_;
    seen_ = cursor.seen_;
  }

  void finish() {
    if (next_ >= end_) return;
    if (rolls_) {
      Cursor cursor = begin();
      if constexpr (kSquares) {
        while (cursor.left_ >= ScreenInt::tokens_of_sum) {
          Simd::I squares[ScreenInt::tokens_of_sum];
          for (Simd::I& of_token : squares) of_token = cursor.next().squares;
          cursor.seen_.squares = Simd::maximum(cursor.seen_.squares, ScreenInt::sum_squares(squares));
        }
      }
      while (cursor.left_ > 0) cursor.step();
      end(cursor);
      return;
    }
    const Simd::F scale = Simd::broadcast(steps_);
    widener_.for_each_row(next_, end_, [&](const auto* row) {
      see(round(row, dim_, scale, halves_, out_, seen_), seen_);
      out_ += stride_;
    });
    next_ = end_;
  }

  Narrowed result() const {
    Narrowed result;
    result.largest = __builtin_sqrtf(float(ScreenInt::largest_square(seen_.extents)));
    if (seen_.any_nan()) result.largest = __builtin_nanf("");
    result.steps = steps_;
    const float root = __builtin_sqrtf(float(dim_));
    result.measured = exact;
    result.lost = halves_ ? lost_of_halves(steps_) : kHalfStep;
    if constexpr (exact) {
      result.norm = Simd::sum(seen_.norms);
    } else if constexpr (kSquares) {
      result.norm = ScreenInt::largest_sum(seen_.squares);
    } else {
      result.norm = ScreenInt::sum_of_extents(seen_.extents);
    }
    result.norm = 1.0001f * __builtin_sqrtf(result.norm);
    if constexpr (exact) {
      result.rest = 1.0001f * __builtin_sqrtf(Simd::sum(seen_.rests)) + 1e-3f * root;
    } else {
      result.rest = result.lost * root;
    }
    return result;
  }

 private:
  static constexpr int64_t kPrefetchBytes = 8192;
  static constexpr bool kHalves = !exact && kMultipliesHalves<Element>;

  static F16 half_of(float x) {
    F16 half;
    narrow(x, &half);
    return half;
  }

  // The first four registers of `left` values as bytes.
  template <class Row>
  [[gnu::always_inline]] static Simd::I round_registers(const Row* row, int left, Simd::F scale, Simd::F& lost,
                                                        Seen& seen) {
    constexpr int w = Simd::width;
    Simd::I x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = Simd::zero_integer();
      if (left <= i * w) continue;
      const Simd::F value = left >= (i + 1) * w ? Simd::load(row + i * w) : Simd::load_first(row + i * w, left - i * w);
      const Simd::F scaled = Simd::multiply(value, scale);
      x[i] = Simd::to_integer(scaled);
      seen.see(scaled);
      if constexpr (exact) {
        const Simd::F rest = Simd::rest(scaled);
        lost = Simd::multiply_add(rest, rest, lost);
      }
    }
    return left <= 2 * w ? ScreenInt::to_bytes(x[0], x[1]) : ScreenInt::to_bytes(x[0], x[1], x[2], x[3]);
  }

  template <class Row>
  [[gnu::always_inline]] static Told round(const Row* row, Dim dim, Simd::F scale, [[maybe_unused]] bool halves,
                                           uint32_t* out, Seen& seen) {
    constexpr int w = Simd::width;
    Simd::I squares = Simd::zero_integer();
    Simd::F lost = Simd::zero();
    for (int left = dim; left > 0; left -= 4 * w, row += 4 * w, out += w) {
      Simd::I bytes;
      if constexpr (!exact && kMultipliesHalves<Row>) {
        bytes = halves ? round_halves(row, left, scale, seen) : round_registers(row, left, scale, lost, seen);
      } else {
        bytes = round_registers(row, left, scale, lost, seen);
      }
      const Simd::I extents = ScreenInt::extents(bytes);
      seen.extents = ScreenInt::maximum_extents(seen.extents, extents);
      if constexpr (exact || kSquares) squares = ScreenInt::add_squares(squares, extents);
      Simd::store(reinterpret_cast<int32_t*>(out), ScreenInt::add_bias(bytes));
    }
    return {squares, lost};
  }

  [[gnu::always_inline]] static void see(const Told& told, Seen& seen) {
    if constexpr (exact) {
      seen.norms = Simd::maximum(seen.norms, Simd::fold(Simd::to_float(told.squares)));
      seen.rests = Simd::maximum(seen.rests, Simd::fold(told.lost));
    } else if constexpr (kSquares) {
      const Simd::I squares[ScreenInt::tokens_of_sum] = {told.squares};  // and zeros
      seen.squares = Simd::maximum(seen.squares, ScreenInt::sum_squares(squares));
    }
  }

  const Tokens& tokens_;
  const Dim dim_;
  const int64_t stride_;
  const intptr_t prefetch_end_;  // of the addresses of rows that prefetch
  Widener<DotF32, Element>& widener_;
  const bool rolls_;
  const bool halves_;  // multiplied as such
  const float steps_;
  int64_t next_ = 0, end_ = 0;
  uint32_t* out_ = nullptr;
  Seen seen_{};
};

}  // namespace
#endif
