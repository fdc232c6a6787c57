// Document tokens rounded to int8 for the screen.
//
// A block of them has one scale, which is guessed from the documents before: a document is then read once. Integers
// that were cut off show in the largest of them, and the block is done again with a better guess.
#pragma once

#include "score_inl.h"

#ifdef EDGECOLBERT_SCREENS
namespace {

// A value of the guessed size becomes so many steps; more than kMostSteps could be cut off.
constexpr float kGuessedSteps = 120.0f;
constexpr uint32_t kMostSteps = 126, kFewestSteps = 16;

// What is known of a block's integers v, which stand for v / steps.
struct Narrowed {
  uint32_t largest;  // |v_k|
  float norm, rest;  // no token has a larger |v|, nor |steps d - v|
  float steps;

  // None was cut off, and they are not too coarse.
  bool fits() const { return largest >= kFewestSteps && largest <= kMostSteps; }
  // A bound of |x| when the integers fit, else a guess.
  float largest_value() const {
    const float value = (float(largest) + 0.5f) / steps;
    return largest <= kMostSteps ? value : 64.0f * value;
  }
};

// Rounds tokens of a document, at once or on the side of a tile. `exact`: measures what rounding lost, which else is
// bounded by half a step a dimension. That takes half as long again, and pays off when several panels of queries meet
// the tokens.
template <class Element, class Dim, bool exact>
class Narrower {
 public:
  static constexpr bool kIdle = false;

  Narrower(const ScoreJob& job, Widener<DotF32, Element>& widener, Dim dim, float largest)
      : tokens_(job.document),
        dim_(dim),
        stride_(widened_stride<DotI8>(dim)),
        prefetch_end_(intptr_t(job.document.prefetch_end) - kPrefetchBytes - int64_t(dim) * int64_t(sizeof(Element))),
        widener_(widener),
        steps_(kGuessedSteps / largest) {}

  // Tokens [begin, end) are next, and go to `out`.
  void set(int64_t begin, int64_t end, uint32_t* out) {
    next_ = begin;
    end_ = end;
    out_ = out;
    if (!widener_.feedable()) finish();
  }

  // Over tokens the largest magnitude in every byte, and the largest sum in every lane.
  struct Seen {
    Simd::I magnitudes = Simd::zero_integer(), squares = Simd::zero_integer();
    Simd::F norms = Simd::zero(), rests = Simd::zero();  // when exact, instead of squares
  };

  class Cursor {
   public:
    explicit Cursor(Narrower& of)
        : of_(of),
          tokens_(of.tokens_),
          scale_(Simd::broadcast(of.steps_)),
          prefetch_end_(of.prefetch_end_),
          next_(of.next_),
          end_(of.end_),
          row_(of.tokens_.data + of.next_ * of.tokens_.token_stride),
          out_(of.out_),
          seen_(of.seen_) {}

    [[gnu::always_inline]] void step() {
      if (next_ >= end_) return;
      if (tokens_.kept) row_ = tokens_.data + tokens_.kept[next_] * tokens_.token_stride;
      if (intptr_t(row_) < prefetch_end_) {
        for (int ahead = 0; ahead < of_.dim_ * int(sizeof(Element)); ahead += 64)
          __builtin_prefetch(row_ + kPrefetchBytes + ahead, 0, 2);
      }
      round(reinterpret_cast<const Element*>(row_), of_.dim_, scale_, out_, seen_);
      row_ += tokens_.token_stride;
      out_ += of_.stride_;
      ++next_;
    }

    [[gnu::always_inline]] void finish() {
      while (next_ < end_) step();
    }

   private:
    friend Narrower;
    const Narrower& of_;
    const Tokens& tokens_;
    const Simd::F scale_;
    const intptr_t prefetch_end_;
    int64_t next_;
    const int64_t end_;
    const char* row_;
    uint32_t* out_;
    Seen seen_;
  };

  [[gnu::always_inline]] Cursor begin() { return Cursor(*this); }
  [[gnu::always_inline]] void end(const Cursor& cursor) {
    next_ = cursor.next_;
    out_ = cursor.out_;
    seen_ = cursor.seen_;
  }

  void finish() {
    if (next_ >= end_) return;
    if (widener_.feedable()) {
      Cursor cursor = begin();
      cursor.finish();
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
    result.largest = Int8::largest_byte(seen_.magnitudes);
    result.steps = steps_;
    const float root = __builtin_sqrtf(float(dim_));
    if constexpr (exact) {
      result.norm = 1.0001f * __builtin_sqrtf(Simd::sum(seen_.norms));
      result.rest = 1.0001f * __builtin_sqrtf(Simd::sum(seen_.rests)) + 1e-3f * root;
    } else {
      result.norm = 1.0001f * __builtin_sqrtf(Simd::sum(Simd::to_float(seen_.squares)));
      result.rest = 0.501f * root;
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
      const Simd::I bytes = Int8::to_bytes(x[0], x[1], x[2], x[3]), magnitudes = Int8::magnitudes(bytes);
      seen.magnitudes = Int8::maximum_bytes(seen.magnitudes, magnitudes);
      Int8::add_squares(squares, magnitudes);
      Simd::store(reinterpret_cast<int32_t*>(out), Int8::add_bias(bytes));
    }
    if constexpr (exact) {
      seen.norms = Simd::maximum(seen.norms, Simd::fold(Simd::to_float(squares)));
      seen.rests = Simd::maximum(seen.rests, Simd::fold(lost));
    } else {
      seen.squares = Simd::maximum(seen.squares, squares);
    }
  }

  const Tokens& tokens_;
  const Dim dim_;
  const int64_t stride_;
  const intptr_t prefetch_end_;  // of the addresses of rows that prefetch
  Widener<DotF32, Element>& widener_;
  const float steps_;
  int64_t next_ = 0, end_ = 0;
  uint32_t* out_ = nullptr;
  Seen seen_;
};

}  // namespace
#endif
