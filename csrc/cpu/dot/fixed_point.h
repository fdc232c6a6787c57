// Dot products in fixed point: a k-word is two dimensions in int16, products are summed in int32.
//
// Values are scaled by 2^15 and rounded; a similarity is the sum in int32 over 2^30. A value is off by at most half a
// step, 2^-16, so a similarity by at most 2^-16 (|q|_1 + |d|_1) and a little. An fp16 value of 2^-5 or more is
// represented exactly.
//
// Nothing overflows while |q| |d| < 2. Every query has |x| < 1 and |q|^2 <= 1.05, every document |x| < 1 and |d|^2
// <= 3.5, in at most 2^11 dimensions, whose roundings can add 2^5.5 * 2^-16 to a norm; what does not fit is scored in
// fp32.
#pragma once

namespace {

constexpr int kFixedPointDimensions = 2048;  // more could overflow the sums of squares that check the norm
constexpr float kFixedPointScale = 32768.0f;
constexpr float kSimilarityScale = 1.0f / (kFixedPointScale * kFixedPointScale);
constexpr float kLargestFixedPoint = 0.99998f;        // rounds to no more than 2^15 - 1
constexpr float kSquareNormLimit = 3.5f * (1 << 22);  // of squares in steps of 2^-22
// x + 1.5 * 2^8 has an ulp of 2^-15: the adder rounds, and the low 16 bits are the fixed-point value of any |x| < 1.
constexpr float kRounder = 384.0f;

}  // namespace
