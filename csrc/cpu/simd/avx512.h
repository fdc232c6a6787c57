// AVX-512 F, BW, DQ, VL: 32 registers of 16 lanes. Holds what the kernels use and nothing else.
#pragma once

#include <immintrin.h>

#include "storage.h"

namespace {

struct Simd {
  static constexpr int width = 16;
  using F = __m512;
  using I = __m512i;

  static __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const BF16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const I8* p) { return widen_i8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  // n < width elements, zeros behind them; memory past them is not touched.
  static F load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static F load_first(const F16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static F load_first(const BF16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static F load_first(const I8* p, int n) { return widen_i8(_mm_maskz_loadu_epi8(first(n), p)); }

  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(F16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x)); }
  static void store(BF16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
  static void store(I8* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_i8(x)); }
  template <class Element>
  static void store_two(Element* p, F x, F y) {
    store(p, x);
    store(p + width, y);
  }
  static void store_first(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static void store_first(F16* p, F x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(x)); }
  static void store_first(BF16* p, F x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(x)); }
  static void store_first(I8* p, F x, int n) { _mm_mask_storeu_epi8(p, first(n), narrow_i8(x)); }

  // Past the caches; visible to other threads after finish_streams(). p is aligned to stream_bytes, a multiple of which
  // is all that is written.
  static constexpr bool streams = true;
  template <class Element>
  static constexpr int64_t stream_bytes = width * int64_t(sizeof(Element));
  static void stream(float* p, F x) { _mm512_stream_ps(p, x); }
  static void stream(F16* p, F x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x)); }
  static void stream(BF16* p, F x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
  static void stream(I8* p, F x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_i8(x)); }
  template <class Element>
  static void stream_two(Element* p, F x, F y) {
    stream(p, x);
    stream(p + width, y);
  }
  static void finish_streams() { _mm_sfence(); }

  // Hides a value from the optimiser while it stays in its register.
  template <class V>
  static void keep(V& x) {
    __asm__("" : "+v"(x));
  }

  static F zero() { return _mm512_setzero_ps(); }
  static F broadcast(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F maximum(F a, F b) { return _mm512_max_ps(a, b); }
  static float sum(F x) { return _mm512_reduce_add_ps(x); }

  static I zero_integer() { return _mm512_setzero_si512(); }
  static I broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I maximum(I a, I b) { return _mm512_max_epi32(a, b); }
  static I maximum_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
  static uint32_t largest_unsigned(I x) { return _mm512_reduce_max_epu32(x); }
  static I bits(F x) { return _mm512_castps_si512(x); }
  static F from_bits(I x) { return _mm512_castsi512_ps(x); }
  static I absolute_bits(F x) { return _mm512_and_si512(bits(x), _mm512_set1_epi32(0x7fffffff)); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

  static I where_equal(F a, F b, I yes, I no) {
    return _mm512_mask_mov_epi32(no, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), yes);
  }
  static I where_equal(I a, I b, I yes, I no) { return _mm512_mask_mov_epi32(no, _mm512_cmpeq_epi32_mask(a, b), yes); }
  static void take_greater(F& best, I& index, F value, I candidate) {
    const __mmask16 greater = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);
    best = _mm512_mask_mov_ps(best, greater, value);
    index = _mm512_mask_mov_epi32(index, greater, candidate);
  }
  // As above, and a NaN beats everything but an earlier NaN.
  static void take_greater_or_nan(F& best, I& index, F value, I candidate) {
    const __mmask16 ordered = _mm512_cmp_ps_mask(best, best, _CMP_ORD_Q);
    const __mmask16 greater = _mm512_mask_cmp_ps_mask(ordered, value, best, _CMP_NLE_UQ);
    best = _mm512_mask_mov_ps(best, greater, value);
    index = _mm512_mask_mov_epi32(index, greater, candidate);
  }
  static void take_greater(I& best, I& index, I value, I candidate) {
    const __mmask16 greater = _mm512_cmpgt_epi32_mask(value, best);
    best = _mm512_mask_mov_epi32(best, greater, value);
    index = _mm512_mask_mov_epi32(index, greater, candidate);
  }

 private:
  static F widen_bf16(__m256i x) { return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static F widen_i8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
  static __m128i narrow_i8(F x) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)); }
  static __m256i narrow_f16(F x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m256i narrow_bf16(F x) {
    const I raw = bits(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
    const I rounded = add(raw, add(odd, _mm512_set1_epi32(0x7fff)));
    const I quiet = _mm512_or_si512(raw, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
};

}  // namespace
