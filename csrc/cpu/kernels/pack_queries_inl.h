// Query tokens become lanes: one register row is transposed into [k-word][lane].
#pragma once

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

#ifndef EDGECOLBERT_NO_FIXED_POINT
template <class Element>
bool admits_fixed_point(const AdmitJob& job) {
  if (job.dim > kFixedPointDimensions) return false;
  for (int64_t i = 0; i < job.count; ++i) {
    widen_query<Element>(job.rows[i], job.dim, job.dim_stride, job.normalize, job.buffer);
    Simd::F squares = Simd::zero();
    Simd::I largest = Simd::zero_integer();
    for_each_register(job.buffer, job.dim, [&](int, Simd::F x) {
      largest = Simd::maximum_unsigned(largest, Simd::absolute_bits(x));
      squares = Simd::multiply_add(x, x, squares);
    });
    if (!(bits_to_float(Simd::largest_unsigned(largest)) <= kLargestFixedPoint && Simd::sum(squares) <= 1.05f))
      return false;
  }
  return true;
}

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

template <class Element>
void pack_register(PackJob& job) {
  const int dim = job.dim;
  float* row_f32 = job.buffer;
  Simd::I peak_bits = Simd::zero_integer();
  for (int lane = 0; lane < Simd::width; ++lane) {
    if (!job.rows[lane]) {
      for (int k = 0; k < dim; ++k) job.words_f32[k * job.word_stride + lane] = 0;
      if (job.words_i16) {
        for (int k = 0; k < dim; k += 2) job.words_i16[k / 2 * job.word_stride + lane] = 0;
      }
      continue;
    }
    widen_query<Element>(job.rows[lane], dim, job.dim_stride, job.normalize, row_f32);
    for_each_register(row_f32, dim,
                      [&](int, Simd::F x) { peak_bits = Simd::maximum_unsigned(peak_bits, Simd::absolute_bits(x)); });
    for (int k = 0; k < dim; ++k) job.words_f32[k * job.word_stride + lane] = float_to_bits(row_f32[k]);
#ifndef EDGECOLBERT_NO_FIXED_POINT
    if (job.words_i16) pack_fixed_point(job, row_f32, lane);
#endif
  }
  job.peak = bits_to_float(Simd::largest_unsigned(peak_bits));
}

}  // namespace
