// Token rows to packed storage and back: one pass over the rows, nothing between them and the result.
//
// A row costs a load, a conversion and a store a register; with normalisation a load and a multiply-add more, and one
// horizontal sum, square root and division a row, which overlap with the rows beside it. int8 looks at a whole document
// before it rounds the first value: its second pass finds the rows in the second-level cache.
#pragma once

namespace {

// Where finished elements go: straight to the result, or past the caches, so that no line of it is read before it is
// overwritten. Then they are staged in the nearest cache and leave it in whole lines.
class Sink {
 public:
  Sink(char* out, bool stream, char* stage) : out_(out), stream_(stream && Simd::streams), stage_(stage) {
    // The stage begins where its line of the result does.
    if (stream_) at_ = begin_ = reinterpret_cast<uintptr_t>(out) % 64;
  }

  // Room for `bytes` bytes, at most half the stage.
  [[gnu::always_inline]] char* reserve(int64_t bytes) {
    if (!stream_) return out_;
    if (at_ + bytes > kStageBytes) flush();
    return stage_ + at_;
  }

  [[gnu::always_inline]] void commit(int64_t bytes) {
    if (stream_) {
      at_ += bytes;
    } else {
      out_ += bytes;
    }
  }

  void finish() {
    if (!stream_) return;
    flush();
    memcpy(out_, stage_ + begin_, size_t(at_ - begin_));
    Simd::finish_streams();
  }

 private:
  // Whole lines leave; what is left of the last one moves to the front.
  void flush() {
    int64_t line = 0;
    if (begin_ > 0 && at_ >= 64) {  // only the first line of all begins in its middle
      memcpy(out_, stage_ + begin_, size_t(64 - begin_));
      out_ += 64 - begin_;
      begin_ = 0;
      line = 64;
    }
    if (begin_ == 0) {
      for (; line + 64 <= at_; line += 64, out_ += 64) Simd::stream_line(out_, stage_ + line);
      if (line > 0) memcpy(stage_, stage_ + line, 64);
      at_ -= line;
    }
  }

  char* out_;  // of stage_[begin_] when staging
  const bool stream_;
  char* const stage_;
  int64_t begin_ = 0, at_ = 0;
};

template <class From, class To, class Transform>
[[gnu::always_inline]] inline void convert_row(const From* row, int dim, To* out, Transform transform) {
  int k = 0;
  for (; k + Simd::width <= dim; k += Simd::width) Simd::store(out + k, transform(Simd::load(row + k)));
  if (k < dim) Simd::store_first(out + k, transform(Simd::load_first(row + k, dim - k)), dim - k);
}

// The kept tokens of a document, as contiguous elements. Holes and conversions keep the processor from running ahead on
// its own, so rows are asked for in time, at a document's end those of the next one.
template <class From>
class Rows {
 public:
  explicit Rows(const StoreJob& job)
      : job_(job),
        row_bytes_(int64_t(sizeof(From)) * job.dim),
        ahead_(1 + kPrefetchBytes / row_bytes_),
        prefetch_end_(intptr_t(job.source.prefetch_end) - row_bytes_) {}

  // Valid until the next call.
  [[gnu::always_inline]] const From* operator[](int64_t i) const {
    const Tokens& tokens = job_.source;
    const char* const data = tokens.data + (tokens.kept ? tokens.kept[i] : i) * tokens.token_stride;
    return contiguous_row<From>(data, tokens.dim_stride, job_.dim, job_.buffer + kStageBytes);
  }

  [[gnu::always_inline]] void prefetch_after(int64_t i) const {
    const Tokens& tokens = job_.source;
    const int64_t later = i + ahead_, beyond = job_.source_tokens + later - tokens.length;
    const int64_t token = later >= tokens.length ? beyond : tokens.kept ? tokens.kept[later] : later;
    const char* const data = tokens.data + token * tokens.token_stride;
    if (intptr_t(data) >= prefetch_end_) return;
    for (int64_t k = 0; k < row_bytes_; k += 64) __builtin_prefetch(data + k);
  }

 private:
  static constexpr int64_t kPrefetchBytes = 4096;

