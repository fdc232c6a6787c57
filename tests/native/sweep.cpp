// Every instruction set that this CPU runs against plain double loops, at every tail, without Python: for emulators and
// cross-compiled builds, which have none.
//
//   native_sweep [--emulated] [isa ...]
//
// Named instruction sets must be exactly those that can run here; then each that runs is swept and gets one line. The
// exit status is 1 when a score, an argmax, a gradient or a packed value is off, or the screen changes one. --emulated
// allows for subnormal fp16 gradients being flushed to zero: vcvtps2ph ignores MXCSR.FTZ on hardware, qemu 7.2 does
// not.

#include "inputs.h"
#include "pack_check.h"
#include "screen_check.h"

namespace {

// One set of inputs and what every check of it needs.
struct Inputs {
  Packed queries, documents;
  std::vector<double> query_norms, document_norms;
  std::vector<double> dots;  // [query tokens, document tokens]

  Inputs(DType dtype, int dim, Random& random)
      : queries(dtype == DType::i8 ? DType::f32 : dtype, dim, kQueryLengths, random),
        documents(dtype, dim, kDocumentLengths, random),
        query_norms(norms(queries)),
        document_norms(norms(documents)) {
    for (int64_t i = 0; i < queries.tokens(); ++i) {
      for (int64_t j = 0; j < documents.tokens(); ++j) dots.push_back(dot(queries.row(i), documents.row(j), dim));
    }
  }
};

struct Variant {
  const char* name;
  bool fixed_point, masked, masked_is_zero, normalize;
};

const Variant kVariants[] = {
    {"exact", false, false, false, false},       {"fast", true, false, false, false},
    {"exact, masks", false, true, false, false}, {"fast, masks", true, true, false, false},
    {"zero masks", false, true, true, false},    {"normalize", false, true, false, true},
    {"fast, normalize", true, true, true, true},
};

class Check {
 public:
  Check(const std::string& isa, const Inputs& inputs, const Variant& variant)
      : isa_(isa),
        inputs_(inputs),
        queries_(inputs.queries),
        documents_(inputs.documents),
        variant_(variant),
        query_norms_(variant.normalize ? inputs.query_norms : std::vector<double>(size_t(queries_.tokens()), 1.0)),
        document_norms_(variant.normalize ? inputs.document_norms
                                          : std::vector<double>(size_t(documents_.tokens()), 1.0)) {}

  // Largest error met, as a fraction of what is allowed; above 1 something was printed.
  double run(Random& random) {
    forward_and_compare();
    if (documents_.dtype == DType::i8) return worst_;  // no gradient goes through its rounding
    std::vector<float> gradient(scores_.size());
    for (float& g : gradient) g = random.within(1.0f);
    backward_and_compare(gradient);
    return worst_;
  }

 private:
  int64_t pair(int64_t q, int64_t d) const { return q * documents_.count() + d; }
  const int32_t* winners(int64_t q, int64_t d) const {
    return &winners_[size_t(queries_.offsets[size_t(q)] * documents_.count() + d * queries_.length(q))];
  }

  double similarity(int64_t query_token, int64_t document_token) const {
    const double dot = inputs_.dots[size_t(query_token * documents_.tokens() + document_token)];
    return dot / (query_norms_[size_t(query_token)] * document_norms_[size_t(document_token)]);
  }

  // Bound on the error of one similarity of vectors whose norms are at most 1.
  double similarity_error() const {
    const double rounded = (queries_.dim + 8) * kRoundoff_f32;
    // A query's |x| <= 1 / sqrt(d) is rounded by at most |x| / 254, and |x|_1 <= sqrt(d) |x|_2.
    if (documents_.dtype == DType::i8) return variant_.fixed_point ? rounded + 1.01 / 254 : rounded;
    // Q15 rounds every element by at most 2^-16.
    return variant_.fixed_point ? rounded + 2.5 * std::sqrt(double(queries_.dim)) * 0x1p-16 : rounded;
  }

  void expect(const char* what, double got, double want, double allowed, int64_t at) {
    const double error = std::fabs(got - want);
    worst_ = std::max(worst_, std::isfinite(error) ? error / allowed : std::numeric_limits<double>::infinity());
    if (error <= allowed) return;
    std::printf("%s, %s, d = %d, %s: %s %lld is %.9g, want %.9g +- %.1g\n", isa_.c_str(),
                kDtypeNames[int(documents_.dtype)], queries_.dim, variant_.name, what, static_cast<long long>(at), got,
                want, allowed);
  }

