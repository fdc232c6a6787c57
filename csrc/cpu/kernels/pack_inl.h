// Token rows to packed storage and back: one pass over the rows, nothing between them and the result.
//
// A row costs a load, a conversion and a store a register; with normalisation a load and a multiply-add more, and a
// horizontal sum, square root and division, which rows share a register at a time. int8 looks at a whole document
// before it rounds the first value: its second pass finds the rows in the second-level cache. Memory is so fast that
// the instructions around a row count: rows of the usual lengths have loops of their own, without a counter.
#pragma once

namespace {

// Where finished elements go: straight to the result, or past the caches, so that no line of it is read before it is
// overwritten. Then they are staged in the nearest cache and leave it in whole lines.
class Sink {
 public:
  Sink(char* out, bool stream, char* stage) : out_(out), stream_(stream && Simd::streams), stage_(stage) {
    if (!stream_) return;
    // The stage begins where the first line of the result does.
    at_ = sent_ = int64_t(reinterpret_cast<uintptr_t>(out) % 64);
    out_ -= at_;
  }

  // Room for `bytes` bytes, at most half the stage.
  [[gnu::always_inline]] char* reserve(int64_t bytes) {
    if (!stream_) return out_ + at_;
    if (at_ >= sent_ + kBurstBytes + kYoungBytes) send(at_ - kYoungBytes);
    if (at_ + bytes > kStageBytes) wrap();
    return stage_ + at_;
  }

  [[gnu::always_inline]] void commit(int64_t bytes) { at_ += bytes; }

  // With `last`, other threads may read what was written from now on.
  void finish(bool last) {
    if (!stream_) return;
    send(at_);
    memcpy(out_ + sent_, stage_ + sent_, size_t(at_ - sent_));
    if (last) Simd::finish_streams();
  }

 private:
  // Lines leave in short bursts, since reads wait for a long one. The youngest bytes stay: a load of a line would wait
  // for the narrower stores that have just made it, and these for all lines before them.
  static constexpr int64_t kBurstBytes = 512, kYoungBytes = 1024;

  // All whole lines before stage_[end].
  void send(int64_t end) {
    const int64_t line = round_up(sent_, 64);
    if (line > sent_ && line <= end) {  // only the first line of all begins in its middle
      memcpy(out_ + sent_, stage_ + sent_, size_t(line - sent_));
      sent_ = line;
    }
    for (; sent_ + 64 <= end; sent_ += 64) Simd::stream_line(out_ + sent_, stage_ + sent_);
  }

  // What is left of the last line moves to the front.
  void wrap() {
    send(at_);
    memcpy(stage_, stage_ + sent_, 64);
    out_ += sent_;
    at_ -= sent_;
    sent_ = 0;
  }

  char* out_;  // of stage_[0], or of offset 0 without a stage
  const bool stream_;
  char* const stage_;
  int64_t sent_ = 0, at_ = 0;
};

template <class From, class To, class Transform>
[[gnu::always_inline]] inline void convert_row(const From* row, int dim, To* out, Transform transform) {
  constexpr int w = Simd::width;
  int k = 0;
  for (; k + 2 * w <= dim; k += 2 * w) {
    Simd::store_two(out + k, transform(Simd::load(row + k)), transform(Simd::load(row + k + w)));
  }
  if (k + w <= dim) {
    Simd::store(out + k, transform(Simd::load(row + k)));
    k += w;
  }
  if (k < dim) Simd::store_first(out + k, transform(Simd::load_first(row + k, dim - k)), dim - k);
}

// The kept tokens of a document, as contiguous elements. Holes and conversions keep the processor from running ahead on
// its own, so rows are asked for before they are needed, behind a document's last one those of the next document.
template <class From>
class Rows {
 public:
  explicit Rows(StoreJob& job)
      : job_(job),
        source_(job.source),
        row_bytes_(int64_t(sizeof(From)) * job.dim),
        batch_(1 + kBatchBytes / row_bytes_),
        fetched_(job.fetched) {}

