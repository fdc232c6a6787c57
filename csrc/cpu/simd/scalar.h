// The baseline of any CPU: four lanes in the compiler's own vector type, which becomes SSE2, NEON or plain scalar code.
#pragma once

#include "storage.h"

namespace {

struct Simd {
  static constexpr int width = 4;
  static constexpr bool multiplies_lanes = false;
  static constexpr bool specialises = false;  // packing has loops for usual shapes, beside those for any
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));

  template <class Element>
  static F load(const Element* p) {
    return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }
  // n < width elements, zeros behind them; memory past them is not touched.
  template <class Element>
  static F load_first(const Element* p, int n) {
    return F{n > 0 ? widen(p[0]) : 0.0f, n > 1 ? widen(p[1]) : 0.0f, n > 2 ? widen(p[2]) : 0.0f, 0.0f};
  }
  template <class Element>
  static void store(Element* p, F x) {
    for (int i = 0; i < width; ++i) narrow(x[i], p + i);
  }
  template <class Element>
  static void store_two(Element* p, F x, F y) {
    store(p, x);
    store(p + width, y);
  }
  template <class Element>
  static void store_first(Element* p, F x, int n) {
    for (int i = 0; i < n; ++i) narrow(x[i], p + i);
  }

  static constexpr bool streams = false;
  template <class Element>
  static constexpr int64_t stream_bytes = 1;
  template <class Element>
  static void stream(Element* p, F x) {
    store(p, x);
  }
  template <class Element>
  static void stream_two(Element* p, F x, F y) {
    store_two(p, x, y);
  }
  template <class Element>
  static void stream_copy(Element* out, const Element* p) {
    memcpy(out, p, width * sizeof(Element));
  }
  static void finish_streams() {}

  // Hides a value from the optimiser while it stays where it is.
  template <class V>
  static void keep(V& x) {
#if defined(__SSE2__)
    __asm__("" : "+x"(x));
#else
    __asm__("" : "+m"(x));
#endif
  }

  static F zero() { return F{}; }
  static F broadcast(float x) { return F{x, x, x, x}; }
  static F add(F a, F b) { return a + b; }
  static F subtract(F a, F b) { return a - b; }
  static F multiply(F a, F b) { return a * b; }
  static F multiply_add(F a, F b, F c) { return a * b + c; }
  static F maximum(F a, F b) { return from_bits(select(I(a > b), bits(a), bits(b))); }
  static float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }

  static Four sums(const F (&x)[4]) { return Four{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3])}; }

  static I zero_integer() { return I{}; }
  static I broadcast(int32_t x) { return I{x, x, x, x}; }
  static I load(const int32_t* p) {
    I x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(int32_t* p, I x) { memcpy(p, &x, sizeof x); }
  static I add(I a, I b) { return a + b; }
  static I maximum_unsigned(I a, I b) { return select(I(U(a) > U(b)), a, b); }
  static uint32_t largest_unsigned(I x) {
    uint32_t largest = 0;
    for (int i = 0; i < width; ++i) largest = uint32_t(x[i]) > largest ? uint32_t(x[i]) : largest;
    return largest;
  }
  static I bits(F x) { return I(x); }
  static F from_bits(I x) { return F(x); }
  static I absolute_bits(F x) { return bits(x) & 0x7fffffff; }

  static I where_equal(F a, F b, I yes, I no) { return select(I(a == b), yes, no); }
  static void take_greater(F& best, I& index, F value, I candidate) {
    take(I(value > best), best, index, value, candidate);
  }
  // As above, and a NaN beats everything but an earlier NaN.
  static void take_greater_or_nan(F& best, I& index, F value, I candidate) {
    take(~I(value <= best) & I(best == best), best, index, value, candidate);
  }

 private:
  static I select(I mask, I a, I b) { return (a & mask) | (b & ~mask); }
  static void take(I greater, F& best, I& index, F value, I candidate) {
    best = from_bits(select(greater, bits(value), bits(best)));
    index = select(greater, candidate, index);
  }
};

}  // namespace
