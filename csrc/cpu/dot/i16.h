// Dot products in fixed point: a k-word is two dimensions in int16, products are summed in int32.
//
// Documents are scaled by 2^15 and rounded, queries by 2^15 - 1, so that a query value of 1 is exact; a document value that saturates
// sends its document to fp32. A similarity is the sum in int32 over 2^15 (2^15 - 1): nothing overflows while |q| |d| < 2.
// Each value is off by at most half a step, 2^-16, so a similarity by at most 2^-16 (|q|_1 + |d|_1) and a little.
//
// The including file defines Int16: multiply_add(I& sum, I query, I document); Magnitudes, a register of |int16|; store_rounded(int16_t*,
// F, Magnitudes& largest); largest(Magnitudes).
//
// Rounding is done by the adder: x + 1.5 * 2^8 has an ulp of 2^-15 and leaves the fixed-point integer in its low bits. That holds for
// |x| < 128; beyond it, and for NaN, the integer is larger still, so that the saturating conversion to int16 saturates as it must.
#pragma once

namespace {

constexpr float kSimilarityScale = 1.0f / (32768.0f * 32767.0f);

struct DotI16 {
  using V = Simd::I;
  using Lane = int32_t;
  static constexpr bool fixed_point = true;

  static V zero() { return Simd::zero_integer(); }
  static V load(const void* p) { return Simd::load(static_cast<const int32_t*>(p)); }
  static void store(Lane* p, V x) { Simd::store(p, x); }
  static V broadcast(const uint32_t* p) { return Simd::broadcast(*reinterpret_cast<const int32_t*>(p)); }
  static void multiply_add(V& sum, V query, V document) { Int16::multiply_add(sum, query, document); }
  static V maximum(V a, V b) { return Simd::maximum(a, b); }
  static V lowest() { return Simd::broadcast(INT32_MIN); }
};

}  // namespace
