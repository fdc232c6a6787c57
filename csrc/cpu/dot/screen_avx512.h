// The screen on AVX-512: vpdpbusd with VNNI, else vpmaddubsw + vpaddw.
#pragma once

#define EDGECOLBERT_SCREENS

namespace {

// A NaN shows in what bounds values.
struct SeenNan {
  [[gnu::always_inline]] void see(Simd::F) {}
  bool any_nan() const { return false; }
};

struct ScreenInt {
  static constexpr bool narrows_on_the_side = true;  // of a tile: fewer registers are taken by its sums
#ifdef __AVX512VNNI__
  static constexpr bool sums_halves = false;
  static constexpr int dimensions = 2048;
  static constexpr int32_t document_bias = 128, document_limit = 128;
  static void multiply_add(__m512i& sum, __m512i query, __m512i document) { Int8::multiply_add(sum, query, document); }
  static __m512i negative(__m512i x) { return Simd::subtract(Simd::zero_integer(), x); }
  static __m512i total(__m512i sum) { return sum; }
#else
  static constexpr bool sums_halves = true;
  static constexpr int dimensions = 192;  // with more, sums of 16 bits hide which token is the best
  static constexpr int32_t document_bias = 64, document_limit = 64;
  static void multiply_add(__m512i& sum, __m512i query, __m512i document) {
    // Left to itself gcc does all products of a k-step first, and runs out of registers.
    __m512i product;
    __asm__("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+v"(sum), "=&v"(product) : "v"(query), "v"(document));
  }
  static __m512i negative(__m512i x) { return _mm512_sub_epi16(Simd::zero_integer(), x); }
  static __m512i total(__m512i sum) { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
#endif
  static constexpr bool multiplies_halves = false;
  static __m512i add_bias(__m512i x) { return _mm512_add_epi8(x, _mm512_set1_epi8(char(document_bias))); }

  // Four registers of int32 as bytes in the same order.
  static __m512i to_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
    return in_order(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
  }
  // Of two, and zeros.
  static __m512i to_bytes(__m512i a, __m512i b) {
    return in_order(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_setzero_si512()));
  }
  // What bounds values: squares of int8 summed in pairs, unsigned 16-bit. With a -128, which only stands for a value
  // that was cut off, or for a NaN, a sum is at least 2^15.
  static __m512i extents(__m512i bytes) {
    const __m512i magnitudes = _mm512_abs_epi8(bytes);
    return _mm512_maddubs_epi16(magnitudes, magnitudes);
  }
  static __m512i maximum_extents(__m512i a, __m512i b) { return _mm512_max_epu16(a, b); }
  static uint32_t largest_square(__m512i x) {
    return _mm512_reduce_max_epu32(
        _mm512_max_epu32(_mm512_srli_epi32(x, 16), _mm512_and_si512(x, _mm512_set1_epi32(0xffff))));
  }
  static float sum_of_extents(__m512i x) {
    return float(_mm512_reduce_add_epi32(
        _mm512_add_epi32(_mm512_srli_epi32(x, 16), _mm512_and_si512(x, _mm512_set1_epi32(0xffff)))));
  }
  // What bounds the sum of a token's lanes: all of them.
  static constexpr int tokens_of_sum = 1;
  static __m512i sum_squares(const __m512i (&x)[1]) { return x[0]; }
  static float largest_sum(__m512i x) { return Simd::sum(Simd::to_float(x)); }
  // Two sums of pairs a lane.
  static __m512i add_squares(__m512i sum, __m512i extents) {
#ifdef __AVX512VNNI__
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(extents), "v"(_mm512_set1_epi16(1)));
    return sum;
#else
    return Simd::add(sum, _mm512_madd_epi16(extents, _mm512_set1_epi16(1)));
#endif
  }

 private:
  static __m512i in_order(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), bytes);
  }
};

// Measured on text. Fewer document tokens leave too large a share of them to be scored twice.
constexpr int64_t kShortestScreened = 32, kShortestScreenedFast = 128;

