// The screen on NEON: sdot of the dot product extension. Without it products of int8 cost as much as fp32.
#pragma once

#define EDGECOLBERT_SCREENS

namespace {

// Values on their way to integers, where a NaN becomes 0: a maximum keeps it.
struct SeenNan {
  float32x4_t largest;
  float16x8_t largest_half;

  [[gnu::always_inline]] void see(float32x4_t x) { largest = vmaxq_f32(largest, x); }
  [[gnu::always_inline]] void see(float16x8_t x) { largest_half = vmaxq_f16(largest_half, x); }
  bool any_nan() const {
    const float32x4_t halves = vaddq_f32(vcvt_f32_f16(vget_low_f16(largest_half)), vcvt_high_f32_f16(largest_half));
    return __builtin_isnan(vaddvq_f32(vaddq_f32(largest, halves)));
  }
};

struct ScreenInt {
  // Rounding takes the units of a tile's multiply-adds, so there is nothing to hide it behind.
  static constexpr bool narrows_on_the_side = false;
  static constexpr bool sums_halves = false;
  static constexpr int dimensions = 2048;
  static constexpr int32_t document_bias = 0, document_limit = 128;
  static void multiply_add(int32x4_t& sum, int32x4_t query, int32x4_t document) {
    Int8::multiply_add(sum, query, document);
  }
  template <int lane>
  static void multiply_add_lane(int32x4_t& sum, int32x4_t query, int32x4_t documents) {
    Int8::multiply_add_lane<lane>(sum, query, documents);
  }
  static int32x4_t negative(int32x4_t x) { return vnegq_s32(x); }
  static int32x4_t total(int32x4_t sum) { return sum; }
  static int32x4_t add_bias(int32x4_t x) { return x; }

  // Half floats are multiplied as such, which takes half of the instructions.
  static constexpr bool multiplies_halves = true;

  // Four registers of int32 as bytes in the same order.
  static int32x4_t to_bytes(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
    const int16x8_t low = vqmovn_high_s32(vqmovn_s32(a), b), high = vqmovn_high_s32(vqmovn_s32(c), d);
    return vreinterpretq_s32_s8(vqmovn_high_s16(vqmovn_s16(low), high));
  }
  // Of two, and zeros.
  static int32x4_t to_bytes(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s8(vcombine_s8(vqmovn_s16(vqmovn_high_s32(vqmovn_s32(a), b)), vdup_n_s8(0)));
  }
  // What bounds values: their magnitudes. Beyond the range they become 127 or 128, a NaN 0.
  static int32x4_t extents(int32x4_t bytes) { return vreinterpretq_s32_s8(vabsq_s8(vreinterpretq_s8_s32(bytes))); }
  static int32x4_t maximum_extents(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_u8(vmaxq_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)));
  }
  static uint32_t largest_square(int32x4_t x) {
    const uint32_t largest = vmaxvq_u8(vreinterpretq_u8_s32(x));
    return largest * largest;
  }
  // What bounds the sum of a token's lanes: that itself, of four tokens.
  static constexpr int tokens_of_sum = 4;
  static int32x4_t sum_squares(const int32x4_t (&x)[4]) {
    return vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3]));
  }
  static float largest_sum(int32x4_t x) { return float(vmaxvq_s32(x)); }
  static int32x4_t add_squares(int32x4_t sum, int32x4_t extents) {
    const uint8x16_t x = vreinterpretq_u8_s32(extents);
    return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sum), x, x));
  }
  static float sum_of_extents(int32x4_t x) { return float(vaddvq_s32(add_squares(vdupq_n_s32(0), x))); }
};

// The first 16 of `left` values, times the lanes of `scale`.
[[gnu::always_inline]] inline int32x4_t round_halves(const F16* row, int left, float32x4_t scale, SeenNan& seen) {
  F16 copy[16];
  if (left < 16) {
    memset(copy, 0, sizeof copy);
    memcpy(copy, row, sizeof(F16) * size_t(left));
    row = copy;
  }
  const float16x8_t steps = vcvt_high_f16_f32(vcvt_f16_f32(scale), scale);
  const float16x8_t low = vmulq_f16(vreinterpretq_f16_u16(vld1q_u16(&row[0].bits)), steps),
                    high = vmulq_f16(vreinterpretq_f16_u16(vld1q_u16(&row[8].bits)), steps);
  seen.see(low);
  seen.see(high);
  return vreinterpretq_s32_s8(vqmovn_high_s16(vqmovn_s16(vcvtnq_s16_f16(low)), vcvtnq_s16_f16(high)));
}

// As with AVX-512: nowhere measured on this architecture.
constexpr int64_t kShortestScreened = 32, kShortestScreenedFast = kNever;

