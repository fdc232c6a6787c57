// Rows of token vectors: a contiguous view of any row, and widening to fp32.
#pragma once

namespace {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The row at `data` as contiguous elements, through `buffer` where its dimensions are strided.
template <class Element>
inline const Element* contiguous_row(const char* data, int64_t dim_stride, int dim, void* buffer) {
  if (dim_stride == int64_t(sizeof(Element)) || dim <= 1) return reinterpret_cast<const Element*>(data);
  Element* out = static_cast<Element*>(buffer);
  for (int k = 0; k < dim; ++k) memcpy(out + k, data + k * dim_stride, sizeof(Element));
  return out;
}

// visit(k, x) for every register of a row; the last one is filled up with zeros.
// Must be inlined: otherwise what `visit` captures travels through memory at every register.
template <class Element, class Visit>
[[gnu::always_inline]] inline void for_each_register(const Element* row, int dim, Visit visit) {
  int k = 0;
  for (; k + 2 * Simd::width <= dim; k += 2 * Simd::width) {
    visit(k, Simd::load(row + k));
    visit(k + Simd::width, Simd::load(row + k + Simd::width));
  }
  for (; k + Simd::width <= dim; k += Simd::width) visit(k, Simd::load(row + k));
  if (k < dim) visit(k, Simd::load_first(row + k, dim - k));
}

// |row|^2 as the sum of the lanes.
template <class Element>
[[gnu::always_inline]] inline Simd::F square_lanes(const Element* row, int dim) {
  Simd::F squares = Simd::zero();
  for_each_register(row, dim, [&](int, Simd::F x) { squares = Simd::multiply_add(x, x, squares); });
  return squares;
}

[[gnu::always_inline]] inline float inverse_norm_of(Simd::F squares, float epsilon = kNormEpsilon) {
  const float norm = __builtin_sqrtf(Simd::sum(squares));
  return 1.0f / (norm <= epsilon ? epsilon : norm);  // a NaN stays
}

// The same bits, of 1 or 4 rows.
[[gnu::always_inline]] inline void inverse_norms_of(const Simd::F (&squares)[1], float* out) {
  out[0] = inverse_norm_of(squares[0]);
}
[[gnu::always_inline]] inline void inverse_norms_of(const Simd::F (&squares)[4], float* out) {
  const Four sums = Simd::sums(squares), epsilon = {kNormEpsilon, kNormEpsilon, kNormEpsilon, kNormEpsilon};
  Four norms;
  for (int r = 0; r < 4; ++r) norms[r] = __builtin_sqrtf(sums[r]);
  const Four inverse = 1.0f / (norms <= epsilon ? epsilon : norms);
  memcpy(out, &inverse, sizeof inverse);
}

template <class Element>
[[gnu::always_inline]] inline float inverse_norm(const Element* row, int dim, float epsilon = kNormEpsilon) {
  return inverse_norm_of(square_lanes(row, dim), epsilon);
}

template <class Element>
void inverse_norms(const NormsJob& job) {
  for (int64_t i = 0; i < job.rows; ++i) {
    const char* data = job.source + i * job.token_stride;
    job.inverse_norms[i] = inverse_norm(contiguous_row<Element>(data, job.dim_stride, job.dim, job.buffer), job.dim);
  }
}

// out = row / max(|row|, eps) in fp32, filled up to whole registers.
template <class Element>
inline void normalize_row(const Element* row, int dim, float* out, float epsilon = kNormEpsilon) {
  const Simd::F scale = Simd::broadcast(inverse_norm(row, dim, epsilon));
  for_each_register(row, dim, [&](int k, Simd::F x) { Simd::store(out + k, Simd::multiply(x, scale)); });
}

// Calls function(Element{}) with the element type of a float dtype.
template <class Function>
inline void with_float(DType dtype, Function function) {
  switch (dtype) {
    case DType::f32:
      return function(float{});
    case DType::f16:
      return function(F16{});
    case DType::bf16:
      return function(BF16{});
    case DType::i8:
      return;
  }
}

// With the element type of any dtype.
template <class Function>
inline void with_element(DType dtype, Function function) {
  if (dtype == DType::i8) return function(I8{});
  with_float(dtype, function);
}

template <int n>
struct Constant {
  constexpr operator int() const { return n; }
};

// Calls function(dim) with a constant for the usual dimensions, whose loops then have no counter.
template <class Function>
[[gnu::always_inline]] inline void with_dim(int dim, Function function) {
  if (dim == 48) return function(Constant<48>());
  if (dim == 64) return function(Constant<64>());
  if (dim == 96) return function(Constant<96>());
  if (dim == 128) return function(Constant<128>());
  function(dim);
}

}  // namespace
