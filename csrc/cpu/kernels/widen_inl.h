// Document tokens on their way into the scratch that tiles read: widened to fp32, or rounded to int16 fixed point.
//
// What has been seen of the values is kept, so that a document is scored in one pass and checked afterwards.
#pragma once

namespace {

// k-words from one widened token to the next.
template <class Dot>
inline int64_t widened_stride(int dim) {
  return round_up(dim, Dot::dims_of_word * Simd::width) / Dot::dims_of_word;
}

template <class Dot, class Element>
struct Seen;

template <class Element>
struct Seen<DotF32, Element> {
  Simd::I largest = Simd::zero_integer();  // |x| as bits

  // True when neither NaN nor an infinity that could become one can arise in any order of summation.
  bool sound(const QueryGroup& group, int dim) const {
    const float peak = bits_to_float(Simd::largest_unsigned(largest));
    return peak * group.peak * float(dim) < 1e38f && group.peak < 1e38f && peak < 1e38f;
  }
};

// `Row` is Element, or float where the row had to be normalised first. Registers of `seen` are copied to locals and
// back one by one: `out` might alias them, and a copy of the whole would be loaded in pieces that the processor cannot
// forward from its stores.
template <class Row, class Element>
[[gnu::always_inline]] inline void store_widened(const Row* row, int dim, uint32_t* out, Seen<DotF32, Element>& seen) {
  Simd::I largest = seen.largest;
  for_each_register(row, dim, [&](int k, Simd::F x) {
    largest = Simd::maximum_unsigned(largest, Simd::absolute_bits(x));
    Simd::store(reinterpret_cast<float*>(out) + k, x);
  });
  seen.largest = largest;
}

#ifndef EDGECOLBERT_NO_FIXED_POINT
// The first magnitude that is not below 1.
inline uint32_t bits_of_one(F16) { return 0x3c00; }
inline uint32_t bits_of_one(BF16) { return 0x3f80; }
inline uint32_t bits_of_one(float) { return 1; }  // never gathered: `largest` holds them

template <class Element>
struct Seen<DotI16, Element> {
  Simd::I largest = Simd::zero_integer();      // |x| as bits of an fp32
  Simd::I largest_raw = Simd::zero_integer();  // |x| as bits of a 16-bit Element
  __m128i squares = _mm_setzero_si128();  // in lane l the largest, over tokens, of the squares that fell into lane l

  // True when no value was too large and no sum can overflow: the lanes' sum bounds every squared norm.
  bool sound(const QueryGroup&, int) const {
    alignas(16) uint32_t lanes[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), squares);
    float square_norm = 0.0f;
    for (uint32_t lane : lanes) {
      if (lane >= (1u << 23) - 1) return false;
      square_norm += float(lane);
    }
    return square_norm < kSquareNormLimit && Simd::largest_unsigned(largest) <= float_to_bits(kLargestFixedPoint) &&
           Int16::largest_magnitude(largest_raw) < bits_of_one(Element{});
  }
};

template <class Row, class Element>
[[gnu::always_inline]] inline void store_widened(const Row* row, int dim, uint32_t* out, Seen<DotI16, Element>& seen) {
  Simd::I largest = seen.largest, largest_raw = seen.largest_raw, squares = Simd::zero_integer();
  int left = dim;
  for (; left >= 2 * Simd::width; left -= 2 * Simd::width) {
    if constexpr (sizeof(Row) == 2) {
      largest_raw = Int16::maximum_magnitudes(largest_raw, Int16::load_magnitudes(row));
    } else {
      const Simd::F low = Simd::load(row), high = Simd::load(row + Simd::width);
      largest =
          Simd::maximum_unsigned(largest, Simd::maximum_unsigned(Simd::absolute_bits(low), Simd::absolute_bits(high)));
    }
    const Simd::I words = Int16::load_pair(row);
    Int16::add_squares(squares, words);
    Simd::store(reinterpret_cast<int32_t*>(out), words);
    row += 2 * Simd::width;
    out += Simd::width;
  }
  for (; left > 0; left -= Simd::width) {
    const Simd::F x = left >= Simd::width ? Simd::load(row) : Simd::load_first(row, left);
    largest = Simd::maximum_unsigned(largest, Simd::absolute_bits(x));
    const Simd::I words = Int16::round_single(x);
    Int16::add_squares(squares, words);
    Int16::store_lower(out, words);
    row += Simd::width;
    out += Simd::width / 2;
  }
  seen.squares = _mm_max_epu32(seen.squares, Int16::fold_squares(squares));
  seen.largest = largest;
  seen.largest_raw = largest_raw;
}
#endif

// Address of the last row of `dim` elements in the documents' memory.
template <class Element>
inline intptr_t end_of_rows(const Tokens& tokens, int dim) {
  return intptr_t(tokens.memory_end) - int64_t(dim) * int64_t(sizeof(Element));
}

// Tokens that a tile widens between its own k-steps, for the tile after it.
template <class Dot, class Element>
class Feed {
 public:
  static constexpr int kTokensOfStep = 1;

  // Kept tokens [begin, end), whose dimensions lie side by side.
  Feed(const Tokens& tokens, int dim, int64_t begin, int64_t end, uint32_t* out, Seen<Dot, Element>* seen)
      : tokens_(tokens),
        dim_(dim),
        next_(begin),
        end_(end),
        row_(tokens.data + begin * tokens.token_stride),
        prefetch_end_(end_of_rows<Element>(tokens, dim) - kPrefetchBytes),
        out_(out),
        stride_(widened_stride<Dot>(dim)),
        seen_(seen) {}

  // What a tile steps through.
  [[gnu::always_inline]] Feed& begin() { return *this; }
  [[gnu::always_inline]] void end(const Feed&) {}

  [[gnu::always_inline]] void step() {
    if (next_ >= end_) return;
    if (tokens_.kept) row_ = tokens_.data + tokens_.kept[next_] * tokens_.token_stride;
    if (intptr_t(row_) < prefetch_end_) {
      for (int ahead = 0; ahead < dim_ * int(sizeof(Element)); ahead += 64)
        __builtin_prefetch(row_ + kPrefetchBytes + ahead);
    }
    store_widened(reinterpret_cast<const Element*>(row_), dim_, out_, *seen_);
    row_ += tokens_.token_stride;
    out_ += stride_;
    ++next_;
  }

  void finish() {
    while (next_ < end_) step();
  }

 private:
  static constexpr int64_t kPrefetchBytes = 4096;

  const Tokens& tokens_;
  const int dim_;
  int64_t next_;
  const int64_t end_;
  const char* row_;
  const intptr_t prefetch_end_;  // of the addresses of rows that prefetch
  uint32_t* out_;
  const int64_t stride_;
  Seen<Dot, Element>* const seen_;
};

}  // namespace
