// The screen cannot be seen: scores and winners with it have the bits that they have without.
#pragma once

#include "inputs.h"

namespace {

class ScreenCheck {
 public:
  ScreenCheck(const std::string& isa, DType dtype, int dim, Random& random)
      : isa_(isa),
        queries_(dtype == DType::i8 ? DType::f32 : dtype, dim, {31, 1, 7, 64, 33, 130}, random),
        documents_(dtype, dim, {47, 300, 128, 33, 200, 64}, random) {}

  // False: something was printed.
  bool run() {
    // Documents that many query tokens meet are measured more closely.
    for (int64_t num_queries : {int64_t(1), queries_.count()}) {
      compare(num_queries, false, false);
      compare(num_queries, true, false);
      compare(num_queries, true, true);
    }
    if (documents_.dtype != DType::i8) {
      spoiled_ = true;
      for (float x : {1e-4f, 1.999f, INFINITY, NAN}) {
        // Some tokens of every document but the last.
        for (int64_t t = 5; t < documents_.offsets[documents_.offsets.size() - 2]; t += 37) documents_.set(t, x);
        compare(1, false, false);
      }
    }
    return same_;
  }

  // Of documents with ordinary values.
  Screened screened_documents() const { return screened_; }

 private:
  struct Result {
    std::vector<float> scores;
    std::vector<int32_t> winners;
    Screened screened;
  };

  Result score(int64_t num_queries, bool masked, bool normalize, bool screen) const {
    Result result;
    result.scores.assign(size_t(num_queries * documents_.count()), 0.0f);
    result.winners.assign(size_t(queries_.offsets[size_t(num_queries)] * documents_.count()), 0);
    const Screened before = screened();
    ForwardCall call;
    call.queries = queries_.view(masked);
    call.queries.count = num_queries;
    call.documents = documents_.view(masked);
    call.out = result.scores.data();
    call.winners = {result.winners.data(), 4};
    call.normalize = normalize;
    call.screen = screen;
    forward(kernels(), call);
    const Screened after = screened();
    result.screened = {after.tried - before.tried, after.done - before.done};
    return result;
  }

  void compare(int64_t num_queries, bool masked, bool normalize) {
    const Result with = score(num_queries, masked, normalize, true),
                 without = score(num_queries, masked, normalize, false);
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
    };
    const auto fail = [&](const char* what) {
      same_ = false;
      std::printf("%s, %s, d = %d, %lld queries%s%s: %s\n", isa_.c_str(), kDtypeNames[int(documents_.dtype)],
                  documents_.dim, static_cast<long long>(num_queries), masked ? ", masks" : "",
                  normalize ? ", normalize" : "", what);
    };
    if (!same(with.scores, without.scores)) fail("the screen changes scores");
    if (!same(with.winners, without.winners)) fail("the screen changes winners");
    if (without.screened.tried) fail("screened unasked");
    if (!spoiled_) screened_ = {screened_.tried + with.screened.tried, screened_.done + with.screened.done};
  }

  const std::string& isa_;
  const Packed queries_;
  Packed documents_;
  bool spoiled_ = false, same_ = true;
  Screened screened_{0, 0};
};

}  // namespace
