// AArch64 NEON: 32 registers of 4 lanes. Holds what the kernels use and nothing else.
#pragma once

#include <arm_neon.h>

#include "storage.h"

namespace {

struct Simd {
  static constexpr int width = 4;
  static constexpr bool multiplies_lanes = true;
  static constexpr bool specialises = true;  // packing has loops for usual shapes, beside those for any
  using F = float32x4_t;
  using I = int32x4_t;

  static F load(const float* p) { return vld1q_f32(p); }
  static F load(const F16* p) { return widen(vld1_u16(&p->bits), F16{}); }
  static F load(const BF16* p) { return widen(vld1_u16(&p->bits), BF16{}); }
  static F load(const I8* p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
  }
  // n < width elements, zeros behind them; memory past them is not touched.
  template <class Element>
  static F load_first(const Element* p, int n) {
    Element copy[width] = {};
    memcpy(copy, p, sizeof(Element) * size_t(n));
    return load(copy);
  }

  static void store(float* p, F x) { vst1q_f32(p, x); }
  static void store(F16* p, F x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  static void store(BF16* p, F x) { vst1_u16(&p->bits, narrow_bf16(x)); }
  static void store(I8* p, F x) {
    const int16x4_t half = vqmovn_s32(vcvtnq_s32_f32(x));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(half, half))), 0);
    memcpy(p, &four, sizeof four);
  }
  static void store_two(I8* p, F x, F y) {
    const int16x4_t low = vqmovn_s32(vcvtnq_s32_f32(x)), high = vqmovn_s32(vcvtnq_s32_f32(y));
    vst1_s8(reinterpret_cast<int8_t*>(p), vqmovn_s16(vcombine_s16(low, high)));
  }
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

  static constexpr bool streams = false;
  template <class Element>
  static constexpr int64_t stream_bytes = 1;
  template <class Element>
  static void stream(Element* p, F x) {
    store(p, x);
  }
  template <class Element>
  static void stream_two(Element* p, F x, F y) {
    store_two(p, x, y);
  }
  template <class Element>
  static void stream_copy(Element* out, const Element* p) {
    memcpy(out, p, width * sizeof(Element));
  }
  static void finish_streams() {}

  // Hides a value from the optimiser while it stays in its register.
  template <class V>
  static void keep(V& x) {
    __asm__("" : "+w"(x));
  }

  static F zero() { return vdupq_n_f32(0.0f); }
  static F broadcast(float x) { return vdupq_n_f32(x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F subtract(F a, F b) { return vsubq_f32(a, b); }
  static F multiply(F a, F b) { return vmulq_f32(a, b); }
  static F multiply_add(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  // sum += a * b[lane]
  template <int lane>
  static void multiply_add_lane(F& sum, F a, F b) {
    __asm__("fmla %0.4s, %1.4s, %2.s[%3]" : "+w"(sum) : "w"(a), "w"(b), "i"(lane));
  }
  static F maximum(F a, F b) { return vmaxq_f32(a, b); }
  static float sum(F x) { return vaddvq_f32(x); }

  // Lane r is sum(x[r]), with the same bits.
  static Four sums(const F (&x)[4]) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }

  static I zero_integer() { return vdupq_n_s32(0); }
  static I broadcast(int32_t x) { return vdupq_n_s32(x); }
  static I load(const int32_t* p) { return vld1q_s32(p); }
  static void store(int32_t* p, I x) { vst1q_s32(p, x); }
  static I add(I a, I b) { return vaddq_s32(a, b); }
  static I subtract(I a, I b) { return vsubq_s32(a, b); }
  static I maximum(I a, I b) { return vmaxq_s32(a, b); }
  static I maximum_unsigned(I a, I b) {
    return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
  }
  static uint32_t largest_unsigned(I x) { return vmaxvq_u32(vreinterpretq_u32_s32(x)); }
  static I bits(F x) { return vreinterpretq_s32_f32(x); }
  static F from_bits(I x) { return vreinterpretq_f32_s32(x); }
  static I absolute_bits(F x) { return vandq_s32(bits(x), vdupq_n_s32(0x7fffffff)); }
  static F to_float(I x) { return vcvtq_f32_s32(x); }
  static I to_integer(F x) { return vcvtnq_s32_f32(x); }  // to nearest; out of range: the nearest there is; NaN: 0

  // x - to_float(to_integer(x)) where that is in range.
  static F rest(F x) { return subtract(x, vrndnq_f32(x)); }
  // The sum of the lanes, in fewer of them: the others are 0.
  static F fold(F x) { return vsetq_lane_f32(vaddvq_f32(x), zero(), 0); }
  // Lane i is the sum of the lanes of x[i].
  static F sum_each(const F (&x)[4]) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }
  // Lane i is that with number lanes[i] of one register, or of four side by side.
  static I pick(const I (&x)[1], I lanes) {
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(x[0]), bytes_of(lanes)));
  }
  static I pick(const I (&x)[4], I lanes) {
    const uint8x16x4_t table = {{vreinterpretq_u8_s32(x[0]), vreinterpretq_u8_s32(x[1]), vreinterpretq_u8_s32(x[2]),
                                 vreinterpretq_u8_s32(x[3])}};
    return vreinterpretq_s32_u8(vqtbl4q_u8(table, bytes_of(lanes)));
  }
  // out[k][i] = rows[i][offset + k], widened.
  [[gnu::always_inline]] static void transpose(const float* const* rows, int64_t offset, F (&out)[4]) {
    F x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = vld1q_f32(rows[i] + offset);
    const F a = vzip1q_f32(x[0], x[2]), b = vzip2q_f32(x[0], x[2]);
    const F c = vzip1q_f32(x[1], x[3]), d = vzip2q_f32(x[1], x[3]);
    out[0] = vzip1q_f32(a, c);
    out[1] = vzip2q_f32(a, c);
    out[2] = vzip1q_f32(b, d);
    out[3] = vzip2q_f32(b, d);
  }
  template <class Half>
  [[gnu::always_inline]] static void transpose(const Half* const* rows, int64_t offset, F (&out)[8]) {
    uint16x8_t x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = vld1q_u16(&rows[i][offset].bits);
    // Four dimensions of two rows each, then two of all.
    const uint32x4_t a = vreinterpretq_u32_u16(vzip1q_u16(x[0], x[1])),
                     b = vreinterpretq_u32_u16(vzip2q_u16(x[0], x[1]));
    const uint32x4_t c = vreinterpretq_u32_u16(vzip1q_u16(x[2], x[3])),
                     d = vreinterpretq_u32_u16(vzip2q_u16(x[2], x[3]));
    const uint32x4_t two[4] = {vzip1q_u32(a, c), vzip2q_u32(a, c), vzip1q_u32(b, d), vzip2q_u32(b, d)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const uint16x8_t halves = vreinterpretq_u16_u32(two[k]);
      out[2 * k] = widen(vget_low_u16(halves), Half{});
      out[2 * k + 1] = widen(vget_high_u16(halves), Half{});
    }
  }

  static I where_equal(F a, F b, I yes, I no) { return vbslq_s32(vceqq_f32(a, b), yes, no); }
  static I where_equal(I a, I b, I yes, I no) { return vbslq_s32(vceqq_s32(a, b), yes, no); }
  static void take_greater(F& best, I& index, F value, I candidate) {
    select(vcgtq_f32(value, best), best, index, value, candidate);
  }
  // As above, and a NaN beats everything but an earlier NaN.
  static void take_greater_or_nan(F& best, I& index, F value, I candidate) {
    const uint32x4_t greater = vbicq_u32(vceqq_f32(best, best), vcleq_f32(value, best));
    select(greater, best, index, value, candidate);
  }
  static void take_greater(I& best, I& index, I value, I candidate) {
    const uint32x4_t greater = vcgtq_s32(value, best);
    best = vbslq_s32(greater, value, best);
    index = vbslq_s32(greater, candidate, index);
  }

 private:
  static F widen(uint16x4_t x, F16) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
  static F widen(uint16x4_t x, BF16) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
  static uint16x4_t narrow_bf16(F x) {
    const uint32x4_t raw = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(raw, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(raw, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(raw, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
  }
  // Where the bytes of numbered lanes stand.
  static uint8x16_t bytes_of(I lanes) {
    return vreinterpretq_u8_s32(vmlaq_s32(vdupq_n_s32(0x03020100), lanes, vdupq_n_s32(0x04040404)));
  }
  static void select(uint32x4_t greater, F& best, I& index, F value, I candidate) {
    best = vbslq_f32(greater, value, best);
    index = vbslq_s32(greater, candidate, index);
  }
};

}  // namespace
