// Dot products of the screen: query values are rounded to integers of 8 bits, document values to 7 or 8.
//
// The including file defines ScreenInt on its registers. Document values lie within document_limit. Where products are
// unsigned by signed, document_bias is added to them, which then have a sign less: a lane's sums are too large by
// document_bias * (sum of the query's integers), from whose negative they start.
//
// With sums_halves a lane of 32 bits holds two sums of 16: of the first two dimensions of every k-word, and of the
// other two. They may wrap around on the way, not in the end: no query token is longer than kLongestHalf in either
// half, and no document token than kLongestDocument, so by Cauchy-Schwarz no sum lies beyond 2^15 - 1. Document values
// of 7 bits keep the two products of a vpmaddubsw below 2 * 127 * 127 < 2^15, where it would saturate.
#pragma once

namespace {

constexpr int kScreenedDimensions = ScreenInt::dimensions;
constexpr bool kNarrowsOnTheSide = ScreenInt::narrows_on_the_side;

struct DotScreen {
  using V = Simd::I;
  static constexpr int dims_of_word = kScreenDimsOfWord;
  static constexpr int steps_of_round = kStepsOfRound;
  static constexpr int32_t kDocumentBias = ScreenInt::document_bias, kDocumentLimit = ScreenInt::document_limit;
  static constexpr uint32_t kElementBits = 0xff;
  // In steps.
  static constexpr float kLongestHalf = ScreenInt::sums_halves ? 160.0f : __builtin_inff();
  static constexpr float kLongestDocument = ScreenInt::sums_halves ? 32767.0f / kLongestHalf : __builtin_inff();

  static V zero() { return Simd::zero_integer(); }
  static V load(const void* p) { return Simd::load(static_cast<const int32_t*>(p)); }
  static V broadcast(const uint32_t* p) { return Simd::broadcast(*reinterpret_cast<const int32_t*>(p)); }
  static void multiply_add(V& sum, V query, V document) { ScreenInt::multiply_add(sum, query, document); }
  // Where Simd::multiplies_lanes.
  template <int lane, class On = ScreenInt>
  static void multiply_add_lane(V& sum, V query, V documents) {
    On::template multiply_add_lane<lane>(sum, query, documents);
  }

  // What sums are too large by, from the sums of a query's integers in either half of the k-words.
  static int32_t bias(int32_t first, int32_t second) {
    if (!ScreenInt::sums_halves) return kDocumentBias * (first + second);
    return int32_t((uint32_t(kDocumentBias * second) << 16) | (uint32_t(kDocumentBias * first) & 0xffff));
  }
};

}  // namespace
