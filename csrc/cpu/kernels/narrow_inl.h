// Document tokens rounded to int8 for the screen.
//
// A block of them has one scale, which is guessed from the documents before: a document is then read once. Integers
// that were cut off show in the largest of them, and the block is done again with a better guess.
#pragma once

#include "margin_inl.h"
#include "score_inl.h"

#ifdef EDGECOLBERT_SCREENS
namespace {

// A value of the guessed size becomes so many steps; more than kMostSteps could be cut off.
constexpr float kGuessedSteps = 120.0f;
constexpr float kMostSteps = 126.9f, kFewestSteps = 16.0f;

// What is known of a block's integers v, which stand for v / steps.
struct Narrowed {
  float largest;     // of |v_k|, and not much more: |(v_k, v_k+1)| of neighbours
  float norm, rest;  // no token has a larger |v|, nor |steps d - v|
  bool measured;     // rest was: else it is half a step a dimension
  float steps;

  // None was cut off, and they are not too coarse.
  bool fits() const { return largest >= kFewestSteps && largest <= kMostSteps; }
  // A bound of |x|, and not much more, unless values were cut off.
  float largest_value() const { return (largest + 0.5f) / steps; }
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

// One register of bytes: `pairs` of several would not add up.
constexpr bool has_few(Constant<48>) { return 4 * Simd::width >= 48; }
constexpr bool has_few(int) { return false; }

// Rounds tokens of a document, at once or on the side of a tile. `exact`: measures what rounding lost, which else is
// bounded by half a step a dimension. That takes twice as long, and pays off when many panels of queries meet the
// tokens.
template <class Element, class Dim, bool exact>
class Narrower {
 public:
  static constexpr int kTokensOfStep = 1;

  Narrower(const ScoreJob& job, Widener<DotF32, Element>& widener, Dim dim, float largest)
      : tokens_(job.document),
        dim_(dim),
        stride_(widened_stride<DotI8>(dim)),
        prefetch_end_(intptr_t(job.document.memory_end) - kPrefetchBytes - int64_t(dim) * int64_t(sizeof(Element))),
        widener_(widener),
        rolls_(widener.feedable() && !job.document.kept),
        steps_(kGuessedSteps / largest) {}

  // Tokens [begin, end) are next, and go to `out`. A tile narrows rows that lie side by side; others are done at once.
  void set(int64_t begin, int64_t end, uint32_t* out) {
    next_ = begin;
    end_ = end;
    out_ = out;
    if (!rolls_) finish();
  }

  // Over tokens the largest sum in every lane: together they bound the norm of any token. The more values a lane sums,
  // the tighter, and the dearer: few dimensions make do with `pairs`, which tell whether values were cut off.
  struct Pairs {
    Simd::I pairs;  // squares of neighbours, 16 bits each
  };
  struct Squares : Pairs {
    Simd::I squares;  // of four neighbours in each register of a token
  };
  struct Sums : Pairs {
    Simd::F norms, rests;  // four lanes a token
  };
  static constexpr bool kSquares = !exact && !has_few(Dim());
  using Seen = typename Choose<exact>::template Type<Sums, typename Choose<kSquares>::template Type<Squares, Pairs>>;

  // What a tile copies, so that the compiler can keep it in registers.
  class Cursor {
   public:
    [[gnu::always_inline]] explicit Cursor(const Narrower& of)
        : dim_(of.dim_),
          scale_(Simd::broadcast(of.steps_)),
          row_(of.tokens_.data + of.next_ * of.tokens_.token_stride),
          row_stride_(of.tokens_.token_stride),
          prefetch_end_(of.prefetch_end_),
          left_(of.end_ - of.next_),
          out_(of.out_),
          seen_(of.seen_) {}

