#include <algorithm>
#include <atomic>
#include <vector>

#include "buffer.h"
#include "driver.h"
#include "parallel.h"

namespace edgecolbert {
namespace {

// Below this many elements a call is over before a second thread has woken up.
constexpr int64_t kSerialElements = 1 << 18;
// A larger result would push everything else out of the caches, and not stay there itself.
constexpr int64_t kStreamedBytes = 16 << 20;

int64_t scratch_bytes(int32_t dim) { return kStageBytes + (int64_t(dim) * 4 + 191) / 64 * 64; }

int threads_of(int64_t documents, int64_t rows, int32_t dim, int wanted) {
  return threads_for(documents, rows * dim < kSerialElements ? 1 : wanted);
}

// Numbers of the kept tokens.
int64_t list_kept(const uint8_t* mask, int64_t length, int32_t* kept) {
  int64_t count = 0;
  for (int64_t t = 0; t < length; ++t) {
    kept[count] = int32_t(t);
    count += mask[t] != 0;
  }
  return count;
}

}  // namespace

int64_t pack(const Kernels& kernels, const PackCall& call) {
  const Sequences& source = call.source;
  const int64_t rows = call.offsets[source.count] - call.offsets[0];
  const int64_t row_bytes = source.dim * bytes_of(call.dtype);
  int64_t longest = 0;
  for (int64_t j = 0; j < source.count; ++j) longest = std::max(longest, source.tokens(j));
  const int threads = threads_of(source.count, rows, source.dim, call.threads);
  const int64_t scratch = scratch_bytes(source.dim), row_numbers = (longest + 63) / 64 * 64;
  Buffer<char> buffers(scratch * threads);
  Buffer<int32_t> kept(row_numbers * threads);
  Buffer<float> norms(row_numbers * threads);
  const bool dense = source.count > 0 && source.token_stride > 0 && source.dim_stride == bytes_of(source.dtype);
  const int64_t last = source.count - 1;
  const char* const prefetch_end = dense ? source.start(last) + source.tokens(last) * source.token_stride : nullptr;
  std::atomic<int64_t> not_finite{source.count};
  parallel_for(source.count, threads, [&](int64_t j, int thread) {
    StoreJob job{};
    job.source.data = source.start(j);
    job.source.token_stride = source.token_stride;
    job.source.dim_stride = source.dim_stride;
    job.source.length = job.source_tokens = source.tokens(j);
    job.source.prefetch_end = prefetch_end;
    if (const uint8_t* const mask = source.mask_of(j)) {
      int32_t* const numbers = kept.data() + row_numbers * thread;
      const int64_t count = list_kept(mask, job.source.length, numbers);
      const bool prefix = count == 0 || numbers[count - 1] == count - 1;
      job.source.kept = prefix ? nullptr : numbers;
      job.source.length = count;
    }
    job.source_dtype = source.dtype;
    job.dtype = call.dtype;
    job.dim = source.dim;
    job.normalize = call.normalize;
    job.stream = rows * row_bytes >= kStreamedBytes;
    job.out = call.out + (call.offsets[j] - call.offsets[0]) * row_bytes;
    job.inverse_norms = norms.data() + row_numbers * thread;
    job.buffer = buffers.data() + scratch * thread;
    kernels.store_tokens(&job);
    if (call.dtype != DType::i8) return;
    call.scales[j] = job.scale;
    if (job.finite) return;
    int64_t first = not_finite.load();
    while (j < first && !not_finite.compare_exchange_weak(first, j)) {
    }
  });
  return not_finite < source.count ? not_finite.load() : -1;
}

void unpack(const Kernels& kernels, const UnpackCall& call) {
  const Sequences& source = call.source;
  const int64_t rows = source.offsets[source.count] - source.offsets[0];
  const int threads = threads_of(source.count, rows, source.dim, call.threads);
  const int64_t scratch = scratch_bytes(source.dim);
  Buffer<char> buffers(scratch * threads);
  parallel_for(source.count, threads, [&](int64_t j, int thread) {
    LoadJob job{};
    job.source = source.start(j);
    job.dtype = source.dtype;
    job.dim = source.dim;
    job.rows = source.tokens(j);
    job.token_stride = source.token_stride;
    job.dim_stride = source.dim_stride;
    job.scale = source.scales ? source.scales[j] : 1.0f;
    job.stream = rows * source.dim * 4 >= kStreamedBytes;
    job.out = call.out + (source.offsets[j] - source.offsets[0]) * source.dim;
    job.buffer = buffers.data() + scratch * thread;
    kernels.load_tokens(&job);
  });
}

}  // namespace edgecolbert
