// int16 on AVX2: vpdpwssd with AVX-VNNI (one instruction for 16 multiply-adds), else vpmaddwd + vpaddd.
#pragma once

namespace {

struct Int16 {
  static void multiply_add(__m256i& sum, __m256i query, __m256i document) {
#ifdef __AVXVNNI__
    // gcc 12 copies and spills accumulators around the intrinsic.
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(query), "x"(document));
#else
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(query, document));
#endif
  }

  using Magnitudes = __m128i;
  static Magnitudes no_magnitudes() { return _mm_setzero_si128(); }

  static void store_rounded(int16_t* out, __m256 x, Magnitudes& largest) {
    const __m256 magic = _mm256_set1_ps(384.0f);
    const __m256i integer = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(x, magic)), _mm256_castps_si256(magic));
    const __m128i rounded = _mm_packs_epi32(_mm256_castsi256_si128(integer), _mm256_extracti128_si256(integer, 1));
    largest = _mm_max_epu16(largest, _mm_abs_epi16(rounded));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), rounded);
  }

  static uint32_t largest(Magnitudes x) { return Simd::largest_unsigned(_mm256_cvtepu16_epi32(x)); }
};

}  // namespace

#include "i16.h"
