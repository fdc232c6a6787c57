// Dot products in fp32: a k-word is one dimension.
#pragma once

namespace {

struct DotF32 {
  using V = Simd::F;
  using Lane = float;
  static constexpr int dims_of_word = 1;
  static constexpr bool rounds_floats = true;
  static constexpr int steps_of_round = kStepsOfRound;

  static const uint32_t* words(const QueryGroup& group) { return group.words_f32; }

  static V zero() { return Simd::zero(); }
  static V load(const void* p) { return Simd::load(static_cast<const float*>(p)); }
  static void store(Lane* p, V x) { Simd::store(p, x); }
  static V broadcast(const uint32_t* p) { return Simd::broadcast(*reinterpret_cast<const float*>(p)); }
  static void multiply_add(V& sum, V query, V document) { sum = Simd::multiply_add(query, document, sum); }
  // Where Simd::multiplies_lanes.
  template <int lane, class On = Simd>
  static void multiply_add_lane(V& sum, V query, V documents) {
    On::template multiply_add_lane<lane>(sum, query, documents);
  }
  static V maximum(V a, V b) { return Simd::maximum(a, b); }
  static V lowest() { return Simd::broadcast(-__builtin_inff()); }
};

}  // namespace
