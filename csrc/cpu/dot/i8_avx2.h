// int8 on AVX2: vpdpbusd with AVX-VNNI (one instruction for 32 multiply-adds), else int16 and vpmaddwd + vpaddd (two
// for 16). vpmaddubsw would saturate its sums of two products.
#pragma once

namespace {

struct Int8 {
#ifdef __AVXVNNI__
  static constexpr int dims_of_word = 4;
  static constexpr int32_t document_bias = 128;
  static void multiply_add(__m256i& sum, __m256i query, __m256i document) {
    // gcc 12 copies and spills accumulators around the intrinsic.
    __asm__(EDGECOLBERT_VEX "vpdpbusd %1, %2, %0" : "+x"(sum) : "x"(query), "x"(document));
  }
  // dims_of_word * width bytes of a document token become k-words.
  static __m256i to_words(const I8* p) { return add_bias(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static __m256i add_bias(__m256i x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
#else
  static constexpr int dims_of_word = 2;
  static constexpr int32_t document_bias = 0;
  static void multiply_add(__m256i& sum, __m256i query, __m256i document) {
    // Left to itself gcc does all products of a k-step first, and runs out of registers.
    __m256i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(query), "x"(document));
  }
  static __m256i to_words(const I8* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
#endif
  // 1 to dims_of_word * width bytes; memory past them is not touched.
  static __m256i to_words_first(const I8* p, int n) {
    if (n == dims_of_word * 8) return to_words(p);
    I8 copy[dims_of_word * 8] = {};
    const int whole = n & 16;  // in one piece, since 48 dimensions end like this
    if (whole) memcpy(copy, p, 16);
    if (n & 15) memcpy(copy + whole, p + whole, size_t(n & 15));
    return to_words(copy);
  }
};

}  // namespace

#include "i8.h"