// Scores of a token as int16: two registers of sums become one, each 128 bits of it four of either.
struct Scores {
  static constexpr int lanes = 32, kTags = 15;
  static constexpr uint32_t kTagWords[kTags + 1] = {0x00000, 0x10001, 0x20002, 0x30003, 0x40004, 0x50005,
                                                    0x60006, 0x70007, 0x80008, 0x90009, 0xa000a, 0xb000b,
                                                    0xc000c, 0xd000d, 0xe000e, 0xf000f};
  using V = __m512i;
  static V pack(const __m512i (&sums)[2], int shift) {
    return _mm512_packs_epi32(_mm512_srai_epi32(sums[0], shift), _mm512_srai_epi32(sums[1], shift));
  }
  static constexpr int kLaneOf[lanes] = {0, 1, 2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
                                         8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
  // Bit i of a token's hit, if `wanted`: its score i reaches that of the threshold.
  using Hits = uint32_t;
  static constexpr uint32_t kAll = ~0u, kFirstRegister = 0x0f0f0f0f;  // bits of its lanes
  static void find(const int16_t* scores, int64_t tokens, V threshold, uint32_t wanted, Hits* hits) {
#pragma GCC unroll 4
    for (int64_t t = 0; t < tokens; ++t)
      _store_mask32(hits + t, _mm512_mask_cmpge_epi16_mask(wanted, load(scores + t * lanes), threshold));
  }
  // Every token with each lane that its bits name, token << 8 | lane. 16 tokens at a time give up their lowest bits, so
  // the tokens of a lane are in no order. Returns how many there are; 16 more may be written.
  static int64_t list_pairs(const Hits* hits, int64_t tokens, uint32_t* pairs) {
    const uint32_t* const first = pairs;
    const __m512i one = _mm512_set1_epi32(1), step = _mm512_set1_epi32(16 << 8);
    const __m512i low = _mm512_loadu_si512(kLaneOf), high = _mm512_loadu_si512(kLaneOf + 16);
    __m512i token = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 8);
    for (int64_t t = 0; t < tokens; t += 16) {
      const int left = tokens - t < 16 ? int(tokens - t) : 16;
      __m512i x = _mm512_maskz_loadu_epi32(__mmask16((1u << left) - 1), hits + t);
      for (__mmask16 any = _mm512_test_epi32_mask(x, x); any; any = _mm512_test_epi32_mask(x, x)) {
        const __m512i rest = _mm512_and_si512(x, _mm512_sub_epi32(x, one));
        // The exponent of the lowest bit is its number.
        const __m512i exponent = _mm512_castps_si512(_mm512_cvtepu32_ps(_mm512_xor_si512(x, rest)));
        const __m512i place = _mm512_sub_epi32(_mm512_srli_epi32(exponent, 23), _mm512_set1_epi32(127));
        const __m512i lane = _mm512_permutex2var_epi32(low, place, high);
        _mm512_storeu_si512(pairs, _mm512_maskz_compress_epi32(any, _mm512_or_si512(token, lane)));
        pairs += __builtin_popcount(any);
        x = rest;
      }
      token = _mm512_add_epi32(token, step);
    }
    return pairs - first;
  }
  // Those of `count` pairs whose value reaches their lane's limit move to the front, with it; returns how many they
  // are.
  static int64_t keep_pairs(uint32_t* pairs, int64_t count, float* values, const __m512 (&limits)[2]) {
    uint32_t* kept = pairs;
    for (int64_t p = 0; p < count; p += 16) {
      const __m512i pair = _mm512_loadu_si512(pairs + p);
      const __m512 least = _mm512_permutex2var_ps(limits[0], pair, limits[1]);  // looks at the lane's bits alone
      const __mmask16 valid = count - p < 16 ? __mmask16((1u << (count - p)) - 1) : __mmask16(-1);
      const __m512 value = _mm512_loadu_ps(values + p);
      const __mmask16 reaches = _mm512_mask_cmp_ps_mask(valid, value, least, _CMP_GE_OQ);
      _mm512_storeu_ps(values + (kept - pairs), _mm512_maskz_compress_ps(reaches, value));
      _mm512_storeu_si512(kept, _mm512_maskz_compress_epi32(reaches, pair));
      kept += __builtin_popcount(reaches);
    }
    return kept - pairs;
  }
  static V load(const int16_t* p) { return _mm512_loadu_si512(p); }
  static void store(int16_t* p, V x) { _mm512_storeu_si512(p, x); }
  static V zero() { return _mm512_setzero_si512(); }
  static V lowest() { return _mm512_set1_epi16(INT16_MIN); }
  static V broadcast(int16_t x) { return _mm512_set1_epi16(x); }
  static V maximum(V a, V b) { return _mm512_max_epi16(a, b); }
  static V where_greater(V a, V b, V yes, V no) {
    return _mm512_mask_mov_epi16(no, _mm512_cmpgt_epi16_mask(a, b), yes);
  }
  // The lowest bits hold which token of a tile it is.
  static V tagged(V x, int tag) {
    // (x & ~kTags) | tag. Left to itself gcc 12 makes every tag in a general register.
    __asm__("vpternlogd $0xba, %2%{1to16%}, %1, %0" : "+v"(x) : "v"(_mm512_set1_epi16(kTags)), "m"(kTagWords[tag]));
    return x;
  }
  static int tag_of(int16_t score) { return score & kTags; }
};

}  // namespace

#include "screen.h"