  void forward_and_compare() {
    scores_.assign(size_t(queries_.count() * documents_.count()), NAN);
    winners_.assign(size_t(queries_.tokens() * documents_.count()), 12345);

    ForwardCall call;
    call.queries = queries_.view(variant_.masked);
    call.documents = documents_.view(variant_.masked);
    call.out = scores_.data();
    call.winners = {winners_.data(), 4};
    call.fixed_point = variant_.fixed_point;
    call.masked_is_zero = variant_.masked_is_zero;
    call.normalize = variant_.normalize;
    call.threads = 2;
    forward(kernels(), call);

    for (int64_t q = 0; q < queries_.count(); ++q) {
      for (int64_t d = 0; d < documents_.count(); ++d) compare_pair(q, d);
      compare_alone(call, q);
    }
  }

  // A query alone fills other registers, and has the same bits.
  void compare_alone(ForwardCall call, int64_t q) {
    std::vector<float> scores(size_t(documents_.count()), NAN);
    call.queries.count = 1;
    call.queries.offsets += q;
    call.out = scores.data();
    call.winners = {};
    forward(kernels(), call);
    for (int64_t d = 0; d < documents_.count(); ++d)
      expect("score alone", scores[size_t(d)], scores_[size_t(pair(q, d))], 0.0, pair(q, d));
  }

  void compare_pair(int64_t q, int64_t d) {
    double score = 0.0;
    for (int64_t i = 0; i < queries_.length(q); ++i) {
      const int64_t token = queries_.offsets[size_t(q)] + i;
      const int64_t winner = winners(q, d)[i];
      double best = -std::numeric_limits<double>::infinity(), won = NAN;
      if (!variant_.masked || queries_.mask[size_t(token)]) {
        for (int64_t j = 0; j < documents_.length(d); ++j) {
          const int64_t other = documents_.offsets[size_t(d)] + j;
          const bool kept = !variant_.masked || documents_.mask[size_t(other)];
          if (!kept && !variant_.masked_is_zero) continue;
          const double value = kept ? similarity(token, other) : 0.0;
          best = std::max(best, value);
          if (kept && j == winner) won = value;
          if (!kept && winner == -1) won = 0.0;
        }
      }
      if (std::isinf(best)) {
        expect("argmax of no token", double(winner), -1.0, 0.5, token);
        continue;
      }
      score += best;
      expect("similarity at the argmax", won, best, 2.0 * similarity_error(), token);
    }
    const double terms = double(queries_.length(q)) + 1.0;
    expect("score", scores_[size_t(pair(q, d))], score, terms * (similarity_error() + terms * kRoundoff_f32),
           pair(q, d));
  }

  void backward_and_compare(const std::vector<float>& gradient) {
    std::vector<char> grad_queries(queries_.bytes.size()), grad_documents(documents_.bytes.size());
    BackwardCall call;
    call.queries = queries_.view(variant_.masked);
    call.documents = documents_.view(variant_.masked);
    call.gradient = gradient.data();
    call.winners = {winners_.data(), 4};
    call.grad_queries = grad_queries.data();
    call.grad_documents = grad_documents.data();
    call.normalize = variant_.normalize;
    call.threads = 2;
    backward(kernels(), call);

    const size_t dim = size_t(queries_.dim);
    std::vector<double> want_queries(queries_.values.size()), want_documents(documents_.values.size());
    for (int64_t q = 0; q < queries_.count(); ++q) {
      for (int64_t d = 0; d < documents_.count(); ++d) {
        for (int64_t i = 0; i < queries_.length(q); ++i) {
          if (winners(q, d)[i] < 0) continue;
          const size_t query = size_t(queries_.offsets[size_t(q)] + i);
          const size_t document = size_t(documents_.offsets[size_t(d)] + winners(q, d)[i]);
          const double g = gradient[size_t(pair(q, d))];
          for (size_t k = 0; k < dim; ++k) {
            want_queries[query * dim + k] += g * documents_.values[document * dim + k] / document_norms_[document];
            want_documents[document * dim + k] += g * queries_.values[query * dim + k] / query_norms_[query];
          }
        }
      }
    }
    compare_gradient("query gradient", queries_, grad_queries, want_queries, query_norms_, double(documents_.count()));
    compare_gradient("document gradient", documents_, grad_documents, want_documents, document_norms_,
                     double(queries_.tokens()));
  }

