// int16 on AVX2: vpdpwssd with AVX-VNNI (one instruction for 16 multiply-adds), else vpmaddwd + vpaddd.
#pragma once

#include "fixed_point.h"

namespace {

struct Int16 {
  static void multiply_add(__m256i& sum, __m256i query, __m256i document) {
#ifdef __AVXVNNI__
    // gcc 12 copies and spills accumulators around the intrinsic.
    __asm__(EDGECOLBERT_VEX "vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(query), "x"(document));
#else
    // Left to itself gcc does all products of a k-step first, and runs out of registers.
    __m256i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(query), "x"(document));
#endif
  }

  // Word j = (low[j], high[j]) in fixed point.
  static __m256i round_pair(__m256 low, __m256 high) {
    const __m256i a = _mm256_castps_si256(_mm256_add_ps(low, _mm256_set1_ps(kRounder)));
    const __m256i b = _mm256_castps_si256(_mm256_add_ps(high, _mm256_set1_ps(kRounder)));
    return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
  }
  template <class Element>
  static __m256i load_pair(const Element* p) {
    return round_pair(Simd::load(p), Simd::load(p + Simd::width));
  }
  // Word j = (x[2j], x[2j + 1]) in the lower half, zeros above.
  static __m256i round_single(__m256 x) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(_mm256_add_ps(x, _mm256_set1_ps(kRounder))), 16);
    const __m256i wide = _mm256_srai_epi32(shifted, 16);
    return _mm256_zextsi128_si256(_mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
  }
  static void store_lower(uint32_t* out, __m256i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(x));
  }

  // Squares of 2^15-scaled values in steps of 2^-22.
  static void add_squares(__m256i& sum, __m256i x) {
    sum = _mm256_add_epi32(sum, _mm256_srli_epi32(_mm256_madd_epi16(x, x), 8));
  }
  static __m128i fold_squares(__m256i sum) {
    return _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  }

  // Magnitudes of 16 fp16 or bf16 values, as bits.
  static __m256i load_magnitudes(const void* p) {
    return _mm256_and_si256(_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_set1_epi32(0x7fff7fff));
  }
  static __m256i maximum_magnitudes(__m256i a, __m256i b) { return _mm256_max_epu16(a, b); }
  static uint32_t largest_magnitude(__m256i x) {
    return Simd::largest_unsigned(
        _mm256_max_epu32(_mm256_srli_epi32(x, 16), _mm256_and_si256(x, _mm256_set1_epi32(0xffff))));
  }
};

}  // namespace

#include "i16.h"