  const StoreJob& job_;
  const int64_t row_bytes_, ahead_;
  const intptr_t prefetch_end_;  // of the addresses of rows that are prefetched
};

// A norm is a long chain of dependent instructions, and the conversions that wait for it fill the processor's queue:
// some norms are computed before the first of their rows is converted.
constexpr int kNormsAhead = 16;

// |x|^2 becomes 1 / max(|x|, eps), as inverse_norm() has it to the bit. A NaN stays: it is the second operand.
inline void invert_norms(float* square_norms) {
  for (int i = 0; i < kNormsAhead; i += Simd::width) {
    const Simd::F norm = Simd::square_root(Simd::load(square_norms + i));
    const Simd::F divisor = Simd::maximum(Simd::broadcast(kNormEpsilon), norm);
    Simd::store(square_norms + i, Simd::divide(Simd::broadcast(1.0f), divisor));
  }
}

// Largest |x| of a document as bits in the lanes.
template <class From>
inline Simd::I largest_lanes(const StoreJob& job) {
  const Rows<From> rows(job);
  Simd::I bits = Simd::zero_integer();
  for (int64_t i = 0; i < job.source.length; ++i) {
    rows.prefetch_after(i);
    for_each_register(rows[i], job.dim,
                      [&](int, Simd::F x) { bits = Simd::maximum_unsigned(bits, Simd::absolute_bits(x)); });
  }
  return bits;
}

// The same after normalisation, with the norms; *raw: before it.
template <class From>
inline Simd::I largest_normalized_lanes(const StoreJob& job, Simd::I* raw) {
  const Rows<From> rows(job);
  Simd::I largest = Simd::zero_integer();
  for (int64_t first = 0; first < job.source.length; first += kNormsAhead) {
    const int count = int(job.source.length - first < kNormsAhead ? job.source.length - first : kNormsAhead);
    float* const norms = job.inverse_norms + first;
    Simd::F lanes[kNormsAhead];  // |x| of a row
    for (int i = 0; i < kNormsAhead; ++i) norms[i] = 1.0f;
    for (int i = 0; i < count; ++i) {
      rows.prefetch_after(first + i);
      Simd::I bits = Simd::zero_integer();
      Simd::F squares = Simd::zero();
      for_each_register(rows[first + i], job.dim, [&](int, Simd::F x) {
        bits = Simd::maximum_unsigned(bits, Simd::absolute_bits(x));
        squares = Simd::multiply_add(x, x, squares);
      });
      norms[i] = Simd::sum(squares);
      lanes[i] = Simd::from_bits(bits);
      *raw = Simd::maximum_unsigned(*raw, bits);
    }
    invert_norms(norms);
    for (int i = 0; i < count; ++i) {
      const Simd::F normalized = Simd::multiply(lanes[i], Simd::broadcast(norms[i]));
      largest = Simd::maximum_unsigned(largest, Simd::bits(normalized));
    }
  }
  return largest;
}

// Of a whole document; false when a value is not finite.
template <class From>
inline bool largest_magnitude(const StoreJob& job, float* largest) {
  Simd::I raw = Simd::zero_integer(), bits;
  if (job.normalize) {
    bits = largest_normalized_lanes<From>(job, &raw);
  } else {
    bits = raw = largest_lanes<From>(job);
  }
  *largest = bits_to_float(Simd::largest_unsigned(bits));
  return Simd::largest_unsigned(raw) < 0x7f800000u;
}

constexpr float kSmallestPackedPeak = 2e-36f;  // 127 / x and x / 127 are normal numbers; below it a document is zero

template <class From>
inline void store_int8(StoreJob& job, Sink& sink) {
  float largest;
  job.finite = largest_magnitude<From>(job, &largest);
  if (!job.finite) return;
  const bool zero = largest < kSmallestPackedPeak;
  job.scale = zero ? 0.0f : largest / 127.0f;
  const Simd::F inverse_scale = Simd::broadcast(zero ? 0.0f : 127.0f / largest);
  const Rows<From> rows(job);
  for (int64_t i = 0; i < job.source.length; ++i) {
    const From* const row = rows[i];
    I8* const out = reinterpret_cast<I8*>(sink.reserve(job.dim));
    if (job.normalize) {
      const Simd::F inverse_norm = Simd::broadcast(job.inverse_norms[i]);
      convert_row(row, job.dim, out,
                  [&](Simd::F x) { return Simd::multiply(Simd::multiply(x, inverse_norm), inverse_scale); });
    } else {
      convert_row(row, job.dim, out, [&](Simd::F x) { return Simd::multiply(x, inverse_scale); });
    }
    sink.commit(job.dim);
  }
}

template <class From, class To>
inline void store_float(const StoreJob& job, Sink& sink) {
  const int64_t bytes = int64_t(sizeof(To)) * job.dim;
  const Rows<From> rows(job);
  for (int64_t i = 0; i < job.source.length; ++i) {
    rows.prefetch_after(i);
    convert_row(rows[i], job.dim, reinterpret_cast<To*>(sink.reserve(bytes)), [](Simd::F x) { return x; });
    sink.commit(bytes);
  }
}

template <class From, class To>
inline void store_normalized(const StoreJob& job, Sink& sink) {
  const int64_t bytes = int64_t(sizeof(To)) * job.dim;
  const Rows<From> rows(job);
  alignas(64) float norms[kNormsAhead] = {};
  for (int64_t first = 0; first < job.source.length; first += kNormsAhead) {
    const int count = int(job.source.length - first < kNormsAhead ? job.source.length - first : kNormsAhead);
    for (int i = 0; i < count; ++i) {
      rows.prefetch_after(first + i);
      norms[i] = square_norm(rows[first + i], job.dim);
    }
    invert_norms(norms);
    for (int i = 0; i < count; ++i) {
      const Simd::F scale = Simd::broadcast(norms[i]);
      To* const out = reinterpret_cast<To*>(sink.reserve(bytes));
      convert_row(rows[first + i], job.dim, out, [&](Simd::F x) { return Simd::multiply(x, scale); });
      sink.commit(bytes);
    }
  }
}

// The same type without normalisation: bits are kept, those of a NaN too.
template <class Element>
inline void copy_rows(const StoreJob& job, Sink& sink) {
  const int64_t bytes = int64_t(sizeof(Element)) * job.dim;
  const Rows<Element> rows(job);
  for (int64_t i = 0; i < job.source.length; ++i) {
    rows.prefetch_after(i);
    memcpy(sink.reserve(bytes), rows[i], size_t(bytes));
    sink.commit(bytes);
  }
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class From, class To>
void store_tokens(StoreJob& job) {
  // A row that is larger than the stage takes no profit from it either.
  Sink sink(job.out, job.stream && int64_t(sizeof(To)) * job.dim <= kStageBytes / 2, job.buffer);
  if constexpr (kSame<To, I8>) {
    store_int8<From>(job, sink);
  } else if (job.normalize) {
    store_normalized<From, To>(job, sink);
  } else if constexpr (kSame<From, To>) {
    copy_rows<From>(job, sink);
  } else {
    store_float<From, To>(job, sink);
  }
  sink.finish();
}

template <class Element>
void load_tokens(const LoadJob& job) {
  // Rows side by side are one long row; it is cut into pieces that the stage holds.
  const bool dense = job.dim_stride == int64_t(sizeof(Element)) && job.token_stride == job.dim * job.dim_stride;
  const int64_t piece = dense ? kStageBytes / 8 : job.dim, total = job.rows * job.dim;
  Sink sink(reinterpret_cast<char*>(job.out), job.stream && piece <= kStageBytes / 8, job.buffer);
  const Simd::F scale = Simd::broadcast(job.scale);
  for (int64_t done = 0, row = 0; done < total; done += piece, ++row) {
    const int n = int(total - done < piece ? total - done : piece);
    const char* const data = job.source + (dense ? done * int64_t(sizeof(Element)) : row * job.token_stride);
    const Element* const x = dense ? reinterpret_cast<const Element*>(data)
                                   : contiguous_row<Element>(data, job.dim_stride, job.dim, job.buffer + kStageBytes);
    float* const out = reinterpret_cast<float*>(sink.reserve(n * 4));
    if (kSame<Element, I8>) {
      convert_row(x, n, out, [&](Simd::F value) { return Simd::multiply(value, scale); });
    } else {
      convert_row(x, n, out, [](Simd::F value) { return value; });
    }
    sink.commit(n * 4);
  }
  sink.finish();
}

}  // namespace
