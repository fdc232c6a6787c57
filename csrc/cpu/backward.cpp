#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "buffer.h"
#include "driver.h"
#include "parallel.h"

namespace edgecolbert {
namespace {

// Query tokens that one task owns when there are fewer queries than would keep the threads busy.
constexpr int64_t kTokensOfATask = 8;

// Chosen pairs by query or by document, each in ascending order.
class PairsOf {
 public:
  PairsOf(const int64_t* owner, int64_t pairs, int64_t owners) : first_(size_t(owners) + 1), pairs_(size_t(pairs)) {
    for (int64_t p = 0; p < pairs; ++p) {
      if (owner[p] < 0 || owner[p] >= owners) throw std::out_of_range("pair index");
      ++first_[size_t(owner[p]) + 1];
    }
    for (size_t i = 1; i < first_.size(); ++i) first_[i] += first_[i - 1];
    std::vector<int64_t> next(first_.begin(), first_.end() - 1);
    for (int64_t p = 0; p < pairs; ++p) pairs_[size_t(next[size_t(owner[p])]++)] = p;
  }

  template <class Visit>
  void for_each(int64_t owner, Visit visit) const {
    for (int64_t i = first_[size_t(owner)]; i < first_[size_t(owner) + 1]; ++i) visit(pairs_[size_t(i)]);
  }

 private:
  std::vector<int64_t> first_, pairs_;
};

class Gradients {
 public:
  Gradients(const Kernels& kernels, const BackwardCall& call) : kernels_(kernels), call_(call) {
    if (call.pairs.layout == Layout::indexed) {
      by_query_.reset(new PairsOf(call.pairs.query_index, call.pairs.count, call.queries.count));
      by_document_.reset(new PairsOf(call.pairs.document_index, call.pairs.count, call.documents.count));
    }
    if (call.normalize) {
      query_norms_ = inverse_norms(call.queries);
      document_norms_ = inverse_norms(call.documents);
    }
  }

  void to_documents() const {
    const Sequences& documents = call_.documents;
    int64_t longest = 0;
    for (int64_t j = 0; j < documents.count; ++j) longest = std::max(longest, documents.tokens(j));
    const Workers workers(documents.count, longest, documents, call_.queries, call_.threads);
    parallel_for(documents.count, workers.threads, [&](int64_t j, int thread) {
      const Rows rows = open(documents, call_.grad_documents, j, 0, documents.tokens(j), workers.accumulator(thread));
      const auto add = [&](int64_t q, int64_t pair) {
        RowsJob job = contribution(call_.queries, q, query_norms_.get(), q, j, pair, workers.row(thread));
        job.accumulator = rows.accumulator;
        if (job.gradient != 0.0f) kernels_.scatter_rows(&job);
      };
      switch (call_.pairs.layout) {
        case Layout::all:
          for (int64_t q = 0; q < call_.queries.count; ++q) add(q, q * documents.count + j);
          break;
        case Layout::own:
          add(j / candidates(), j);
          break;
        case Layout::indexed:
          by_document_->for_each(j, [&](int64_t p) { add(call_.pairs.query_index[p], p); });
          break;
      }
      close(documents, document_norms_.get(), rows, workers.row(thread));
    });
  }

  void to_queries() const {
    const Sequences& queries = call_.queries;
    int64_t longest = 0;
    for (int64_t q = 0; q < queries.count; ++q) longest = std::max(longest, queries.tokens(q));
    const int64_t part = queries.count >= 8 * int64_t(call_.threads) ? std::max<int64_t>(longest, 1) : kTokensOfATask;
    const int64_t parts = (longest + part - 1) / part;
    const Workers workers(queries.count * parts, part, queries, call_.documents, call_.threads);
    parallel_for(queries.count * parts, workers.threads, [&](int64_t task, int thread) {
      const int64_t q = task / parts;
      const int64_t first = task % parts * part;
      const int64_t count = std::min(part, queries.tokens(q) - first);
      if (count <= 0) return;
      const Rows rows = call_.accumulate_queries
                            ? go_on(queries, call_.grad_queries, q, first, count)
                            : open(queries, call_.grad_queries, q, first, count, workers.accumulator(thread));
      const auto add = [&](int64_t j, int64_t pair) {
        RowsJob job = contribution(call_.documents, j, document_norms_.get(), q, j, pair, workers.row(thread));
        job.winner = static_cast<const char*>(job.winner) + first * job.winner_bytes;
        job.count = count;
        job.accumulator = rows.accumulator;
        if (job.gradient != 0.0f) kernels_.gather_rows(&job);
      };
      switch (call_.pairs.layout) {
        case Layout::all:
          for (int64_t j = 0; j < call_.documents.count; ++j) add(j, q * call_.documents.count + j);
          break;
        case Layout::own:
          for (int64_t j = q * candidates(); j < (q + 1) * candidates(); ++j) add(j, j);
          break;
        case Layout::indexed:
          by_query_->for_each(q, [&](int64_t p) { add(call_.pairs.document_index[p], p); });
          break;
      }
      if (!call_.accumulate_queries) close(queries, query_norms_.get(), rows, workers.row(thread));
    });
  }

