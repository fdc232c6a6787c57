// int8 on NEON: sdot (one instruction for 16 multiply-adds) of the dot product extension. Without it fp32 is as fast.
#pragma once

#ifdef __ARM_FEATURE_DOTPROD

namespace {

struct Int8 {
  static constexpr int dims_of_word = 4;
  static constexpr int32_t document_bias = 0;
  static void multiply_add(int32x4_t& sum, int32x4_t query, int32x4_t document) {
    sum = vdotq_s32(sum, vreinterpretq_s8_s32(query), vreinterpretq_s8_s32(document));
  }
  // With the k-word in `lane` of those of a document token.
  template <int lane>
  static void multiply_add_lane(int32x4_t& sum, int32x4_t query, int32x4_t documents) {
    // Left to themselves compilers hoist loads, and run out of registers.
    __asm__("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(query), "w"(documents), "i"(lane));
  }
  // dims_of_word * width bytes of a document token become k-words.
  static int32x4_t to_words(const I8* p) { return vreinterpretq_s32_s8(vld1q_s8(&p->value)); }
  // 1 to 16 bytes; memory past them is not touched.
  static int32x4_t to_words_first(const I8* p, int n) {
    I8 copy[16] = {};
    memcpy(copy, p, size_t(n));
    return to_words(copy);
  }
};

}  // namespace

#include "i8.h"
#else
#include "no_i8.h"
#endif
