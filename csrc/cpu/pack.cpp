#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "buffer.h"
#include "driver.h"
#include "parallel.h"

namespace edgecolbert {
namespace {

// Below this many elements a call is over before a second thread has woken up.
constexpr int64_t kSerialElements = 1 << 18;
// A larger result would push everything else out of the caches, and not stay there itself.
constexpr int64_t kStreamedBytes = 16 << 20;
// As Golden Cove, Zen 5 and their successors have; their predecessors 32 KiB.
constexpr long kRoomyBytes = 48 << 10;
// How many bytes before its turn a row is asked for: a row that int8 looks at, another, and another without room.
constexpr int64_t kAheadLooking = 6144, kAhead = 4096, kAheadCramped = 2048;

// The first-level cache, by what the C library says; where that is nothing, it is not.
bool is_roomy() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const bool roomy = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= kRoomyBytes;
  return roomy;
#else
  return false;
#endif
}

int64_t scratch_bytes(int32_t dim) { return (int64_t(dim) * 4 + 63) / 64 * 64; }

int threads_of(int64_t documents, int64_t rows, int32_t dim, int wanted) {
  return threads_for(documents, rows * dim < kSerialElements ? 1 : wanted);
}

constexpr uint64_t kEightOnes = 0x0101010101010101;

// How many bytes are not 0.
int64_t count_kept(const uint8_t* mask, int64_t length) {
  constexpr uint64_t low = 0x7f * kEightOnes;
  int64_t n = 0, t = 0;
  for (uint64_t eight; t + 8 <= length; t += 8) {
    memcpy(&eight, mask + t, 8);
    const uint64_t ones = ((((eight & low) + low) | eight) >> 7) & kEightOnes;
    n += int64_t(ones * kEightOnes >> 56);
  }
  for (; t < length; ++t) n += mask[t] != 0;
  return n;
}

// How many bytes from the first on are `value`.
int64_t leading(const uint8_t* mask, int64_t length, uint8_t value) {
  const uint64_t all = value * kEightOnes;
  int64_t t = 0;
  for (uint64_t eight; t + 8 <= length; t += 8) {
    memcpy(&eight, mask + t, 8);
    if (eight != all) break;
  }
  while (t < length && mask[t] == value) ++t;
  return t;
}

// Numbers of the kept tokens; null when they are the first ones.
const int32_t* list_kept(const uint8_t* mask, int64_t length, int32_t* kept, int64_t* count) {
  const int64_t first = leading(mask, length, 1);
  int64_t n = *count = first;
  if (first + leading(mask + first, length - first, 0) == length) return nullptr;
  for (int64_t t = first; t < length; ++t) {
    kept[n] = int32_t(t);
    n += mask[t] != 0;
  }
  *count = n;
  if (kept[n - 1] == n - 1) return nullptr;
  for (int64_t t = 0; t < first; ++t) kept[t] = int32_t(t);
  return kept;
}

}  // namespace

void pack_offsets(const Sequences& source, int64_t* out, int threads) {
  const int64_t last = source.count - 1;
  const int64_t tokens = source.count ? source.first_token(last) + source.tokens(last) - source.first_token(0) : 0;
  out[0] = 0;
  parallel_for(source.count, threads_of(source.count, source.mask ? tokens : 0, 1, threads), [&](int64_t j, int) {
    const uint8_t* const mask = source.mask_of(j);
    out[j + 1] = mask ? count_kept(mask, source.tokens(j)) : source.tokens(j);
  });
  for (int64_t j = 0; j < source.count; ++j) out[j + 1] += out[j];
}

int64_t pack(const Kernels& kernels, const PackCall& call) {
  const Sequences& source = call.source;
  const int64_t rows = call.offsets[source.count] - call.offsets[0];
  const int64_t row_bytes = source.dim * bytes_of(call.dtype);
  int64_t longest = 0;
  for (int64_t j = 0; j < source.count; ++j) longest = std::max(longest, source.tokens(j));
  const int threads = threads_of(source.count, rows, source.dim, call.threads);
  const int64_t scratch = scratch_bytes(source.dim), row_numbers = (longest + 63) / 64 * 64;
  const int64_t ahead = call.dtype == DType::i8 ? kAheadLooking : is_roomy() ? kAhead : kAheadCramped;
  Buffer<char> buffers(scratch * threads);
  Buffer<int32_t> all_numbers(source.mask ? longest : 0);
  if (source.mask) std::iota(all_numbers.data(), all_numbers.data() + longest, 0);
  Buffer<int32_t> kept(row_numbers * 2 * threads);
  Buffer<float> norms(row_numbers * 2 * threads);
  std::atomic<int64_t> not_finite{source.count};

  auto whole = [&](int64_t j) {
    Tokens tokens{};
    tokens.data = source.start(j);
    tokens.token_stride = source.stride(j);
    tokens.dim_stride = source.dim_stride;
    tokens.length = source.tokens(j);
    return tokens;
  };
  auto tokens_of = [&](int64_t j, int thread) {
    Tokens tokens = whole(j);
    // Two lists a thread, of norms as well: the one of this document, and the one of the next.
    int32_t* const numbers = kept.data() + row_numbers * (2 * thread + j % 2);
    if (const uint8_t* const mask = source.mask_of(j)) {
      tokens.kept = list_kept(mask, tokens.length, numbers, &tokens.length);
      // No more than were counted, should someone write to the mask meanwhile.
      tokens.length = std::min(tokens.length, call.offsets[j + 1] - call.offsets[j]);
    }
    return tokens;
  };
  auto store = [&](int64_t j, int thread, StoreJob& job) {
    job.out = call.out + (call.offsets[j] - call.offsets[0]) * row_bytes;
    job.inverse_norms = norms.data() + row_numbers * (2 * thread + j % 2);
    job.next_inverse_norms = norms.data() + row_numbers * (2 * thread + (j + 1) % 2);
    kernels.store_tokens(&job);
    if (call.dtype == DType::i8) call.scales[j] = job.scale;
    if (job.finite) return;
    int64_t first = not_finite.load();
    while (j < first && !not_finite.compare_exchange_weak(first, j)) {
    }
  };
  // Runs of neighbours, so that a thread knows which document it reads next.
  const int64_t runs =
      threads == 1 ? std::min<int64_t>(source.count, 1) : std::min(source.count, int64_t(threads) * 16);
  parallel_for(runs, threads, [&](int64_t run, int thread) {
    const int64_t begin = source.count * run / runs, end = source.count * (run + 1) / runs;
    StoreJob job{};
    job.source_dtype = source.dtype;
    job.dtype = call.dtype;
    job.dim = source.dim;
    job.normalize = call.normalize;
    job.stream = rows * row_bytes >= kStreamedBytes;
    job.roomy = is_roomy();
    job.rows_ahead = 1 + ahead / std::max<int64_t>(source.dim * bytes_of(source.dtype), 1);
    job.all_numbers = source.mask ? all_numbers.data() : nullptr;
    job.buffer = buffers.data() + scratch * thread;
    Tokens next = tokens_of(begin, thread), after{};
    for (int64_t j = begin; j < end; ++j) {
      job.source = next;
      if (j + 1 < end) next = tokens_of(j + 1, thread);
      job.next = j + 1 < end ? &next : nullptr;
      if (j + 2 < end) after = whole(j + 2);
      job.after = j + 2 < end ? &after : nullptr;
      store(j, thread, job);
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
