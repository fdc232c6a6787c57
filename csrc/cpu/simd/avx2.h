// AVX2, FMA and F16C: 16 registers of 8 lanes. Holds what the kernels use and nothing else.
#pragma once

#include <immintrin.h>

#include "storage.h"

namespace {

struct Simd {
  static constexpr int width = 8;
  using F = __m256;
  using I = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load(const BF16* p) {
    return from_bits(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static F load(const I8* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // n < width elements, zeros behind them; memory past them is not touched.
  template <class Element>
  static F load_first(const Element* p, int n) {
    Element copy[width] = {};
    memcpy(copy, p, sizeof(Element) * size_t(n));
    return load(copy);
  }

  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(F16* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(x)); }
  static void store(BF16* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x)); }
  static void store(I8* p, F x) {
    const I wide = _mm256_cvtps_epi32(x);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
  }
  static void store_two(I8* p, F x, F y) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_i8(x, y)); }
  template <class Element>
  static void store_two(Element* p, F x, F y) {
    store(p, x);
    store(p + width, y);
  }
  template <class Element>
  static void store_first(Element* p, F x, int n) {
    Element copy[width];
    store(copy, x);
    memcpy(p, copy, sizeof(Element) * size_t(n));
  }

  // Past the caches; visible to other threads after finish_streams(). p is aligned to stream_bytes, a multiple of which
  // is all that is written.
  static constexpr bool streams = true;
  template <class Element>
  static constexpr int64_t stream_bytes = sizeof(Element) == 4 ? 32 : 16;
  static void stream(float* p, F x) { _mm256_stream_ps(p, x); }
  static void stream(F16* p, F x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_f16(x)); }
  static void stream(BF16* p, F x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x)); }
  static void stream(I8* p, F x) { store(p, x); }  // half of what can be streamed
  static void stream_two(I8* p, F x, F y) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_i8(x, y)); }
  template <class Element>
  static void stream_two(Element* p, F x, F y) {
    stream(p, x);
    stream(p + width, y);
  }
  static void finish_streams() { _mm_sfence(); }

  // Hides a value from the optimiser while it stays in its register.
  template <class V>
  static void keep(V& x) {
    __asm__("" : "+x"(x));
  }

  static F zero() { return _mm256_setzero_ps(); }
  static F broadcast(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F maximum(F a, F b) { return _mm256_max_ps(a, b); }
  static float sum(F x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  static I zero_integer() { return _mm256_setzero_si256(); }
  static I broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static void store(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I subtract(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I maximum(I a, I b) { return _mm256_max_epi32(a, b); }
  static I maximum_unsigned(I a, I b) { return _mm256_max_epu32(a, b); }
  static uint32_t largest_unsigned(I x) {
    uint32_t lanes[width], largest = 0;
    _mm256_storeu_si256(reinterpret_cast<I*>(lanes), x);
    for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
  }
  static I bits(F x) { return _mm256_castps_si256(x); }
  static F from_bits(I x) { return _mm256_castsi256_ps(x); }
  static I absolute_bits(F x) { return _mm256_and_si256(bits(x), _mm256_set1_epi32(0x7fffffff)); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }

  static I where_equal(F a, F b, I yes, I no) {
    return _mm256_blendv_epi8(no, yes, bits(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
  }
  static I where_equal(I a, I b, I yes, I no) { return _mm256_blendv_epi8(no, yes, _mm256_cmpeq_epi32(a, b)); }
  static void take_greater(F& best, I& index, F value, I candidate) {
    const F greater = _mm256_cmp_ps(value, best, _CMP_GT_OQ);
    best = _mm256_blendv_ps(best, value, greater);
    index = _mm256_blendv_epi8(index, candidate, bits(greater));
  }
  // As above, and a NaN beats everything but an earlier NaN.
  static void take_greater_or_nan(F& best, I& index, F value, I candidate) {
    const F greater = _mm256_and_ps(_mm256_cmp_ps(value, best, _CMP_NLE_UQ), _mm256_cmp_ps(best, best, _CMP_ORD_Q));
    best = _mm256_blendv_ps(best, value, greater);
    index = _mm256_blendv_epi8(index, candidate, bits(greater));
  }
  static void take_greater(I& best, I& index, I value, I candidate) {
    const I greater = _mm256_cmpgt_epi32(value, best);
    best = _mm256_blendv_epi8(best, value, greater);
    index = _mm256_blendv_epi8(index, candidate, greater);
  }

 private:
  static __m128i narrow_f16(F x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m128i narrow_bf16(F x) {
    const I raw = bits(x);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
    const I rounded = add(raw, add(odd, _mm256_set1_epi32(0x7fff)));
    const I quiet = _mm256_or_si256(raw, _mm256_set1_epi32(0x400000));
    const I nan = bits(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const I high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  static __m128i narrow_i8(F x, F y) {
    const I both = _mm256_packs_epi32(_mm256_cvtps_epi32(x), _mm256_cvtps_epi32(y));
    const __m128i fours = _mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    return _mm_shuffle_epi32(fours, 0xd8);  // x0 y0 x1 y1
  }
};

}  // namespace