 private:
  // Rows of one sequence whose gradient a task owns.
  struct Rows {
    int64_t sequence, first, count;
    float* accumulator;
    char* out;
  };

  // Memory of each thread.
  struct Workers {
    Workers(int64_t tasks, int64_t rows, const Sequences& target, const Sequences& source, int wanted)
        : threads(threads_for(tasks, wanted)),
          accumulator_size(target.dtype == DType::f32 ? 0 : rows * target.dim),
          row_size(std::max(target.dim, source.dim)),
          accumulators(new Buffer<float>(accumulator_size * threads)),
          row_buffers(new Buffer<float>(int64_t(row_size) * threads)) {}

    float* accumulator(int thread) const { return accumulators->data() + accumulator_size * thread; }
    char* row(int thread) const { return reinterpret_cast<char*>(row_buffers->data() + int64_t(row_size) * thread); }

    const int threads;
    const int64_t accumulator_size;
    const int32_t row_size;
    const std::unique_ptr<Buffer<float>> accumulators, row_buffers;
  };

  int64_t candidates() const { return call_.documents.count / call_.queries.count; }

  std::unique_ptr<Buffer<float>> inverse_norms(const Sequences& sequences) const {
    const int64_t tokens = sequences.first_token(sequences.count);
    std::unique_ptr<Buffer<float>> norms(new Buffer<float>(tokens));
    const int threads = threads_for(sequences.count, call_.threads);
    Buffer<float> rows(int64_t(sequences.dim) * threads);
    parallel_for(sequences.count, threads, [&](int64_t j, int thread) {
      NormsJob job{};
      job.source = sequences.start(j);
      job.dtype = sequences.dtype;
      job.dim = sequences.dim;
      job.rows = sequences.tokens(j);
      job.token_stride = sequences.token_stride;
      job.dim_stride = sequences.dim_stride;
      job.inverse_norms = norms->data() + sequences.first_token(j);
      job.buffer = reinterpret_cast<char*>(rows.data() + int64_t(sequences.dim) * thread);
      kernels_.inverse_norms(&job);
    });
    return norms;
  }

  // fp32 gradients accumulate in place, others in the thread's own rows.
  Rows open(const Sequences& target, char* gradients, int64_t sequence, int64_t first, int64_t count,
            float* accumulator) const {
    char* const out = gradients + (target.first_token(sequence) + first) * target.dim * bytes_of(target.dtype);
    if (target.dtype == DType::f32) accumulator = reinterpret_cast<float*>(out);
    if (count > 0) std::memset(accumulator, 0, size_t(count) * size_t(target.dim) * sizeof(float));
    return {sequence, first, count, accumulator, out};
  }

  // fp32 gradients of an earlier call, to be added to.
  static Rows go_on(const Sequences& target, char* gradients, int64_t sequence, int64_t first, int64_t count) {
    float* const out = reinterpret_cast<float*>(gradients) + (target.first_token(sequence) + first) * target.dim;
    return {sequence, first, count, out, reinterpret_cast<char*>(out)};
  }

  RowsJob contribution(const Sequences& source, int64_t sequence, Buffer<float>* norms, int64_t q, int64_t j,
                       int64_t pair, char* row) const {
    const int64_t length = call_.queries.tokens(q);
    const int64_t offset = call_.pairs.layout == Layout::all
                               ? call_.queries.first_token(q) * call_.documents.count + j * length
                               : pair * length;
    RowsJob job{};
    job.source = source.start(sequence);
    job.dtype = source.dtype;
    job.dim = source.dim;
    job.token_stride = source.token_stride;
    job.dim_stride = source.dim_stride;
    job.inverse_norms = norms ? norms->data() + source.first_token(sequence) : nullptr;
    job.winner = static_cast<const char*>(call_.winners.data) + offset * call_.winners.bytes;
    job.winner_bytes = call_.winners.bytes;
    job.count = length;
    job.gradient = call_.gradient[pair];
    job.buffer = row;
    return job;
  }

  void close(const Sequences& target, Buffer<float>* norms, const Rows& rows, char* row) const {
    FinishJob job{};
    job.accumulator = rows.accumulator;
    job.out = rows.out;
    job.rows = rows.count;
    job.dtype = target.dtype;
    job.dim = target.dim;
    job.token_stride = target.token_stride;
    job.dim_stride = target.dim_stride;
    job.buffer = row;
    if (norms) {
      job.source = target.start(rows.sequence) + rows.first * target.token_stride;
      job.inverse_norms = norms->data() + target.first_token(rows.sequence) + rows.first;
    }
    kernels_.finish_rows(&job);
  }

  const Kernels& kernels_;
  const BackwardCall& call_;
  std::unique_ptr<PairsOf> by_query_, by_document_;
  std::unique_ptr<Buffer<float>> query_norms_, document_norms_;
};

}  // namespace

void backward(const Kernels& kernels, const BackwardCall& call) {
  const Gradients gradients(kernels, call);
  if (call.grad_documents) gradients.to_documents();
  if (call.grad_queries) gradients.to_queries();
}

}  // namespace edgecolbert
