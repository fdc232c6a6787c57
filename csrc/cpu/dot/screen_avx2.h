// The screen on AVX2: vpdpbusd with VNNI, else vpmaddubsw + vpaddw.
#pragma once

#define EDGECOLBERT_SCREENS

namespace {

// A NaN shows in what bounds values.
struct SeenNan {
  [[gnu::always_inline]] void see(Simd::F) {}
  bool any_nan() const { return false; }
};

struct ScreenInt {
  static constexpr bool narrows_on_the_side = false;  // of a tile: its sums leave no registers
#ifdef __AVXVNNI__
  static constexpr bool sums_halves = false;
  static constexpr int dimensions = 2048;
  static constexpr int32_t document_bias = 128, document_limit = 128;
  static void multiply_add(__m256i& sum, __m256i query, __m256i document) { Int8::multiply_add(sum, query, document); }
  static __m256i negative(__m256i x) { return Simd::subtract(Simd::zero_integer(), x); }
  static __m256i total(__m256i sum) { return sum; }
#else
  static constexpr bool sums_halves = true;
  static constexpr int dimensions = 256;  // with more, sums of 16 bits hide which token is the best
  static constexpr int32_t document_bias = 64, document_limit = 64;
  static void multiply_add(__m256i& sum, __m256i query, __m256i document) {
    // Left to itself gcc does all products of a k-step first, and runs out of registers.
    __m256i product;
    __asm__("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(query), "x"(document));
  }
  static __m256i negative(__m256i x) { return _mm256_sub_epi16(Simd::zero_integer(), x); }
  static __m256i total(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif
  static constexpr bool multiplies_halves = false;
  static __m256i add_bias(__m256i x) { return _mm256_add_epi8(x, _mm256_set1_epi8(char(document_bias))); }

  // Four registers of int32 as bytes in the same order.
  static __m256i to_bytes(__m256i a, __m256i b, __m256i c, __m256i d) {
    return in_order(_mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)));
  }
  // Of two, and zeros.
  static __m256i to_bytes(__m256i a, __m256i b) {
    return in_order(_mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_setzero_si256()));
  }
  // What bounds values: squares of int8 summed in pairs, unsigned 16-bit. With a -128, which only stands for a value
  // that was cut off, or for a NaN, a sum is at least 2^15.
  static __m256i extents(__m256i bytes) {
    const __m256i magnitudes = _mm256_abs_epi8(bytes);
    return _mm256_maddubs_epi16(magnitudes, magnitudes);
  }
  static __m256i maximum_extents(__m256i a, __m256i b) { return _mm256_max_epu16(a, b); }
  static uint32_t largest_square(__m256i x) {
    return Simd::largest_unsigned(
        _mm256_max_epu32(_mm256_srli_epi32(x, 16), _mm256_and_si256(x, _mm256_set1_epi32(0xffff))));
  }
  static float sum_of_extents(__m256i x) {
    const __m256i both = _mm256_add_epi32(_mm256_srli_epi32(x, 16), _mm256_and_si256(x, _mm256_set1_epi32(0xffff)));
    return Simd::sum(Simd::to_float(both));
  }
  // What bounds the sum of a token's lanes: two of its own, of four tokens.
  static constexpr int tokens_of_sum = 4;
  static __m256i sum_squares(const __m256i (&x)[4]) {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
  }
  static float largest_sum(__m256i x) {
    return float(Simd::largest_unsigned(_mm256_add_epi32(x, _mm256_permute2x128_si256(x, x, 1))));
  }
  // Two sums of pairs a lane.
  static __m256i add_squares(__m256i sum, __m256i extents) {
#ifdef __AVXVNNI__
    __asm__(EDGECOLBERT_VEX "vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(extents), "x"(_mm256_set1_epi16(1)));
    return sum;
#else
    // Left to itself gcc does all products first, and runs out of registers.
    __m256i both;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "=&x"(both)
            : "x"(extents), "x"(_mm256_set1_epi16(1)));
    return sum;
#endif
  }

 private:
  static __m256i in_order(__m256i bytes) {
    return _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
  }
};

// Measured on text. Fewer document tokens leave too large a share of them to be scored twice; with VNNI int16 is
// quicker for all.
constexpr int64_t kShortestScreened = ScreenInt::sums_halves ? 80 : 64;
constexpr int64_t kShortestScreenedFast = ScreenInt::sums_halves ? 160 : kNever;

// For each 8-bit mask the numbers of its bits, ascending, a byte each.
struct BitNumbers {
  uint64_t of[256] = {};
  constexpr BitNumbers() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if (mask >> bit & 1) of[mask] |= uint64_t(bit) << (8 * count++);
      }
    }
  }
};
alignas(64) constexpr BitNumbers kBitNumbers;

// Of a register of int16 each: what a score leaves beside its tag, and the tags.
struct TagWords {
  uint64_t without[4] = {}, tags[8][4] = {};
  constexpr TagWords() {
    for (int i = 0; i < 4; ++i) {
      without[i] = ~(7 * 0x1000100010001u);
      for (int tag = 0; tag < 8; ++tag) tags[tag][i] = uint64_t(tag) * 0x1000100010001u;
    }
  }
};
alignas(64) constexpr TagWords kTagWords;