    [[gnu::always_inline]] void step() {
      if (left_ == 0) return;
      --left_;
      const char* const ahead = intptr_t(row_) < prefetch_end_ ? row_ + kPrefetchBytes : row_;
      for (int byte = 0; byte < dim_ * int(sizeof(Element)); byte += 64) __builtin_prefetch(ahead + byte);
      round(reinterpret_cast<const Element*>(row_), dim_, scale_, out_, seen_);
      row_ += row_stride_;
      out_ += widened_stride<DotI8>(dim_);
    }

   private:
    friend Narrower;
    const Dim dim_;
    const Simd::F scale_;
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
      while (cursor.left_ > 0) cursor.step();
      end(cursor);
      return;
    }
    const Simd::F scale = Simd::broadcast(steps_);
    widener_.for_each_row(next_, end_, [&](const auto* row) {
      round(row, dim_, scale, out_, seen_);
      out_ += stride_;
    });
    next_ = end_;
  }

  Narrowed result() const {
    Narrowed result;
    result.largest = __builtin_sqrtf(float(Int8::largest_pair(seen_.pairs)));
    result.steps = steps_;
    const float root = __builtin_sqrtf(float(dim_));
    result.measured = exact;
    if constexpr (exact) {
      result.norm = Simd::sum(seen_.norms);
    } else if constexpr (kSquares) {
      result.norm = Simd::sum(Simd::to_float(seen_.squares));
    } else {
      result.norm = Int8::sum_of_pairs(seen_.pairs);
    }
    result.norm = 1.0001f * __builtin_sqrtf(result.norm);
    if constexpr (exact) {
      result.rest = 1.0001f * __builtin_sqrtf(Simd::sum(seen_.rests)) + 1e-3f * root;
    } else {
      result.rest = kHalfStep * root;
    }
    return result;
  }

 private:
  static constexpr int64_t kPrefetchBytes = 8192;

  template <class Row>
  [[gnu::always_inline]] static void round(const Row* row, Dim dim, Simd::F scale, uint32_t* out, Seen& seen) {
    constexpr int w = Simd::width;
    Simd::I squares = Simd::zero_integer();
    Simd::F lost = Simd::zero();
    for (int left = dim; left > 0; left -= 4 * w, row += 4 * w, out += w) {
      Simd::I x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        x[i] = Simd::zero_integer();
        if (left <= i * w) continue;
        const Simd::F value =
            left >= (i + 1) * w ? Simd::load(row + i * w) : Simd::load_first(row + i * w, left - i * w);
        const Simd::F scaled = Simd::multiply(value, scale);
        x[i] = Simd::to_integer(scaled);
        if constexpr (exact) {
          const Simd::F rest = Simd::rest(scaled);
          lost = Simd::multiply_add(rest, rest, lost);
        }
      }
      const Simd::I bytes = left <= 2 * w ? Int8::to_bytes(x[0], x[1]) : Int8::to_bytes(x[0], x[1], x[2], x[3]);
      const Simd::I pairs = Int8::pair_squares(bytes);
      seen.pairs = Int8::maximum_pairs(seen.pairs, pairs);
      if constexpr (exact || kSquares) squares = Int8::add_pairs(squares, pairs);
      Simd::store(reinterpret_cast<int32_t*>(out), Int8::add_bias(bytes));
    }
    if constexpr (exact) {
      seen.norms = Simd::maximum(seen.norms, Simd::fold(Simd::to_float(squares)));
      seen.rests = Simd::maximum(seen.rests, Simd::fold(lost));
    } else if constexpr (kSquares) {
      seen.squares = Simd::maximum(seen.squares, squares);
    }
  }

  const Tokens& tokens_;
  const Dim dim_;
  const int64_t stride_;
  const intptr_t prefetch_end_;  // of the addresses of rows that prefetch
  Widener<DotF32, Element>& widener_;
  const bool rolls_;
  const float steps_;
  int64_t next_ = 0, end_ = 0;
  uint32_t* out_ = nullptr;
  Seen seen_{};
};

}  // namespace
#endif
