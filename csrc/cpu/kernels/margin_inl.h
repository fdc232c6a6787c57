// How far a document token's integer similarity can lie below another's score and the token still win: the screen's
// proof.
//
// A query token q is rounded to s u, a document token d to v / m, with integers u and v. Then
//   |<q, d> - (s / m) <u, v>| <= |<q, d - v / m>| + |q - s u| |v / m| = E,
// and the sum in fp32 is off by another G <= gamma |q| |d|, gamma = dim 2^-24, of which there is four times as much
// here. So no token wins against a sum in fp32 if its own in integers lies more than E + G below it. The first part of
// E has two bounds: by norms, and since no value is rounded by more than half a step, by the sum of |q|'s values, which
// is the smaller one unless rest = |m d - v| was measured. In steps of s / m:
//   (1 + gamma) |q| / s * rest  or  (sum |q_k| + gamma sqrt(dim) |q|) / s / 2
//   + (|q - s u| + gamma |q|) / s * |v|.
// The factors belong to the query token, rest and |v| to a block of document tokens (the largest of any).
//
// A sum in fp32 in another order than the tile's is off by 2 G at most from that. So the winner's lies at most 4 G
// below the sums of others, in either order: the last factor, gamma |q| |d|, in the values' own units.
#pragma once

namespace {

// Outside of these an underflow, which rounds by more than a share of the value, could count.
constexpr float kSmallestScreened = 1e-10f, kLargestScreened = 1e10f;
// Factor of a query token of zeros, or none: 10^-3 of it, the least rest, already lies beyond every sum of zeros.
constexpr float kNoneReaches = -1e7f;
// Half a step, and what fp32 adds to it.
constexpr float kHalfStep = 0.501f;

// Largest |x| as bits, and |x|^2, of the widened query token in the job's buffer.
struct Extent {
  uint32_t largest;
  float square_norm;

  Extent(const float* row, int dim) {
    Simd::F squares = Simd::zero();
    Simd::I bits = Simd::zero_integer();
    for_each_register(row, dim, [&](int, Simd::F x) {
      bits = Simd::maximum_unsigned(bits, Simd::absolute_bits(x));
      squares = Simd::multiply_add(x, x, squares);
    });
    largest = Simd::largest_unsigned(bits);
    square_norm = Simd::sum(squares);
  }
};

#ifdef EDGECOLBERT_SCREENS
inline void clear_margin(const PackJob& job, int lane) {
  for (int factor = 0; factor < kMarginFactors; ++factor) job.margins[factor * Simd::width + lane] = 0.0f;
  job.margins[kOfRest * Simd::width + lane] = job.margins[kOfHalfSteps * Simd::width + lane] = kNoneReaches;
}

// False: int8 cannot stand for this query token.
inline bool set_margin(const PackJob& job, const float* row, const Extent& extent, const I8* integers, float scale,
                       int lane) {
  clear_margin(job, lane);
  const float largest = bits_to_float(extent.largest);
  if (largest == 0.0f) return true;
  if (!(largest >= kSmallestScreened && largest <= kLargestScreened)) return false;
  Simd::F squares = Simd::zero(), magnitudes = Simd::zero();
  for_each_register(row, job.dim, [&](int k, Simd::F x) {
    magnitudes = Simd::add(magnitudes, Simd::from_bits(Simd::absolute_bits(x)));
    const Simd::F rest = Simd::subtract(x, Simd::multiply(Simd::load(integers + k), Simd::broadcast(scale)));
    squares = Simd::multiply_add(rest, rest, squares);
  });
  const float gamma = float(job.dim) * 0x1p-22f;
  const float norm = 1.0001f * __builtin_sqrtf(extent.square_norm),
              lost = 1.0001f * __builtin_sqrtf(Simd::sum(squares));
  const float sum = 1.0001f * Simd::sum(magnitudes) + gamma * __builtin_sqrtf(float(job.dim)) * norm;
  job.margins[kOfRest * Simd::width + lane] = (1.0f + gamma) * norm / scale;
  job.margins[kOfHalfSteps * Simd::width + lane] = kHalfStep * sum / scale;
  job.margins[kOfNorm * Simd::width + lane] = (lost + gamma * norm) / scale;
  job.margins[kOfSteps * Simd::width + lane] = 1.0f / scale;
  job.margins[kOfSum * Simd::width + lane] = 1.01f * (gamma + 0x1p-22f) * norm;  // the limit is rounded as well
  return true;
}

// The value that becomes 127: the largest, or more where a half of the dimensions would be too long.
inline float screened_limit(const float* row, int dim, const Extent& extent) {
  const float largest = bits_to_float(extent.largest);
  if constexpr (ScreenInt::sums_halves) {
    float squares[2] = {0.0f, 0.0f};
    for (int k = 0; k < dim; ++k) squares[k / 2 % 2] += row[k] * row[k];
    const float longest = 1.0001f * __builtin_sqrtf(squares[0] > squares[1] ? squares[0] : squares[1]);
    const float rounded = kHalfStep * __builtin_sqrtf(0.5f * float(dim + 3));  // what rounding can add
    const float limit = 127.0f * longest / (DotScreen::kLongestHalf - rounded);
    return limit > largest ? limit : largest;
  }
  return largest;
}
#else
#ifndef EDGECOLBERT_NO_INT8
using DotScreen = DotI8;
#endif
inline float screened_limit(const float*, int, const Extent&) { return 0.0f; }
inline void clear_margin(const PackJob&, int) {}
inline bool set_margin(const PackJob&, const float*, const Extent&, const I8*, float, int) { return false; }
#endif

}  // namespace
