// int16 on AVX-512: vpdpwssd with VNNI (one instruction for 32 multiply-adds), else vpmaddwd + vpaddd.
#pragma once

namespace {

struct Int16 {
  static void multiply_add(__m512i& sum, __m512i query, __m512i document) {
#ifdef __AVX512VNNI__
    // gcc 12 copies and spills accumulators around the intrinsic.
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(query), "v"(document));
#else
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(query, document));
#endif
  }

  using Magnitudes = __m256i;
  static Magnitudes no_magnitudes() { return _mm256_setzero_si256(); }

  static void store_rounded(int16_t* out, __m512 x, Magnitudes& largest) {
    const __m512 magic = _mm512_set1_ps(384.0f);
    const __m512i integer = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(x, magic)), _mm512_castps_si512(magic));
    const __m256i rounded = _mm512_cvtsepi32_epi16(integer);
    largest = _mm256_max_epu16(largest, _mm256_abs_epi16(rounded));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded);
  }

  static uint32_t largest(Magnitudes x) { return _mm512_reduce_max_epu32(_mm512_cvtepu16_epi32(x)); }
};

}  // namespace

#include "i16.h"