// Scores of a token as int16: four registers of sums become two.
struct Scores {
  static constexpr int lanes = 16, kTags = 7;
  static constexpr int kLaneOf[lanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  struct V {
    int16x8_t low, high;
  };
  template <int shift>
  static V pack(const int32x4_t (&sums)[4], Constant<shift>) {
    static_assert(shift > 0, "there is no instruction for none");
    return {vqshrn_high_n_s32(vqshrn_n_s32(sums[0], shift), sums[1], shift),
            vqshrn_high_n_s32(vqshrn_n_s32(sums[2], shift), sums[3], shift)};
  }
  static V pack(const int32x4_t (&sums)[4], int shift) {
    int16x4_t x[4];
    for (int i = 0; i < 4; ++i) x[i] = vqmovn_s32(vshlq_s32(sums[i], vdupq_n_s32(-shift)));
    return {vcombine_s16(x[0], x[1]), vcombine_s16(x[2], x[3])};
  }
  // Bit i of a token's hit, if `wanted`: its score i reaches that of the threshold. Three tokens more may be read and
  // written.
  using Hits = uint16_t;
  static constexpr uint32_t kAll = 0xffff, kFirstRegister = 0x000f;  // bits of its lanes
  static void find(const int16_t* scores, int64_t tokens, V threshold, uint32_t wanted, Hits* hits) {
    const uint16x8_t every = vdupq_n_u16(uint16_t(wanted));
    const uint8x16_t bits = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    for (int64_t t = 0; t < tokens; t += 4, scores += 4 * lanes, hits += 4) {
      uint8x16_t reached[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const V x = load(scores + i * lanes);
        const uint16x8_t low = vcgeq_s16(x.low, threshold.low), high = vcgeq_s16(x.high, threshold.high);
        reached[i] = vandq_u8(vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)), bits);
      }
      // Eight bits become a byte, in three rounds.
      const uint8x16_t four = vpaddq_u8(vpaddq_u8(reached[0], reached[1]), vpaddq_u8(reached[2], reached[3]));
      const uint16x4_t hit = vreinterpret_u16_u8(vpadd_u8(vget_low_u8(four), vget_high_u8(four)));
      vst1_u16(hits, vand_u16(hit, vget_low_u16(every)));
    }
  }
  // Every token with each lane that its bits name, token << 8 | lane. Returns how many there are.
  static int64_t list_pairs(const Hits* hits, int64_t tokens, uint32_t* pairs) {
    const uint32_t* const first = pairs;
    for (int64_t t = 0; t < tokens; t += 4) {
      uint64_t four = 0;
      memcpy(&four, hits + t, sizeof(Hits) * size_t(tokens - t < 4 ? tokens - t : 4));
      for (; four; four &= four - 1) {
        const int bit = __builtin_ctzll(four);
        *pairs++ = uint32_t(t + bit / lanes) << 8 | uint32_t(bit % lanes);
      }
    }
    return pairs - first;
  }
  // Those of `count` pairs whose value reaches their lane's limit move to the front, with it; returns how many they
  // are.
  static int64_t keep_pairs(uint32_t* pairs, int64_t count, float* values, const float32x4_t (&limits)[4]) {
    float least[lanes];
    memcpy(least, limits, sizeof least);
    int64_t kept = 0;
    for (int64_t p = 0; p < count; ++p) {
      const uint32_t pair = pairs[p];
      const float value = values[p];
      pairs[kept] = pair;
      values[kept] = value;
      kept += value >= least[pair & 0xff];
    }
    return kept;
  }
  static V load(const int16_t* p) { return {vld1q_s16(p), vld1q_s16(p + 8)}; }
  static void store(int16_t* p, V x) {
    vst1q_s16(p, x.low);
    vst1q_s16(p + 8, x.high);
  }
  static V zero() { return broadcast(0); }
  static V lowest() { return broadcast(INT16_MIN); }
  static V broadcast(int16_t x) { return {vdupq_n_s16(x), vdupq_n_s16(x)}; }
  static V maximum(V a, V b) { return {vmaxq_s16(a.low, b.low), vmaxq_s16(a.high, b.high)}; }
  static V where_greater(V a, V b, V yes, V no) {
    return {vbslq_s16(vcgtq_s16(a.low, b.low), yes.low, no.low),
            vbslq_s16(vcgtq_s16(a.high, b.high), yes.high, no.high)};
  }
  // The lowest bits hold which token of a tile it is.
  static V tagged(V x, int tag) {
    const int16x8_t rest = vdupq_n_s16(~kTags), number = vdupq_n_s16(int16_t(tag));
    return {vorrq_s16(vandq_s16(x.low, rest), number), vorrq_s16(vandq_s16(x.high, rest), number)};
  }
  static int tag_of(int16_t score) { return score & kTags; }
};

}  // namespace

#include "screen.h"
