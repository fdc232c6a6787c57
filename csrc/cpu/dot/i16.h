// Dot products in fixed point: a k-word is two dimensions in int16, see fixed_point.h.
//
// Dimensions are paired so that a document register is rounded without a shuffle: of each 2 * width dimensions, word j
// holds j and width + j; what is left over is paired in order.
//
// The including file defines Int16 on its registers.
#pragma once

namespace {

struct DotI16 {
  using V = Simd::I;
  using Lane = int32_t;
  static constexpr int dims_of_word = 2;
  static constexpr bool rounds_floats = true;
  static constexpr int steps_of_round = 1;

  static const uint32_t* words(const QueryGroup& group) { return group.words_i16; }

  static V zero() { return Simd::zero_integer(); }
  static V load(const void* p) { return Simd::load(static_cast<const int32_t*>(p)); }
  static void store(Lane* p, V x) { Simd::store(p, x); }
  static V broadcast(const uint32_t* p) { return Simd::broadcast(*reinterpret_cast<const int32_t*>(p)); }
  static void multiply_add(V& sum, V query, V document) { Int16::multiply_add(sum, query, document); }
  static V maximum(V a, V b) { return Simd::maximum(a, b); }
  static V lowest() { return Simd::broadcast(INT32_MIN); }

  // Dimensions of word `word` of a token; -1 where there is none.
  static void dimensions(int word, int dim, int* low, int* high) {
    const int paired = dim / (2 * Simd::width) * (2 * Simd::width);
    const int group = word / Simd::width * (2 * Simd::width);
    if (group < paired) {
      *low = group + word % Simd::width;
      *high = *low + Simd::width;
    } else {
      *low = 2 * word;
      *high = 2 * word + 1 < dim ? 2 * word + 1 : -1;
    }
  }
};

}  // namespace
