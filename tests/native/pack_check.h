// Rows to packed storage and back.
#pragma once

#include "inputs.h"

namespace {

class PackCheck {
 public:
  PackCheck(const std::string& isa, const Packed& source) : isa_(isa), source_(source), norms_(norms(source)) {}

  // Largest error met, as a fraction of what is allowed; above 1 something was printed.
  double run() {
    for (DType dtype : kDtypes) {
      for (bool normalize : {false, true}) {
        for (bool masked : {false, true}) check(dtype, normalize, masked);
      }
    }
    return worst_;
  }

 private:
  void check(DType dtype, bool normalize, bool masked) {
    std::vector<int64_t> offsets{0};
    std::vector<double> wanted, largest;
    for (int64_t j = 0; j < source_.count(); ++j) {
      largest.push_back(0.0);
      for (int64_t t = source_.offsets[size_t(j)]; t < source_.offsets[size_t(j) + 1]; ++t) {
        if (masked && !source_.mask[size_t(t)]) continue;
        for (int k = 0; k < source_.dim; ++k) {
          wanted.push_back(source_.row(t)[k] / (normalize ? norms_[size_t(t)] : 1.0));
          largest.back() = std::max(largest.back(), std::fabs(wanted.back()));
        }
      }
      offsets.push_back(int64_t(wanted.size()) / source_.dim);
    }
    std::vector<char> packed(wanted.size() * size_t(bytes_of(dtype)));
    std::vector<float> scales(size_t(source_.count()), 1.0f), widened(wanted.size());

    PackCall call;
    call.source = source_.view(masked);
    call.dtype = dtype;
    call.normalize = normalize;
    call.offsets = offsets.data();
    call.out = packed.data();
    call.scales = scales.data();
    call.threads = 2;
    const int64_t failed = pack(kernels(), call);
    expect("document that is not finite", dtype, double(failed), -1.0, 0.5, 0);

    UnpackCall back;
    back.source.dtype = dtype;
    back.source.dim = source_.dim;
    back.source.count = source_.count();
    back.source.data = packed.data();
    back.source.dim_stride = bytes_of(dtype);
    back.source.token_stride = source_.dim * bytes_of(dtype);
    back.source.offsets = offsets.data();
    back.source.scales = dtype == DType::i8 ? scales.data() : nullptr;
    back.out = widened.data();
    unpack(kernels(), back);

    for (size_t j = 0; j < scales.size(); ++j) {
      for (int64_t i = offsets[j] * source_.dim; i < offsets[j + 1] * source_.dim; ++i) {
        const double want = wanted[size_t(i)];
        const double steps = (source_.dim + 8) * kRoundoff_f32 * std::fabs(want);
        const double smallest = dtype != DType::f16 ? 1e-12 : emulated ? 0x1p-14 : 0x1p-25;
        const double allowed =
            steps + (dtype == DType::i8 ? 0.5001 * largest[j] / 127 : storage_roundoff(dtype) * std::fabs(want)) +
            smallest;
        const double value = load(packed.data(), i, dtype) * double(scales[j]);
        expect("packed value", dtype, value, want, allowed, i);
        expect("value of the way back", dtype, widened[size_t(i)], value, kRoundoff_f32 * std::fabs(value), i);
      }
    }
  }

  void expect(const char* what, DType dtype, double got, double want, double allowed, int64_t at) {
    const double error = std::fabs(got - want);
    if (error > 0.0 || std::isnan(error))
      worst_ = std::max(worst_, error <= allowed ? error / allowed : std::numeric_limits<double>::infinity());
    if (error <= allowed) return;
    std::printf("%s, %s to %s, d = %d: %s %lld is %.9g, want %.9g +- %.1g\n", isa_.c_str(),
                kDtypeNames[int(source_.dtype)], kDtypeNames[int(dtype)], source_.dim, what, static_cast<long long>(at),
                got, want, allowed);
  }

  const std::string& isa_;
  const Packed& source_;
  const std::vector<double> norms_;
  double worst_ = 0.0;
};

}  // namespace
