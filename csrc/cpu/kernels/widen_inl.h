// Document tokens on their way into the scratch that tiles read: widened to fp32, or rounded to int16 fixed point.
//
// What has been seen of the values is kept, so that a document is scored in one pass and checked afterwards.
#pragma once

namespace {

// k-words from one widened token to the next.
template <class Dot>
inline int64_t widened_stride(int dim) {
  return Dot::fixed_point ? round_up(dim, 2 * Simd::width) / 2 : round_up(dim, Simd::width);
}

template <class Dot>
struct Seen;

template <>
struct Seen<DotF32> {
  Simd::I largest = Simd::zero_integer();  // |x| as bits

  // True when neither NaN nor an infinity that could become one can arise in any order of summation.
  bool sound(const QueryGroup& group, int dim) const {
    const float peak = bits_to_float(Simd::largest_unsigned(largest));
    return peak * group.peak * float(dim) < 1e38f && group.peak < 1e38f && peak < 1e38f;
  }
};

template <class Element>
[[gnu::always_inline]] inline void store_widened(const Element* row, int dim, uint32_t* out, Seen<DotF32>& seen) {
  Simd::I largest = seen.largest;  // a local: `out` might alias the caller's
  for_each_register(row, dim, [&](int k, Simd::F x) {
    largest = Simd::maximum_unsigned(largest, Simd::absolute_bits(x));
    Simd::store(reinterpret_cast<float*>(out) + k, x);
  });
  seen.largest = largest;
}

#ifndef EDGECOLBERT_NO_FIXED_POINT
template <>
struct Seen<DotI16> {
  uint32_t square_norm = 0;  // the largest of a token, as bits: NaN is larger than any number
  Int16::Magnitudes largest = Int16::no_magnitudes();

  // True when no value saturated and no sum can overflow, see admits_fixed_point.
  bool sound(const QueryGroup&, int) const { return Int16::largest(largest) < 32767 && square_norm < float_to_bits(3.5f); }
};

template <class Element>
[[gnu::always_inline]] inline void store_widened(const Element* row, int dim, uint32_t* out, Seen<DotI16>& seen) {
  Simd::F squares = Simd::zero();
  Int16::Magnitudes largest = seen.largest;
  for_each_register(row, dim, [&](int k, Simd::F x) {
    squares = Simd::multiply_add(x, x, squares);
    Int16::store_rounded(reinterpret_cast<int16_t*>(out) + k, x, largest);
  });
  const uint32_t square_norm = float_to_bits(Simd::sum(squares));
  seen.square_norm = square_norm > seen.square_norm ? square_norm : seen.square_norm;
  seen.largest = largest;
}
#endif

// Tokens that a tile widens between its own k-steps, for the tile after it.
template <class Dot, class Element>
struct Feed {
  const Tokens* tokens;
  int dim;
  int64_t next, end;  // kept tokens still to widen
  uint32_t* out;
  Seen<Dot>* seen;

  // One token whose dimensions lie side by side.
  [[gnu::always_inline]] void step() {
    if (next >= end) return;
    const int64_t number = tokens->kept ? tokens->kept[next] : next;
    const char* const row = tokens->data + number * tokens->token_stride;
    for (const char* ahead = row + kPrefetchBytes; ahead < row + kPrefetchBytes + dim * int(sizeof(Element)); ahead += 64) {
      if (ahead < tokens->prefetch_end) __builtin_prefetch(ahead);
    }
    store_widened(reinterpret_cast<const Element*>(row), dim, out, *seen);
    out += widened_stride<Dot>(dim);
    ++next;
  }

  static constexpr int kPrefetchBytes = 4096;
};

// For tiles that widen nothing.
struct NoFeed {
  void step() {}
};

}  // namespace
