// int8 on AVX-512: vpdpbusd with VNNI (one instruction for 64 multiply-adds), else int16 and vpmaddwd + vpaddd (two for
// 32). vpmaddubsw would saturate its sums of two products.
#pragma once

namespace {

struct Int8 {
#ifdef __AVX512VNNI__
  static constexpr int dims_of_word = 4;
  static constexpr int32_t document_bias = 128;
  static void multiply_add(__m512i& sum, __m512i query, __m512i document) {
    // gcc 12 copies and spills accumulators around the intrinsic.
    __asm__("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(query), "v"(document));
  }
  // dims_of_word * width bytes of a document token become k-words.
  static __m512i to_words(const I8* p) { return add_bias(_mm512_loadu_si512(p)); }
  // 1 to 64 bytes; memory past them is not touched.
  static __m512i to_words_first(const I8* p, int n) { return add_bias(_mm512_maskz_loadu_epi8(first(n), p)); }
  static __m512i add_bias(__m512i x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }

 private:
  static __mmask64 first(int n) { return ~__mmask64(0) >> (64 - n); }
#else
  static constexpr int dims_of_word = 2;
  static constexpr int32_t document_bias = 0;
  static void multiply_add(__m512i& sum, __m512i query, __m512i document) {
    // Left to itself gcc does all products of a k-step first, and runs out of registers.
    __m512i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(product) : "v"(query), "v"(document));
  }
  static __m512i to_words(const I8* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // 1 to 32 bytes; memory past them is not touched.
  static __m512i to_words_first(const I8* p, int n) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(~__mmask32(0) >> (32 - n), p));
  }
#endif
};

}  // namespace

#include "i8.h"
