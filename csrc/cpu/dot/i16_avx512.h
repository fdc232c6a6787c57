// int16 on AVX-512: vpdpwssd with VNNI (one instruction for 32 multiply-adds), else vpmaddwd + vpaddd.
#pragma once

#include "fixed_point.h"

namespace {

struct Int16 {
  static void multiply_add(__m512i& sum, __m512i query, __m512i document) {
#ifdef __AVX512VNNI__
    // gcc 12 copies and spills accumulators around the intrinsic.
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(query), "v"(document));
#else
    // Left to itself gcc does all products of a k-step first, and runs out of registers.
    __m512i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(product) : "v"(query), "v"(document));
#endif
  }

  // Word j = (low[j], high[j]) in fixed point.
  static __m512i round_pair(__m512 low, __m512 high) {
    const __m512i a = _mm512_castps_si512(_mm512_add_ps(low, _mm512_set1_ps(kRounder)));
    const __m512i b = _mm512_castps_si512(_mm512_add_ps(high, _mm512_set1_ps(kRounder)));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, a, _mm512_slli_epi32(b, 16));
  }
  template <class Element>
  static __m512i load_pair(const Element* p) {
    return round_pair(Simd::load(p), Simd::load(p + Simd::width));
  }
#ifdef __AVX512FP16__
  static __m512i load_pair(const F16* p) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512h scaled = _mm512_mul_ph(_mm512_loadu_ph(p), _mm512_set1_ph(_Float16(32768.0f)));
    return _mm512_permutexvar_epi16(order, _mm512_cvtph_epi16(scaled));
  }
#endif
  // Word j = (x[2j], x[2j + 1]) in the lower half, zeros above.
  static __m512i round_single(__m512 x) {
    return _mm512_zextsi256_si512(
        _mm512_cvtepi32_epi16(_mm512_castps_si512(_mm512_add_ps(x, _mm512_set1_ps(kRounder)))));
  }
  static void store_lower(uint32_t* out, __m512i x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(x));
  }

  // Squares of 2^15-scaled values, in steps of 2^-22 when folded. A lane that saturates is 2 or more.
  static void add_squares(__m512i& sum, __m512i x) {
#ifdef __AVX512VNNI__
    __asm__("vpdpwssds %1, %1, %0" : "+v"(sum) : "v"(x));
#else
    sum = _mm512_add_epi32(sum, _mm512_srli_epi32(_mm512_madd_epi16(x, x), 8));
#endif
  }
  static __m128i fold_squares(__m512i sum) {
#ifdef __AVX512VNNI__
    sum = _mm512_srli_epi32(sum, 8);
#endif
    const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  }

  // Magnitudes of 32 fp16 or bf16 values, as bits.
  static __m512i load_magnitudes(const void* p) {
    return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0x7fff7fff));
  }
  static __m512i maximum_magnitudes(__m512i a, __m512i b) { return _mm512_max_epu16(a, b); }
  static uint32_t largest_magnitude(__m512i x) {
    return _mm512_reduce_max_epu32(
        _mm512_max_epu32(_mm512_srli_epi32(x, 16), _mm512_and_si512(x, _mm512_set1_epi32(0xffff))));
  }
};

}  // namespace

#include "i16.h"
