// Gradients from the saved argmax. Each target row has one owner, which adds its contributions in a fixed order.
#pragma once

namespace {

template <class Element, class Dim>
[[gnu::always_inline]] inline void add_scaled_row(float* target, const Element* row, Dim dim, float scale) {
  const Simd::F factor = Simd::broadcast(scale);
  int k = 0;
  for (; k + Simd::width <= dim; k += Simd::width) {
    Simd::store(target + k, Simd::multiply_add(factor, Simd::load(row + k), Simd::load(target + k)));
  }
  if (k < dim) {
    const int n = dim - k;
    Simd::store_first(target + k,
                      Simd::multiply_add(factor, Simd::load_first(row + k, n), Simd::load_first(target + k, n)), n);
  }
}

template <class Element, class Index, bool scatter, class Dim>
inline void add_rows(const RowsJob job, Dim dim) {  // a copy, which what is written does not alias
  const Index* const winner = static_cast<const Index*>(job.winner);
  for (int64_t i = 0; i < job.count; ++i) {
    const int64_t token = winner[i];
    if (token < 0) continue;
    const int64_t from = scatter ? i : token;
    const int64_t to = scatter ? token : i;
    const float scale = job.inverse_norms ? job.gradient * job.inverse_norms[from] : job.gradient;
    const Element* row = contiguous_row<Element>(job.source + from * job.token_stride, job.dim_stride, dim, job.buffer);
    add_scaled_row(job.accumulator + to * dim, row, dim, scale);
  }
}

// With y = x / max(|x|, eps): dx = (dy - y <y, dy>) / |x| where |x| > eps, else dy / eps.
template <class Element>
inline void normalize_backward(float* gradient, const Element* row, int dim, float inverse_norm) {
  Simd::F products = Simd::zero();
  if (inverse_norm < 1.0f / kNormEpsilon) {
    int k = 0;
    for (; k + Simd::width <= dim; k += Simd::width)
      products = Simd::multiply_add(Simd::load(row + k), Simd::load(gradient + k), products);
    if (k < dim)
      products =
          Simd::multiply_add(Simd::load_first(row + k, dim - k), Simd::load_first(gradient + k, dim - k), products);
  }
  const float along = -Simd::sum(products) * inverse_norm * inverse_norm;
  add_scaled_row(gradient, row, dim, along);
  for (int k = 0; k < dim; ++k) gradient[k] *= inverse_norm;
}

inline bool all_zero(const float* row, int dim) {
  Simd::I bits = Simd::zero_integer();
  for_each_register(row, dim, [&](int, Simd::F x) { bits = Simd::maximum_unsigned(bits, Simd::absolute_bits(x)); });
  return Simd::largest_unsigned(bits) == 0;
}

template <class Element>
void finish_rows(const FinishJob& job) {
  for (int64_t i = 0; i < job.rows; ++i) {
    float* const gradient = job.accumulator + i * job.dim;
    // A row without a gradient may be padding, with anything in it.
    if (job.source && !all_zero(gradient, job.dim)) {
      const Element* row =
          contiguous_row<Element>(job.source + i * job.token_stride, job.dim_stride, job.dim, job.buffer);
      normalize_backward(gradient, row, job.dim, job.inverse_norms[i]);
    }
    Element* const out = reinterpret_cast<Element*>(job.out) + i * job.dim;
    if (reinterpret_cast<float*>(out) == gradient) continue;
    int k = 0;
    for (; k + Simd::width <= job.dim; k += Simd::width) Simd::store(out + k, Simd::load(gradient + k));
    if (k < job.dim) Simd::store_first(out + k, Simd::load_first(gradient + k, job.dim - k), job.dim - k);
  }
}

}  // namespace
