// int8 document tokens on their way into the scratch for integer dot products: copied, or widened to int16 where that
// is what the instruction takes.
#pragma once

#include "widen_inl.h"

#ifndef EDGECOLBERT_NO_INT8
namespace {

// Nothing to look out for: no sum of kInt8Dimensions products overflows.
template <>
struct Seen<DotI8, I8> {
  bool sound(const QueryGroup&, int) const { return true; }
};

// Dimensions that become a register of k-words.
constexpr int kRegisterBytes = DotI8::dims_of_word * Simd::width;

// What stands behind the last dimension meets zeros of the query.
[[gnu::always_inline]] inline void store_widened(const I8* row, int dim, uint32_t* out, Seen<DotI8, I8>&) {
  int left = dim;
  for (; left >= kRegisterBytes; left -= kRegisterBytes) {
    Simd::store(reinterpret_cast<int32_t*>(out), Int8::to_words(row));
    row += kRegisterBytes;
    out += Simd::width;
  }
  if (left > 0) Simd::store(reinterpret_cast<int32_t*>(out), Int8::to_words_first(row, left));
}

// A tile has so few k-steps that one visit for each of its tokens would cost more instructions than the tile: a visit
// copies several.
template <>
class Feed<DotI8, I8> {
 public:
  static constexpr int kTokensOfStep = 4;

  // Kept tokens [begin, end), whose dimensions lie side by side.
  Feed(const Tokens& tokens, int dim, int64_t begin, int64_t end, uint32_t* out, Seen<DotI8, I8>*)
      : tokens_(tokens),
        dim_(dim),
        next_(begin),
        end_(end),
        prefetch_end_(intptr_t(tokens.prefetch_end) - kPrefetchBytes - dim),
        out_(out),
        stride_(widened_stride<DotI8>(dim)) {}

  [[gnu::always_inline]] void step() { copy(end_ - next_ < kTokensOfStep ? end_ : next_ + kTokensOfStep); }

  void finish() { copy(end_); }

 private:
  static constexpr int64_t kPrefetchBytes = 8192;

  [[gnu::always_inline]] void copy(int64_t end) {
    if (dim_ <= kRegisterBytes && !tokens_.kept) {
      copy_short(end);
      return;
    }
    Seen<DotI8, I8> nothing;
    uint32_t* out = out_;
    for (int64_t i = next_; i < end; ++i, out += stride_) {
      const char* const row = tokens_.data + (tokens_.kept ? tokens_.kept[i] : i) * tokens_.token_stride;
      if (intptr_t(row) < prefetch_end_) {
        for (int ahead = 0; ahead < dim_; ahead += 64) __builtin_prefetch(row + kPrefetchBytes + ahead);
      }
      store_widened(reinterpret_cast<const I8*>(row), dim_, out, nothing);
    }
    next_ = end;
    out_ = out;
  }

  // The models' own dimensions: a row is one register and often less than one cache line.
  [[gnu::always_inline]] void copy_short(int64_t end) {
    uint32_t* out = out_;
    const char* row = tokens_.data + next_ * tokens_.token_stride;
    for (int64_t i = next_; i < end; ++i) {
      if (intptr_t(row) < prefetch_end_) __builtin_prefetch(row + kPrefetchBytes);
      Simd::store(reinterpret_cast<int32_t*>(out), Int8::to_words_first(reinterpret_cast<const I8*>(row), dim_));
      row += tokens_.token_stride;
      out += Simd::width;
    }
    next_ = end;
    out_ = out;
  }

  const Tokens tokens_;
  const int dim_;
  int64_t next_;
  const int64_t end_;
  const intptr_t prefetch_end_;  // of the addresses of rows that prefetch
  uint32_t* out_;
  const int64_t stride_;
};

}  // namespace
#endif