  // `terms`: at most so many rows of norm <= 1, each times a gradient of at most 1, were added up for a token.
  void compare_gradient(const char* what, const Packed& tokens, const std::vector<char>& got, std::vector<double>& want,
                        const std::vector<double>& norms, double terms) {
    const int64_t dim = tokens.dim;
    for (int64_t t = 0; t < tokens.tokens(); ++t) {
      double* const row = &want[size_t(t * dim)];
      const double norm = norms[size_t(t)];
      if (variant_.normalize) {
        double along = 0.0;
        for (int64_t k = 0; k < dim; ++k) along += row[k] * tokens.row(t)[k] / norm;
        for (int64_t k = 0; k < dim; ++k) row[k] = (row[k] - along * tokens.row(t)[k] / norm) / norm;
      }
      for (int64_t k = 0; k < dim; ++k) {
        const double value = load(got.data(), t * dim + k, tokens.dtype);
        // 2^-25: half the smallest subnormal of fp16, the coarsest of the storage types near zero.
        const double smallest = emulated && tokens.dtype == DType::f16 ? 0x1p-14 : 0x1p-25;
        const double allowed = 2.0 * storage_roundoff(tokens.dtype) * std::fabs(row[k]) +
                               terms * (terms + double(dim) + 8.0) * kRoundoff_f32 / norm + smallest;
        expect(what, value, row[k], allowed, t * dim + k);
      }
    }
  }

  const std::string& isa_;
  const Inputs& inputs_;
  const Packed& queries_;
  const Packed& documents_;
  const Variant& variant_;
  const std::vector<double> query_norms_, document_norms_;  // 1 where nothing is normalised
  std::vector<float> scores_;
  std::vector<int32_t> winners_;
  double worst_ = 0.0;
};

}  // namespace

int main(int argc, char** argv) {
  emulated = argc > 1 && std::strcmp(argv[1], "--emulated") == 0;
  const std::vector<std::string> runnable = available_isas(), wanted(argv + 1 + emulated, argv + argc);
  if (!wanted.empty() && wanted != runnable) {
    std::printf("this CPU should run exactly the instruction sets named, but runs:");
    for (const std::string& isa : runnable) std::printf(" %s", isa.c_str());
    std::printf("\n");
    return 1;
  }
  Random random{1};
  std::vector<double> worst(runnable.size());
  std::vector<int64_t> tried(runnable.size()), done(runnable.size());
  for (int dim : kDims) {
    for (DType dtype : kDtypes) {
      const Inputs inputs(dtype, dim, random);
      for (size_t i = 0; i < runnable.size(); ++i) {
        set_isa(runnable[i]);
        for (const Variant& variant : kVariants) {
          worst[i] = std::max(worst[i], Check(runnable[i], inputs, variant).run(random));
        }
        if (dtype != DType::i8) worst[i] = std::max(worst[i], PackCheck(runnable[i], inputs.documents).run());
        ScreenCheck screen(runnable[i], dtype, dim, random);
        if (!screen.run()) worst[i] = std::numeric_limits<double>::infinity();
        tried[i] += screen.screened_documents().tried;
        done[i] += screen.screened_documents().done;
      }
    }
  }
  for (size_t i = 0; i < runnable.size(); ++i) {
    set_isa(runnable[i]);
    // A screen that never helps has the right bits as well.
    const bool helps = done[i] * 2 >= tried[i] && (tried[i] > 0) == (kernels().screened_dimensions > 0);
    if (!helps) worst[i] = std::numeric_limits<double>::infinity();
    std::printf("%-16s %s, largest error %.2f of the bound, %lld of %lld documents screened\n", runnable[i].c_str(),
                worst[i] <= 1.0 ? "right" : "WRONG", worst[i], static_cast<long long>(done[i]),
                static_cast<long long>(tried[i]));
  }
  return std::all_of(worst.begin(), worst.end(), [](double w) { return w <= 1.0; }) ? 0 : 1;
}
