// AVX-512 F, BW, DQ, VL: 32 registers of 16 lanes. Holds what the kernels use and nothing else.
#pragma once

#include <immintrin.h>

#include "storage.h"

namespace {

struct Simd {
  static constexpr int width = 16;
  static constexpr bool multiplies_lanes = false;
  static constexpr bool specialises = true;  // packing has loops for usual shapes, beside those for any
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
  static void store_two(BF16* p, F x, F y) { _mm512_storeu_si512(p, narrow_bf16(x, y)); }
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
  static void stream_two(BF16* p, F x, F y) {
    const I both = narrow_bf16(x, y);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(both));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + width), _mm512_extracti64x4_epi64(both, 1));
  }
  template <class Element>
  static void stream_two(Element* p, F x, F y) {
    stream(p, x);
    stream(p + width, y);
  }
  // `width` elements as they are.
  static void stream_copy(float* out, const float* p) { _mm512_stream_ps(out, _mm512_loadu_ps(p)); }
  template <class Half>
  static void stream_copy(Half* out, const Half* p) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
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

  // Lane r is sum(x[r]), with the same bits.
  static Four sums(const F (&x)[4]) {
    const F a = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee));
    const F b = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee));
    F four = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    four = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
    four = _mm512_add_ps(four, _mm512_permute_ps(four, 0xb1));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, four));
  }

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
  static I to_integer(F x) { return _mm512_cvtps_epi32(x); }  // to nearest; out of range and NaN: INT32_MIN
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

  // x - to_float(to_integer(x)) where that is in range.
  static F rest(F x) { return _mm512_reduce_ps(x, 8); }
  // The sum of the lanes, in fewer of them: the others are 0.
  static F fold(F x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    return _mm512_zextps128_ps512(_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
  }
  // Lane i is the sum of the lanes of x[i].
  static F sum_each(const F (&x)[16]) {
    F a[8], b[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    // Of four rows each: 128 bits hold a part of every sum.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d even = _mm512_castps_pd(a[2 * i]), odd = _mm512_castps_pd(a[2 * i + 1]);
      b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    const F low = add_quarters(b[0], b[1]), high = add_quarters(b[2], b[3]);
    return add_quarters(low, high);
  }
  // Lane i is that with number lanes[i] of one register, or of two side by side.
  static I pick(const I (&x)[1], I lanes) { return _mm512_permutexvar_epi32(lanes, x[0]); }
  static I pick(const I (&x)[2], I lanes) { return _mm512_permutex2var_epi32(x[0], lanes, x[1]); }
  // out[k][i] = rows[i][offset + k] of 32-bit words.
  [[gnu::always_inline]] static void transpose(const uint32_t* const* rows, int64_t offset, I (&out)[4]) {
    const auto four = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset)); };
    I x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_inserti32x4(_mm512_castsi128_si512(four(i)), four(4 + i), 1);
      x[i] = _mm512_inserti32x4(_mm512_inserti32x4(x[i], four(8 + i), 2), four(12 + i), 3);
    }
    const I a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const I c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
  }
  // out[k][i] = rows[i][offset + k], widened.
  [[gnu::always_inline]] static void transpose(const float* const* rows, int64_t offset, F (&out)[4]) {
    I words[4];
    transpose(reinterpret_cast<const uint32_t* const*>(rows), offset, words);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) out[k] = from_bits(words[k]);
  }
  template <class Half>
  [[gnu::always_inline]] static void transpose(const Half* const* rows, int64_t offset, F (&out)[8]) {
    const auto eight = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset)); };
    __m256i x[8], y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(i)), eight(8 + i), 1);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      y[i] = _mm256_unpacklo_epi16(x[i], x[i + 1]);
      y[i + 1] = _mm256_unpackhi_epi16(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      x[i] = _mm256_unpacklo_epi32(y[i], y[i + 2]);
      x[i + 1] = _mm256_unpackhi_epi32(y[i], y[i + 2]);
      x[i + 2] = _mm256_unpacklo_epi32(y[i + 1], y[i + 3]);
      x[i + 3] = _mm256_unpackhi_epi32(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      out[2 * k] = widen(_mm256_unpacklo_epi64(x[k], x[k + 4]), Half{});
      out[2 * k + 1] = widen(_mm256_unpackhi_epi64(x[k], x[k + 4]), Half{});
    }
  }

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
  // Neighbouring 128 bits of a, then of b, added.
  static F add_quarters(F a, F b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  static F widen(__m256i x, F16) { return _mm512_cvtph_ps(x); }
  static F widen(__m256i x, BF16) { return widen_bf16(x); }
  static F widen_bf16(__m256i x) { return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static F widen_i8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
  static __m128i narrow_i8(F x) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)); }
  static __m256i narrow_f16(F x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // The nearest bfloat16 in the upper half of each lane.
  static I round_bf16(F x) {
    const I raw = bits(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
    const I rounded = add(raw, add(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, raw, _mm512_set1_epi32(0x400000));
  }
  static __m256i narrow_bf16(F x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(x), 16)); }
  static I narrow_bf16(F x, F y) {
    alignas(64) static constexpr int16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(round_bf16(x), _mm512_load_si512(upper), round_bf16(y));
  }
};

}  // namespace