  ~Rows() { job_.fetched = fetched_; }

  // Valid until the next call.
  [[gnu::always_inline]] const From* operator[](int64_t i) const {
    return contiguous_row<From>(address(source_, i), source_.dim_stride, job_.dim, job_.buffer + kStageBytes);
  }

  // Asks for the rows before number `end` that were not asked for, unless they are few; those of the next document are
  // counted on.
  [[gnu::always_inline]] void fetch(int64_t end) {
    if (end >= fetched_ + batch_) fetched_ = fetch_rows(fetched_, end);
  }

  int64_t ahead() const { return 1 + kAheadBytes / row_bytes_; }

 private:
  static constexpr int64_t kAheadBytes = 4096, kBatchBytes = 512;

  [[gnu::always_inline]] static const char* address(const Tokens& tokens, int64_t i) {
    return tokens.data + (tokens.kept ? tokens.kept[i] : i) * tokens.token_stride;
  }

  int64_t fetch_rows(int64_t begin, int64_t end) const {
    if (begin < source_.length) begin = fetch_rows(source_, begin, end);
    if (end <= source_.length || !job_.next) return begin;
    return source_.length + fetch_rows(*job_.next, begin - source_.length, end - source_.length);
  }

  int64_t fetch_rows(const Tokens& tokens, int64_t begin, int64_t end) const {
    if (end > tokens.length) end = tokens.length;
    if (tokens.dim_stride != int64_t(sizeof(From)) || begin >= end) return begin > end ? begin : end;
    if (!tokens.kept && tokens.token_stride == row_bytes_) {
      fetch_bytes(address(tokens, begin), (end - begin) * row_bytes_);
    } else {
      for (int64_t i = begin; i < end; ++i) fetch_bytes(address(tokens, i), row_bytes_);
    }
    return end;
  }

  static void fetch_bytes(const char* data, int64_t bytes) {
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(data + k);
  }

  StoreJob& job_;
  const Tokens source_;
  const int64_t row_bytes_, batch_;  // batch_: rows
  int64_t fetched_;
};

// A norm is a long chain of dependent instructions, and the conversions that wait for it fill the processor's queue:
// some norms are computed before the first of their rows is converted. A register of them at a time, and without a way
// through memory: a load of what narrower stores have written would wait until these, and all streamed lines before
// them, have left the processor.
constexpr int kNormsAhead = 16;

// 1 / max(|x|, eps) in lane i, |x|^2 being the sum of register i; as inverse_norm() has it to the bit. A NaN stays: it
// is the second operand.
[[gnu::always_inline]] inline Simd::F inverse_norms(const Simd::F (&squares)[Simd::width]) {
  const Simd::F norm = Simd::square_root(Simd::sums(squares));
  return Simd::divide(Simd::broadcast(1.0f), Simd::maximum(Simd::broadcast(kNormEpsilon), norm));
}

// int8 goes over a document twice, and memory shall not wait while the second pass reads the cache: of the next
// document five eighths are fetched by this one's second pass, the others by its own first.
template <class From>
class Pace : public Rows<From> {
 public:
  explicit Pace(StoreJob& job) : Rows<From>(job), length_(job.source.length), there_(job.fetched) {
    const int64_t most = kMostBytes / (int64_t(sizeof(From)) * job.dim),
                  share = job.next ? job.next->length * 5 / 8 : 0;
    if (length_ > 0) step_ = ((share < most ? share : most) << 16) / length_;
  }

  [[gnu::always_inline]] void fetch_looking(int64_t i) {
    const int64_t near = i + 1 + this->ahead(), far = there_ + i / 2;
    this->fetch(near > far ? near : far);
  }

  [[gnu::always_inline]] void fetch_rounding(int64_t i) { this->fetch(length_ + ((i + 1) * step_ >> 16)); }

