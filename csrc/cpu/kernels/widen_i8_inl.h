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
      : row_(tokens.data + begin * tokens.token_stride),
        row_stride_(tokens.token_stride),
        left_(end - begin),
        dim_(dim),
        prefetch_end_(end_of_rows<I8>(tokens, dim) - kPrefetchBytes),
        whole_end_(end_of_memory(tokens, dim) - round_up(dim, kRegisterBytes)),
        out_(out),
        out_stride_(widened_stride<DotI8>(dim)) {
    if (!tokens.kept) return;
    for (int64_t i = begin; i < end; ++i) {
      row_ = tokens.data + tokens.kept[i] * tokens.token_stride;
      copy<false>();
    }
  }

  // What a tile steps through: a copy, which can live in registers.
  [[gnu::always_inline]] Feed begin() const { return *this; }
  [[gnu::always_inline]] void end(const Feed& cursor) {
    row_ = cursor.row_;
    left_ = cursor.left_;
    out_ = cursor.out_;
  }

  [[gnu::always_inline]] void step() {
    const int64_t tokens = left_ < kTokensOfStep ? left_ : kTokensOfStep;
    if (tokens == 0) return;
    const bool whole = intptr_t(row_ + (tokens - 1) * row_stride_) <= whole_end_;
    if (whole && dim_ <= kRegisterBytes) {
      for (int64_t i = 0; i < tokens; ++i) copy_register();
    } else if (whole) {
      for (int64_t i = 0; i < tokens; ++i) copy<true>();
    } else {
      for (int64_t i = 0; i < tokens; ++i) copy<false>();
    }
  }

  void finish() {
    while (left_ > 0) step();
  }

 private:
  static constexpr int64_t kPrefetchBytes = 8192;

  // Addresses from a token's to this one can be read.
  static intptr_t end_of_memory(const Tokens& tokens, int dim) {
    const intptr_t end = intptr_t(tokens.data + (tokens.length - 1) * tokens.token_stride + dim);
    return end > intptr_t(tokens.memory_end) ? end : intptr_t(tokens.memory_end);
  }

  // `whole`: registers may be read behind the row's end. What is there meets zeros of the query.
  template <bool whole>
  [[gnu::always_inline]] void copy() {
    prefetch(dim_);
    const I8* const row = reinterpret_cast<const I8*>(row_);
    if constexpr (whole) {
      for (int byte = 0; byte < dim_; byte += kRegisterBytes)
        Simd::store(reinterpret_cast<int32_t*>(out_ + byte / DotI8::dims_of_word), Int8::to_words(row + byte));
    } else {
      Seen<DotI8, I8> nothing;
      store_widened(row, dim_, out_, nothing);
    }
    next();
  }

  // The models' own dimensions: a row is one register and often less than one cache line.
  [[gnu::always_inline]] void copy_register() {
    prefetch(1);
    Simd::store(reinterpret_cast<int32_t*>(out_), Int8::to_words(reinterpret_cast<const I8*>(row_)));
    next();
  }

  [[gnu::always_inline]] void prefetch(int bytes) const {
    const char* const ahead = intptr_t(row_) < prefetch_end_ ? row_ + kPrefetchBytes : row_;
    for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
  }

  [[gnu::always_inline]] void next() {
    row_ += row_stride_;
    out_ += out_stride_;
    --left_;
  }

  const char* row_;
  int64_t row_stride_;
  int64_t left_;
  int dim_;
  intptr_t prefetch_end_;  // of the addresses of rows that prefetch
  intptr_t whole_end_;     // the last address of a row of which whole registers may be read
  uint32_t* out_;
  int64_t out_stride_;
};

}  // namespace
#endif
