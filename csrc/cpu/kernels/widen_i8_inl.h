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

// What stands behind the last dimension meets zeros of the query.
[[gnu::always_inline]] inline void store_widened(const I8* row, int dim, uint32_t* out, Seen<DotI8, I8>&) {
  constexpr int bytes = DotI8::dims_of_word * Simd::width;
  int left = dim;
  for (; left >= bytes; left -= bytes) {
    Simd::store(reinterpret_cast<int32_t*>(out), Int8::to_words(row));
    row += bytes;
    out += Simd::width;
  }
  if (left > 0) Simd::store(reinterpret_cast<int32_t*>(out), Int8::to_words_first(row, left));
}

}  // namespace
#endif
