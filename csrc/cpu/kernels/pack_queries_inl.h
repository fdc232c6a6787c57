// Query tokens become lanes: one register row is transposed into [k-word][lane].
#pragma once

#include "margin_inl.h"

namespace {

// The query token in fp32, normalised where asked, filled up to whole registers.
template <class Element>
inline void widen_query(const char* data, int dim, int64_t dim_stride, bool normalize, float* out) {
  const Element* const row = contiguous_row<Element>(data, dim_stride, dim, out + round_up(dim, Simd::width));
  if (normalize) {
    normalize_row(row, dim, out);
  } else {
    for_each_register(row, dim, [&](int k, Simd::F x) { Simd::store(out + k, x); });
  }
}

inline bool admits_i16([[maybe_unused]] const Extent& extent, [[maybe_unused]] int dim) {
#ifdef EDGECOLBERT_NO_FIXED_POINT
  return false;
#else
  return dim <= kFixedPointDimensions && bits_to_float(extent.largest) <= kLargestFixedPoint &&
         extent.square_norm <= 1.05f;
#endif
}

// Not finite, or so small that 127 / |x| is infinite: fp32 knows what to do with it.
inline bool admits_i8([[maybe_unused]] const Extent& extent, [[maybe_unused]] int dim) {
#ifdef EDGECOLBERT_NO_INT8
  return false;
#else
  const float largest = bits_to_float(extent.largest);
  return dim <= kInt8Dimensions && (largest == 0.0f || (largest >= kSmallestInt8Peak && largest <= 1e30f));
#endif
}

template <class Element>
bool admits_integers(const AdmitJob& job) {
  for (int64_t i = 0; i < job.count; ++i) {
    widen_query<Element>(job.rows[i], job.dim, job.dim_stride, job.normalize, job.buffer);
    const Extent extent(job.buffer, job.dim);
    if (!(job.integer == Integer::i8 ? admits_i8(extent, job.dim) : admits_i16(extent, job.dim))) return false;
  }
  return true;
}

#ifndef EDGECOLBERT_NO_FIXED_POINT
inline uint32_t to_fixed_point(float x) { return uint16_t(int16_t(__builtin_rintf(x * kFixedPointScale))); }

inline void pack_fixed_point(const PackJob& job, const float* row, int lane) {
  for (int word = 0; word < (job.dim + 1) / 2; ++word) {
    int low, high;
    DotI16::dimensions(word, job.dim, &low, &high);
    const uint32_t upper = high < 0 ? 0 : to_fixed_point(row[high]);
    job.words_i16[word * job.word_stride + lane] = to_fixed_point(row[low]) | upper << 16;
  }
}
#endif

#ifndef EDGECOLBERT_NO_INT8
// A query token is the scale that is returned times integers. They are in [-127, 127], a value of `limit` being 127.
inline float round_to_int8(const float* row, int dim, float limit, I8* integers) {
  const Simd::F inverse = Simd::broadcast(limit > 0.0f ? 127.0f / limit : 0.0f);
  for_each_register(row, dim, [&](int k, Simd::F x) { Simd::store(integers + k, Simd::multiply(x, inverse)); });
  return limit / 127.0f;
}

template <class Dot>
inline void pack_int8(const PackJob& job, const I8* integers, float scale, int lane) {
  constexpr int dims = Dot::dims_of_word;
  int32_t sums_i32[2] = {0, 0};  // of the halves of every k-word
  for (int k = 0; k < job.dim; k += dims) {
    uint32_t word = 0;
    for (int i = 0; i < dims && k + i < job.dim; ++i) {
      const int32_t value = integers[k + i].value;
      sums_i32[2 * i / dims] += value;
      word |= (uint32_t(value) & Dot::kElementBits) << (32 / dims * i);
    }
    job.words_i8[k / dims * job.word_stride + lane] = word;
  }
  job.biases[lane] = Dot::bias(sums_i32[0], sums_i32[1]);
  job.scales[lane] = scale;
}

template <class Dot>
inline void clear_int8(const PackJob& job, int lane) {
  for (int k = 0; k < job.dim; k += Dot::dims_of_word) job.words_i8[k / Dot::dims_of_word * job.word_stride + lane] = 0;
  job.biases[lane] = 0;
  job.scales[lane] = 0.0f;
}
#endif

template <class Element>
void pack_register(PackJob& job) {
  const int dim = job.dim;
  float* row_f32 = job.buffer;
  Simd::I peak_bits = Simd::zero_integer();
  job.screened = true;
  for (int lane = 0; lane < Simd::width; ++lane) {
    if (!job.rows[lane]) {
      for (int k = 0; k < dim; ++k) job.words_f32[k * job.word_stride + lane] = 0;
      if (job.words_i16) {
        for (int k = 0; k < dim; k += 2) job.words_i16[k / 2 * job.word_stride + lane] = 0;
      }
#ifndef EDGECOLBERT_NO_INT8
      if (job.margins) {
        clear_int8<DotScreen>(job, lane);
        clear_margin(job, lane);
      } else if (job.words_i8) {
        clear_int8<DotI8>(job, lane);
      }
#endif
      continue;
    }
    widen_query<Element>(job.rows[lane], dim, job.dim_stride, job.normalize, row_f32);
    for_each_register(row_f32, dim,
                      [&](int, Simd::F x) { peak_bits = Simd::maximum_unsigned(peak_bits, Simd::absolute_bits(x)); });
    for (int k = 0; k < dim; ++k) job.words_f32[k * job.word_stride + lane] = float_to_bits(row_f32[k]);
#ifndef EDGECOLBERT_NO_FIXED_POINT
    if (job.words_i16) pack_fixed_point(job, row_f32, lane);
#endif
    if (job.token_rows) {
      const int64_t stride = round_up(dim, Simd::width);
      memcpy(job.token_rows + lane * stride, row_f32, size_t(stride) * sizeof(float));
    }
#ifndef EDGECOLBERT_NO_INT8
    if (job.words_i8) {
      const Extent extent(row_f32, dim);
      I8* const integers = reinterpret_cast<I8*>(row_f32 + round_up(dim, Simd::width));
      if (job.margins) {
        const float scale = round_to_int8(row_f32, dim, screened_limit(row_f32, dim, extent), integers);
        job.screened &= set_margin(job, row_f32, extent, integers, scale, lane);
        pack_int8<DotScreen>(job, integers, scale, lane);
      } else {
        pack_int8<DotI8>(job, integers, round_to_int8(row_f32, dim, bits_to_float(extent.largest), integers), lane);
      }
    }
#endif
  }
  job.peak = bits_to_float(Simd::largest_unsigned(peak_bits));
}

}  // namespace