// Scores of a token as int16: two registers of sums become one, each 128 bits of it four of either.
struct Scores {
  static constexpr int lanes = 16, kTags = 7;
  static constexpr int kLaneOf[lanes] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};
  using V = __m256i;
  static V pack(const __m256i (&sums)[2], int shift) {
    if (ScreenInt::sums_halves) return _mm256_packs_epi32(sums[0], sums[1]);
    const __m128i count = _mm_cvtsi32_si128(shift);
    return _mm256_packs_epi32(_mm256_sra_epi32(sums[0], count), _mm256_sra_epi32(sums[1], count));
  }
  // Bit i of a token's hit, if `wanted`: its score i reaches that of the threshold. One token more may be read and
  // written.
  using Hits = uint16_t;
  static constexpr uint32_t kAll = 0xffff, kFirstRegister = 0x0f0f;  // bits of its lanes
  static void find(const int16_t* scores, int64_t tokens, V threshold, uint32_t wanted, Hits* hits) {
    const uint32_t both = wanted << 16 | wanted;
    for (int64_t t = 0; t < tokens; t += 2, scores += 2 * lanes, hits += 2) {
      const V below = _mm256_packs_epi16(_mm256_cmpgt_epi16(threshold, load(scores)),
                                         _mm256_cmpgt_epi16(threshold, load(scores + lanes)));
      const uint32_t reached = ~uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(below, 0xd8))) & both;
      memcpy(hits, &reached, 4);
    }
  }
  // Every token with each lane that its bits name, token << 8 | lane. 8 tokens at a time give up their lowest bits, so
  // the tokens of a lane are in no order. Returns how many there are; 8 more may be written, and 7 tokens more be read.
  static int64_t list_pairs(const Hits* hits, int64_t tokens, uint32_t* pairs) {
    const uint32_t* const first = pairs;
    const __m256i step = _mm256_set1_epi32(8 << 8), end = _mm256_set1_epi32(int(tokens) << 8);
    // The lane of each bit but the others, which are none.
    const __m256i lane_of =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15));
    __m256i token = _mm256_slli_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), 8);
    for (int64_t t = 0; t < tokens; t += 8) {
      __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(hits + t)));
      x = _mm256_and_si256(x, _mm256_cmpgt_epi32(end, token));
      for (int none = zeros(x); none != 0xff; none = zeros(x)) {
        const int any = ~none & 0xff;
        const __m256i rest = _mm256_and_si256(x, _mm256_sub_epi32(x, _mm256_set1_epi32(1)));
        // The exponent of the lowest bit is its number.
        const __m256i exponent = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_xor_si256(x, rest)));
        const __m256i place = _mm256_srli_epi32(_mm256_sub_epi32(exponent, _mm256_set1_epi32(127 << 23)), 23);
        const __m256i lane = _mm256_shuffle_epi8(lane_of, _mm256_or_si256(place, _mm256_set1_epi32(int(0x80808000))));
        store_some(pairs, _mm256_or_si256(token, lane), any);
        pairs += __builtin_popcount(unsigned(any));
        x = rest;
      }
      token = _mm256_add_epi32(token, step);
    }
    return pairs - first;
  }
  // Those of `count` pairs whose value reaches their lane's limit move to the front, with it; returns how many they
  // are.
  static int64_t keep_pairs(uint32_t* pairs, int64_t count, float* values, const __m256 (&limits)[2]) {
    uint32_t* kept = pairs;
    for (int64_t p = 0; p < count; p += 8) {
      const __m256i pair = load_words(pairs + p);
      const __m256 least =
          _mm256_blendv_ps(_mm256_permutevar8x32_ps(limits[0], pair),  // looks at three bits of the lane
                           _mm256_permutevar8x32_ps(limits[1], pair), _mm256_castsi256_ps(_mm256_slli_epi32(pair, 28)));
      const __m256 value = _mm256_loadu_ps(values + p);
      int reaches = _mm256_movemask_ps(_mm256_cmp_ps(value, least, _CMP_GE_OQ));
      if (count - p < 8) reaches &= (1 << (count - p)) - 1;
      store_some(reinterpret_cast<uint32_t*>(values) + (kept - pairs), _mm256_castps_si256(value), reaches);
      store_some(kept, pair, reaches);
      kept += __builtin_popcount(unsigned(reaches));
    }
    return kept - pairs;
  }
  static V load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const V*>(p)); }
  static void store(int16_t* p, V x) { _mm256_storeu_si256(reinterpret_cast<V*>(p), x); }
  static V zero() { return _mm256_setzero_si256(); }
  static V lowest() { return _mm256_set1_epi16(INT16_MIN); }
  static V broadcast(int16_t x) { return _mm256_set1_epi16(x); }
  static V maximum(V a, V b) { return _mm256_max_epi16(a, b); }
  static V where_greater(V a, V b, V yes, V no) { return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi16(a, b)); }
  // The lowest bits hold which token of a tile it is.
  static V tagged(V x, int tag) {
    // Left to itself gcc 12 makes every tag in a general register.
    __asm__("vpand %1, %0, %0\n\tvpor %2, %0, %0" : "+x"(x) : "m"(kTagWords.without), "m"(kTagWords.tags[tag]));
    return x;
  }
  static int tag_of(int16_t score) { return score & kTags; }

 private:
  static __m256i load_words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static int zeros(__m256i x) {
    return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(x, _mm256_setzero_si256())));
  }
  // The lanes of `mask` come first.
  static void store_some(uint32_t* out, __m256i x, int mask) {
    const __m128i numbers = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitNumbers.of + mask));
    const __m256i some = _mm256_permutevar8x32_epi32(x, _mm256_cvtepu8_epi32(numbers));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), some);
  }
};

}  // namespace

#include "screen.h"
