// The most multiply-adds that this instruction set can do, the tile's instructions on registers alone; and the traffic
// of packing without its arithmetic.
#pragma once

namespace {

template <class Dot>
[[gnu::noinline]] uint64_t run_multiply_adds(int64_t steps) {
  constexpr int chains = Simd::multiplies_lanes ? 24 : 12;  // latency 4 x 2 units, on ARM up to 4, with room
  typename Dot::V sum[chains];
  alignas(64) const uint32_t zeros[Simd::width] = {};
  typename Dot::V a = Dot::load(zeros), b = a;
  Simd::keep(a);  // else the products are known to be zero
#pragma GCC unroll 24
  for (int i = 0; i < chains; ++i) sum[i] = Dot::zero();
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < chains; ++i) {
      Dot::multiply_add(sum[i], a, b);
      Simd::keep(sum[i]);
      Simd::keep(b);
    }
  }
#pragma GCC unroll 24
  for (int i = 1; i < chains; ++i) sum[0] = Dot::maximum(sum[0], sum[i]);
  alignas(64) typename Dot::Lane sink[Simd::width];
  Dot::store(sink, sum[0]);
  __asm__ volatile("" : : "r"(sink) : "memory");
  return uint64_t(steps) * chains * Simd::width * Dot::dims_of_word * 2;
}

inline uint64_t peak_operations(Peak peak) {
  constexpr int64_t steps = 1 << 14;
#ifndef EDGECOLBERT_NO_FIXED_POINT
  if (peak == Peak::i16) return run_multiply_adds<DotI16>(steps);
#endif
#ifndef EDGECOLBERT_NO_INT8
  if (peak == Peak::i8) return run_multiply_adds<DotI8>(steps);
#endif
  return peak == Peak::f32 ? run_multiply_adds<DotF32>(steps) : 0;
}

constexpr int64_t kFloatsOfLine = 64 / int64_t(sizeof(float));

template <int ratio>
[[gnu::always_inline]] inline void move_run(const float* source, float* out, int64_t lines) {
  constexpr int floats = kFloatsOfLine, w = Simd::width;
  for (; lines >= ratio; lines -= ratio, source += ratio * floats, out += floats) {
    for (int k = 0; k < floats; k += w) {
      Simd::F sum = Simd::load(source + k);
#pragma GCC unroll 4
      for (int i = 1; i < ratio; ++i) sum = Simd::add(sum, Simd::load(source + i * floats + k));
      Simd::stream(out + k, sum);
    }
  }
  if constexpr (ratio > 1) {
    if (lines) move_run<ratio - 1>(source, out, lines);
  }
}

template <int ratio>
inline void move_runs(const float* source, float* out, const LineRun* runs, int64_t count) {
  for (const LineRun* run = runs; run < runs + count; ++run) {
    move_run<ratio>(source + run->source * kFloatsOfLine, out + run->out * kFloatsOfLine, run->lines);
  }
  Simd::finish_streams();
}

inline void move_lines(const float* source, float* out, const LineRun* runs, int64_t count, int ratio) {
  if (ratio == 1) return move_runs<1>(source, out, runs, count);
  ratio == 2 ? move_runs<2>(source, out, runs, count) : move_runs<4>(source, out, runs, count);
}

}  // namespace