 private:
  static constexpr int64_t kMostBytes = 1 << 17;  // a part of the second-level cache

  const int64_t length_, there_;
  int64_t step_ = 0;  // rows of the next document to one of this, times 2^16
};

// Largest |x| of a document as bits in the lanes.
template <class From, class Dim>
inline Simd::I largest_lanes(const StoreJob& job, Pace<From>& rows, Dim dim) {
  Simd::I bits = Simd::zero_integer();
  for (int64_t i = 0; i < job.source.length; ++i) {
    rows.fetch_looking(i);
    for_each_register(rows[i], dim,
                      [&](int, Simd::F x) { bits = Simd::maximum_unsigned(bits, Simd::absolute_bits(x)); });
  }
  return bits;
}

// The same after normalisation, with the norms; *raw: before it.
template <class From, class Dim>
inline Simd::I largest_normalized_lanes(const StoreJob& job, Pace<From>& rows, Dim dim, Simd::I* raw) {
  Simd::I largest = Simd::zero_integer();
  for (int64_t first = 0; first < job.source.length; first += Simd::width) {
    const int count = int(job.source.length - first < Simd::width ? job.source.length - first : Simd::width);
    float* const norms = job.inverse_norms + first;
    Simd::F squares[Simd::width], lanes[Simd::width];  // of |x| of a row
    for (int i = 0; i < Simd::width; ++i) squares[i] = Simd::zero();
    for (int i = 0; i < count; ++i) {
      rows.fetch_looking(first + i);
      Simd::I bits = Simd::zero_integer();
      for_each_register(rows[first + i], dim, [&](int, Simd::F x) {
        bits = Simd::maximum_unsigned(bits, Simd::absolute_bits(x));
        squares[i] = Simd::multiply_add(x, x, squares[i]);
      });
      lanes[i] = Simd::from_bits(bits);
      *raw = Simd::maximum_unsigned(*raw, bits);
    }
    Simd::store(norms, inverse_norms(squares));
    for (int i = 0; i < count; ++i) {
      const Simd::F normalized = Simd::multiply(lanes[i], Simd::broadcast(norms[i]));
      largest = Simd::maximum_unsigned(largest, Simd::bits(normalized));
    }
  }
  return largest;
}

// Of a whole document; false when a value is not finite.
template <class From, class Dim>
inline bool largest_magnitude(const StoreJob& job, Pace<From>& rows, Dim dim, float* largest) {
  Simd::I raw = Simd::zero_integer(), bits;
  if (job.normalize) {
    bits = largest_normalized_lanes(job, rows, dim, &raw);
  } else {
    bits = raw = largest_lanes(job, rows, dim);
  }
  *largest = bits_to_float(Simd::largest_unsigned(bits));
  return Simd::largest_unsigned(raw) < 0x7f800000u;
}

constexpr float kSmallestPackedPeak = 2e-36f;  // 127 / x and x / 127 are normal numbers; below it a document is zero

template <class From, class Dim>
inline void store_int8(StoreJob& job, Sink& sink, Dim dim) {
  Pace<From> rows(job);
  float largest;
  job.finite = largest_magnitude(job, rows, dim, &largest);
  if (!job.finite) return;
  const bool zero = largest < kSmallestPackedPeak;
  job.scale = zero ? 0.0f : largest / 127.0f;
  const Simd::F inverse_scale = Simd::broadcast(zero ? 0.0f : 127.0f / largest);
  auto round_rows = [&, length = job.source.length](auto scaled) {
    for (int64_t i = 0; i < length; ++i) {
      rows.fetch_rounding(i);
      convert_row(rows[i], dim, reinterpret_cast<I8*>(sink.reserve(dim)), scaled(i));
      sink.commit(dim);
    }
  };
  if (job.normalize) {
    round_rows([&, norms = job.inverse_norms](int64_t i) {
      return [&, inverse_norm = Simd::broadcast(norms[i])](Simd::F x) {
        return Simd::multiply(Simd::multiply(x, inverse_norm), inverse_scale);
      };
    });
  } else {
    round_rows([&](int64_t) { return [&](Simd::F x) { return Simd::multiply(x, inverse_scale); }; });
  }
}

template <class From, class To, class Dim>
inline void store_float(StoreJob& job, Sink& sink, Dim dim) {
  const int64_t bytes = int64_t(sizeof(To)) * dim;
  Rows<From> rows(job);
  for (int64_t i = 0; i < job.source.length; ++i) {
    rows.fetch(i + 1 + rows.ahead());
    convert_row(rows[i], dim, reinterpret_cast<To*>(sink.reserve(bytes)), [](Simd::F x) { return x; });
    sink.commit(bytes);
  }
}

template <class From, class To, class Dim>
inline void store_normalized(StoreJob& job, Sink& sink, Dim dim) {
  constexpr int kGroup = Simd::width;
  const int64_t bytes = int64_t(sizeof(To)) * dim, length = job.source.length;
  Rows<From> rows(job);
  Simd::F squares[kGroup];
  auto look = [&](int64_t i) {
    rows.fetch(i + 1 + rows.ahead());
    squares[i % kGroup] = i < length ? square_lanes(rows[i], dim) : Simd::zero();
  };
  for (int i = 0; i < kGroup; ++i) look(i);
  alignas(64) float norms[kGroup];
  for (int64_t first = 0; first < length; first += kGroup) {
    Simd::store(norms, inverse_norms(squares));
    // The norms of the next rows meanwhile, so that memory is read and written in turns.
    for (int64_t i = first; i < first + kGroup; ++i) {
      look(i + kGroup);
      if (i >= length) continue;
      const Simd::F scale = Simd::broadcast(norms[i - first]);
      To* const out = reinterpret_cast<To*>(sink.reserve(bytes));
      convert_row(rows[i], dim, out, [&](Simd::F x) { return Simd::multiply(x, scale); });
      sink.commit(bytes);
    }
  }
}

// The same type without normalisation: bits are kept, those of a NaN too.
template <class Element>
inline void copy_rows(StoreJob& job, Sink& sink) {
  const int64_t bytes = int64_t(sizeof(Element)) * job.dim;
  Rows<Element> rows(job);
  for (int64_t i = 0; i < job.source.length; ++i) {
    rows.fetch(i + 1 + rows.ahead());
    memcpy(sink.reserve(bytes), rows[i], size_t(bytes));
    sink.commit(bytes);
  }
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <int n>
struct Constant {
  constexpr operator int() const { return n; }
};

// function(dim), dim being a constant where it is one of the usual ones and they are `tuned`.
template <bool tuned, class Function>
inline void with_dim(int dim, Function function) {
  if constexpr (tuned) {
    if (dim == 48) return function(Constant<48>());
    if (dim == 64) return function(Constant<64>());
    if (dim == 96) return function(Constant<96>());
    if (dim == 128) return function(Constant<128>());
  }
  function(dim);
}

template <class From, class To>
void store_tokens(StoreJob& job) {
  // A row that is larger than the stage takes no profit from it either.
  Sink sink(job.out, job.stream && int64_t(sizeof(To)) * job.dim <= kStageBytes / 2, job.buffer);
  with_dim<kSame<From, float> && (kSame<To, F16> || kSame<To, I8>)>(job.dim, [&](auto dim) {
    if constexpr (kSame<To, I8>) {
      store_int8<From>(job, sink, dim);
    } else if (job.normalize) {
      store_normalized<From, To>(job, sink, dim);
    } else if constexpr (kSame<From, To>) {
      copy_rows<From>(job, sink);
    } else {
      store_float<From, To>(job, sink, dim);
    }
  });
  sink.finish(!job.next);
  job.fetched = job.fetched > job.source.length ? job.fetched - job.source.length : 0;
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
  sink.finish(true);
}

}  // namespace
