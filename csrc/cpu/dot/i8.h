// Dot products of int8: queries rounded to int8 token by token, documents as they are stored; products are summed in
// int32.
//
// The including file defines Int8 on its registers: dims_of_word dimensions of a k-word, and document_bias, which is
// added to document values on their way into the scratch where the instruction wants them unsigned. A lane's sums are
// then all too large by document_bias * (sum of the query's integers), which the maximum does not mind and which is
// taken off after it.
#pragma once

namespace {

// Sums stay below 255 * 127 * 2^16 < 2^31.
constexpr int kInt8Dimensions = 1 << 16;
constexpr float kSmallestInt8Peak = 2e-36f;  // 127 / x and x / 127 are normal numbers

struct DotI8 {
  using V = Simd::I;
  using Lane = int32_t;
  static constexpr int dims_of_word = Int8::dims_of_word;
  static constexpr bool rounds_floats = false;
  static constexpr int steps_of_round = 1;
  static constexpr int32_t kDocumentBias = Int8::document_bias;
  static constexpr uint32_t kElementBits = dims_of_word == 4 ? 0xff : 0xffff;

  // What sums are too large by, from the sums of a query's integers in either half of the k-words.
  static int32_t bias(int32_t first, int32_t second) { return kDocumentBias * (first + second); }

  static const uint32_t* words(const QueryGroup& group) { return group.words_i8; }

  static V zero() { return Simd::zero_integer(); }
  static V load(const void* p) { return Simd::load(static_cast<const int32_t*>(p)); }
  static void store(Lane* p, V x) { Simd::store(p, x); }
  static V broadcast(const uint32_t* p) { return Simd::broadcast(*reinterpret_cast<const int32_t*>(p)); }
  static void multiply_add(V& sum, V query, V document) { Int8::multiply_add(sum, query, document); }
  // Where Simd::multiplies_lanes.
  template <int lane, class On = Int8>
  static void multiply_add_lane(V& sum, V query, V documents) {
    On::template multiply_add_lane<lane>(sum, query, documents);
  }
  static V maximum(V a, V b) { return Simd::maximum(a, b); }
  static V lowest() { return Simd::broadcast(INT32_MIN); }
};

}  // namespace
