// Storage types: a number format is a type, and a register family knows how to load and store it.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct F16 {
  uint16_t bits;
};

struct BF16 {
  uint16_t bits;
};

struct I8 {
  int8_t value;
};

typedef float Four __attribute__((vector_size(16)));

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }

inline float widen(BF16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float widen(I8 value) { return float(value.value); }

inline float widen(F16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Multiplying by 2^-24 is exact and, unlike shifting the exponent, right for subnormals.
  if (magnitude < 0x0400u) return bits_to_float(sign | float_to_bits(float(magnitude) * 5.9604644775390625e-08f));
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
}

inline void narrow(float value, float* out) { *out = value; }

// |value| <= 127
inline void narrow(float value, I8* out) { out->value = int8_t(__builtin_rintf(value)); }

inline void narrow(float value, BF16* out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = uint16_t(bits >> 16 | 0x40u);
    return;
  }
  out->bits = uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void narrow(float value, F16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    out->bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal in fp16: let the adder of an exponent of 2^-1 round
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out->bits = uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
  } else {
    out->bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
  }
}

}  // namespace
