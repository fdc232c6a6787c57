// AVX2, FMA and F16C: 16 registers of 8 lanes. Holds what the kernels use and nothing else.
#pragma once

#include <immintrin.h>

#include "storage.h"

// Instructions of AVX-VNNI. AVX-512 has them in an encoding of its own, in which they can be tested without AVX-VNNI.
#ifdef EDGECOLBERT_EVEX
#define EDGECOLBERT_VEX "%{evex%} "
#else
#define EDGECOLBERT_VEX "%{vex%} "
#endif

namespace {

struct Simd {
  static constexpr int width = 8;
  static constexpr bool multiplies_lanes = false;
  static constexpr bool specialises = true;  // packing has loops for usual shapes, beside those for any
  using F = __m256;
  using I = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const F16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), F16{}); }
  static F load(const BF16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), BF16{}); }
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
  // `width` elements as they are.
  static void stream_copy(float* out, const float* p) { _mm256_stream_ps(out, _mm256_loadu_ps(p)); }
  template <class Half>
  static void stream_copy(Half* out, const Half* p) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
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

  // Lane r is sum(x[r]), with the same bits.
  static Four sums(const F (&x)[4]) {
    const F a = _mm256_add_ps(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
    const F b = _mm256_add_ps(_mm256_permute2f128_ps(x[2], x[3], 0x20), _mm256_permute2f128_ps(x[2], x[3], 0x31));
    const F two = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));  // 0 0 2 2 1 1 3 3
    const F one = _mm256_add_ps(_mm256_shuffle_ps(two, two, 0x88), _mm256_shuffle_ps(two, two, 0xdd));
    return _mm_unpacklo_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1));
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
  static I to_integer(F x) { return _mm256_cvtps_epi32(x); }  // to nearest; out of range and NaN: INT32_MIN

  // x - to_float(to_integer(x)) where that is in range.
  static F rest(F x) { return subtract(x, _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
  // The sum of the lanes, in fewer of them: the others are 0.
  static F fold(F x) {
    return _mm256_zextps128_ps256(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
  }
  // Lane i is the sum of the lanes of x[i].
  static F sum_each(const F (&x)[8]) {
    F a[4], b[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      a[i] = add(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    // Of four rows each: 128 bits hold a half of every sum.
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      b[i] = add(_mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
    }
    return add(_mm256_permute2f128_ps(b[0], b[1], 0x20), _mm256_permute2f128_ps(b[0], b[1], 0x31));
  }
  // Lane i is that with number lanes[i] of one register, or of two side by side.
  static I pick(const I (&x)[1], I lanes) { return _mm256_permutevar8x32_epi32(x[0], lanes); }
  static I pick(const I (&x)[2], I lanes) {
    const F low = from_bits(_mm256_permutevar8x32_epi32(x[0], lanes)),
            high = from_bits(_mm256_permutevar8x32_epi32(x[1], lanes));
    return bits(_mm256_blendv_ps(low, high, from_bits(_mm256_slli_epi32(lanes, 28))));
  }
  // out[k][i] = rows[i][offset + k], widened.
  [[gnu::always_inline]] static void transpose(const float* const* rows, int64_t offset, F (&out)[4]) {
    F x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm256_castps128_ps256(_mm_loadu_ps(rows[i] + offset));
      x[i] = _mm256_insertf128_ps(x[i], _mm_loadu_ps(rows[4 + i] + offset), 1);
    }
    const F a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
    const F c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
    out[0] = _mm256_shuffle_ps(a, c, 0x44);
    out[1] = _mm256_shuffle_ps(a, c, 0xee);
    out[2] = _mm256_shuffle_ps(b, d, 0x44);
    out[3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  template <class Half>
  [[gnu::always_inline]] static void transpose(const Half* const* rows, int64_t offset, F (&out)[8]) {
    const auto eight = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset)); };
    I x[4], y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(i)), eight(4 + i), 1);
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      y[i] = _mm256_unpacklo_epi16(x[i], x[i + 1]);
      y[i + 1] = _mm256_unpackhi_epi16(x[i], x[i + 1]);
    }
    // Two dimensions of four rows, and of the other four.
    x[0] = _mm256_unpacklo_epi32(y[0], y[2]);
    x[1] = _mm256_unpackhi_epi32(y[0], y[2]);
    x[2] = _mm256_unpacklo_epi32(y[1], y[3]);
    x[3] = _mm256_unpackhi_epi32(y[1], y[3]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const I two = _mm256_permute4x64_epi64(x[k], 0xd8);
      out[2 * k] = widen(_mm256_castsi256_si128(two), Half{});
      out[2 * k + 1] = widen(_mm256_extracti128_si256(two, 1), Half{});
    }
  }

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
  static F widen(__m128i x, F16) { return _mm256_cvtph_ps(x); }
  static F widen(__m128i x, BF16) { return from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
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
