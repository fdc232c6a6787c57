// What the checks share: token rows in every storage, and the same values in float.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/driver.h"

using namespace edgecolbert;

namespace {

const int kDims[] = {1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 96, 128, 129};
const std::vector<int64_t> kQueryLengths = {0, 1, 2, 7, 11, 12, 13, 31, 33};
const std::vector<int64_t> kDocumentLengths = {0, 1, 2, 11, 12, 13, 31, 33, 300};
const DType kDtypes[] = {DType::f32, DType::f16, DType::bf16, DType::i8};  // of documents
const char* const kDtypeNames[] = {"f32", "f16", "bf16", "i8"};

bool emulated = false;

constexpr double kRoundoff_f32 = 0x1p-24;
// Unit roundoff of a float storage type.
double storage_roundoff(DType dtype) {
  return dtype == DType::f32 ? kRoundoff_f32 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

struct Random {
  uint64_t state;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 33);
  }
  float within(float limit) { return (float(bits()) / 0x1p30f - 1.0f) * limit; }
};

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// `x` cut to what the storage type holds. For fp16: normal numbers below 2, which is all this file makes.
float representable(float x, DType dtype) {
  if (dtype == DType::f16 && std::fabs(x) < 0x1p-14f) return 0.0f;
  return bits_float(float_bits(x) & (dtype == DType::f32 ? ~0u : dtype == DType::f16 ? 0xffffe000u : 0xffff0000u));
}

uint16_t stored_16(float x, DType dtype) {
  const uint32_t bits = float_bits(x);
  if (dtype == DType::bf16 || x == 0.0f) return uint16_t(bits >> 16);
  return uint16_t((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
}

double load_16(uint16_t bits, DType dtype) {
  if (dtype == DType::bf16) return bits_float(uint32_t(bits) << 16);
  const int exponent = bits >> 10 & 31;
  const double magnitude = exponent ? std::ldexp(1024 + (bits & 1023), exponent - 25) : std::ldexp(bits & 1023, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Sequences back to back, in storage and as the same values in float.
struct Packed {
  DType dtype;
  int dim;
  std::vector<int64_t> offsets{0};
  std::vector<float> values;
  std::vector<uint8_t> bytes, mask;
  std::vector<float> scales;  // of int8: powers of two, so that values are exact

  Packed(DType type, int d, const std::vector<int64_t>& lengths, Random& random) : dtype(type), dim(d) {
    for (int64_t length : lengths) offsets.push_back(offsets.back() + length);
    const float limit = 1.0f / std::sqrt(float(d));  // rows of norm <= 1, where fixed point applies
    for (int64_t j = 0; j < count(); ++j) {
      if (type == DType::i8) scales.push_back(j % 2 ? 0x1p-7f : 0x1p-8f);
      for (int64_t i = 0; i < length(j) * d; ++i) append(random.within(limit));
    }
    for (int64_t i = 0; i < tokens(); ++i) mask.push_back(random.bits() % 3 != 0);
  }

  size_t element_bytes() const { return size_t(bytes_of(dtype)); }
  int64_t tokens() const { return offsets.back(); }
  int64_t count() const { return int64_t(offsets.size()) - 1; }
  int64_t length(int64_t j) const { return offsets[size_t(j) + 1] - offsets[size_t(j)]; }
  const float* row(int64_t token) const { return &values[size_t(token * dim)]; }

  // The first value of a token of floats, in storage alone.
  void set(int64_t token, float x) {
    uint8_t raw[4];
    const uint16_t half = std::isfinite(x)       ? stored_16(representable(x, dtype), dtype)
                          : dtype == DType::bf16 ? uint16_t(float_bits(x) >> 16)
                                                 : uint16_t(float_bits(x) >> 16 & 0xfe00);
    dtype == DType::f32 ? std::memcpy(raw, &x, 4) : std::memcpy(raw, &half, 2);
    std::copy(raw, raw + element_bytes(), &bytes[size_t(token * dim) * element_bytes()]);
  }

  Sequences view(bool masked) const {
    Sequences s;
    s.dtype = dtype;
    s.dim = dim;
    s.count = count();
    s.data = reinterpret_cast<const char*>(bytes.data());
    s.dim_stride = int64_t(element_bytes());
    s.token_stride = dim * s.dim_stride;
    s.offsets = offsets.data();
    s.scales = scales.empty() ? nullptr : scales.data();
    s.mask = masked ? mask.data() : nullptr;
    return s;
  }

 private:
  void append(float x) {
    uint8_t raw[4];
    if (dtype == DType::i8) {
      const int8_t integer = int8_t(std::rint(x * 127.0f));
      x = float(integer) * scales.back();
      std::memcpy(raw, &integer, 1);
    } else if (dtype == DType::f32) {
      std::memcpy(raw, &x, 4);
    } else {
      x = representable(x, dtype);
      const uint16_t half = stored_16(x, dtype);
      std::memcpy(raw, &half, 2);
    }
    values.push_back(x);
    bytes.insert(bytes.end(), raw, raw + element_bytes());
  }
};

// Element i of rows in storage.
double load(const char* rows, int64_t i, DType dtype) {
  if (dtype == DType::i8) return double(reinterpret_cast<const int8_t*>(rows)[i]);
  if (dtype == DType::f32) {
    float value_f32;
    std::memcpy(&value_f32, rows + i * 4, 4);
    return value_f32;
  }
  uint16_t bits;
  std::memcpy(&bits, rows + i * 2, 2);
  return load_16(bits, dtype);
}

double dot(const float* a, const float* b, int dim) {
  double sum = 0.0;
  for (int k = 0; k < dim; ++k) sum += double(a[k]) * b[k];
  return sum;
}

std::vector<double> norms(const Packed& sequences) {
  std::vector<double> out;
  for (int64_t t = 0; t < sequences.tokens(); ++t) {
    out.push_back(std::max(std::sqrt(dot(sequences.row(t), sequences.row(t), sequences.dim)), 1e-12));
  }
  return out;
}

}  // namespace
