// Token rows to packed storage and back: one pass over the rows, nothing between them and the result.
//
// A row is asked for some time before it is needed, then loaded, summed up where it is normalised, converted, and
// written: into the caches when the result is small, past them when it is large, so that no line of it is read before
// it is overwritten. Memory can be so fast that the instructions around a row count: which rows there are and how they
// lie is decided before the loop, and four norms share a root and a division. int8 must see a document's last value
// before it rounds the first: it looks at a document while it rounds the one before, whose rows are still in the
// second-level cache, in step. What it looks at is asked for earlier, and where the first-level cache is small into the
// second only: it has too few places for what is on its way, beside two streams of reads.
#pragma once

namespace {

// Past the caches: the address and the bytes of a row are multiples of Simd::stream_bytes.
template <bool past, class To>
[[gnu::always_inline]] inline void write(To* out, Simd::F x) {
  past ? Simd::stream(out, x) : Simd::store(out, x);
}

template <bool past, class To>
[[gnu::always_inline]] inline void write_two(To* out, Simd::F x, Simd::F y) {
  past ? Simd::stream_two(out, x, y) : Simd::store_two(out, x, y);
}

template <bool past, class From, class To, class Transform>
[[gnu::always_inline]] inline void convert_row(const From* row, int dim, To* out, Transform transform) {
  constexpr int w = Simd::width;
  int k = 0;
  for (; k + 2 * w <= dim; k += 2 * w) {
    write_two<past>(out + k, transform(Simd::load(row + k)), transform(Simd::load(row + k + w)));
  }
  if (k + w <= dim) {
    write<past>(out + k, transform(Simd::load(row + k)));
    k += w;
  }
  if (k < dim) Simd::store_first(out + k, transform(Simd::load_first(row + k, dim - k)), dim - k);
}

// How the rows of a document lie: one distance apart, by the list of the kept ones, or as it turns out to be, which
// allows for dimensions apart.
enum class Lie { even, listed, any };

// The kept rows of a document, one after the other.
template <class From, class Dim, Lie lie>
class Walk {
 public:
  Walk(const StoreJob& job, const Tokens& tokens, Dim dim, int64_t first = 0)
      : data_(tokens.data),
        token_stride_(tokens.token_stride),
        dim_stride_(tokens.dim_stride),
        number_(lie == Lie::any || tokens.kept ? tokens.kept : job.all_numbers),
        buffer_(job.buffer),
        dim_(dim) {
    listed() ? void(number_ += first) : void(data_ += first * token_stride_);
  }

  [[gnu::always_inline]] const char* next_address() {
    const char* const row = listed() ? data_ + *number_ * token_stride_ : data_;
    listed() ? void(++number_) : void(data_ += token_stride_);
    return row;
  }
  // The next row's elements side by side, valid until the next call.
  [[gnu::always_inline]] const From* next() {
    const char* const row = next_address();
    return lie == Lie::any ? contiguous_row<From>(row, dim_stride_, dim_, buffer_) : reinterpret_cast<const From*>(row);
  }

 private:
  [[gnu::always_inline]] bool listed() const { return lie == Lie::listed || (lie == Lie::any && number_); }

  const char* data_;
  int64_t token_stride_, dim_stride_;
  const int32_t* number_;
  char* buffer_;
  Dim dim_;
};

// Asks for the rows of a document from `rows_ahead` on, and then for the first ones of the next.
template <class From, class Dim, Lie lie>
class Asking {
 public:
  Asking(const StoreJob& job, const Tokens& tokens, const Tokens* next, Dim dim, bool into_first)
      : job_(&job), next_(next), walk_(job, tokens, dim), dim_(dim), into_first_(into_first) {
    if (lie == Lie::any && tokens.dim_stride != int64_t(sizeof(From))) return;
    if (job.rows_ahead < tokens.length) {
      begin(tokens, job.rows_ahead);
    } else {
      begin_next(job.rows_ahead - tokens.length);
    }
  }

  [[gnu::always_inline]] void row() {
    if (left_ == 0) return;
    const char* const row = walk_.next_address();
    const int64_t bytes = int64_t(sizeof(From)) * dim_;
    if (into_first_) {
      for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(row + k, 0, 3);
    } else {
      for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(row + k, 0, 2);
    }
    if (--left_ == 0) begin_next(0);
  }

 private:
  void begin(const Tokens& tokens, int64_t first) {
    walk_ = Walk<From, Dim, lie>(*job_, tokens, dim_, first);
    left_ = tokens.length - first;
  }
  void begin_next(int64_t first) {
    if (next_ && first < next_->length) begin(*next_, first);
    next_ = nullptr;
  }

  const StoreJob* job_;
  const Tokens* next_;
  Walk<From, Dim, lie> walk_;
  int64_t left_ = 0;
  Dim dim_;
  bool into_first_;
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Rows whose norms share a root.
template <bool normalize, Lie lie>
constexpr int kTogether = normalize && lie != Lie::any ? 4 : 1;

// Finds the largest |x| of a document, before and after normalisation, and the norms.
template <class From, class Dim, Lie lie>
class Look {
 public:
  Look(const StoreJob& job, const Tokens& tokens, const Tokens* next, float* inverse_norms, Dim dim)
      : walk_(job, tokens, dim), asking_(job, tokens, next, dim, job.roomy), inverse_norms_(inverse_norms), dim_(dim) {}

  template <int rows, bool normalize>
  [[gnu::always_inline]] void at() {
    Simd::F squares[rows];
    Simd::I largest[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      asking_.row();
      squares[r] = Simd::zero();
      largest[r] = Simd::zero_integer();
      for_each_register(walk_.next(), dim_, [&](int, Simd::F x) {
        largest[r] = Simd::maximum_unsigned(largest[r], Simd::absolute_bits(x));
        if (normalize) squares[r] = Simd::multiply_add(x, x, squares[r]);
      });
      before_ = Simd::maximum_unsigned(before_, largest[r]);
    }
    if (!normalize) return;
    inverse_norms_of(squares, inverse_norms_);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Simd::F normalized = Simd::multiply(Simd::from_bits(largest[r]), Simd::broadcast(inverse_norms_[r]));
      after_ = Simd::maximum_unsigned(after_, Simd::bits(normalized));
    }
    inverse_norms_ += rows;
  }

  template <bool normalize>
  Peaks peaks() const {
    const uint32_t raw = Simd::largest_unsigned(before_);
    return {raw < 0x7f800000u, bits_to_float(normalize ? Simd::largest_unsigned(after_) : raw)};
  }

 private:
  Walk<From, Dim, lie> walk_;
  Asking<From, Dim, lie> asking_;
  float* inverse_norms_;
  Dim dim_;
  Simd::I before_ = Simd::zero_integer(), after_ = Simd::zero_integer();  // bits
};

// The end of it. Apart, as it is needed before and behind the loop that also rounds.
template <bool normalize, class From, class Dim, Lie lie>
[[gnu::noinline]] Peaks look_at(Look<From, Dim, lie> look, int64_t rows) {
  constexpr int together = kTogether<normalize, lie>;
  int64_t i = 0;
  for (; i + together <= rows; i += together) look.template at<together, normalize>();
  for (; i < rows; ++i) look.template at<1, normalize>();
  return look.template peaks<normalize>();
}

constexpr float kSmallestPackedPeak = 2e-36f;  // 127 / x and x / 127 are normal numbers; below it a document is zero

// Rounds a document while it looks at the next one, so that memory is read all the time.
template <bool past, bool normalize, Lie lie, class From, class Dim>
inline void store_int8(StoreJob& job, Dim dim) {
  constexpr int together = kTogether<normalize, lie>;
  const int64_t length = job.source.length, next_length = job.next ? job.next->length : 0;
  if (!job.looked) {
    job.peaks = look_at<normalize>(Look<From, Dim, lie>(job, job.source, job.next, job.inverse_norms, dim), length);
  }
  job.looked = false;
  job.finite = job.peaks.finite;
  if (!job.finite) return;
  const bool zero = job.peaks.largest < kSmallestPackedPeak;
  job.scale = zero ? 0.0f : job.peaks.largest / 127.0f;
  const Simd::F inverse_scale = Simd::broadcast(zero ? 0.0f : 127.0f / job.peaks.largest);
  Walk<From, Dim, lie> walk(job, job.source, dim);
  Look<From, Dim, lie> look(job, job.next ? *job.next : Tokens{}, job.after, job.next_inverse_norms, dim);
  const float* inverse_norms = job.inverse_norms;
  I8* out = reinterpret_cast<I8*>(job.out);
  const auto round = [&]() __attribute__((always_inline)) {
    const Simd::F inverse_norm = Simd::broadcast(normalize ? *inverse_norms++ : 1.0f);
    convert_row<past>(walk.next(), dim, out, [&](Simd::F x) {
      return Simd::multiply(normalize ? Simd::multiply(x, inverse_norm) : x, inverse_scale);
    });
    out += dim;
  };
  // In step, so that both end together: memory would wait while the rest of a document is only rounded.
  int64_t rounded = 0, looked = 0;
  for (int64_t lead = 0; rounded + together <= length && looked + together <= next_length;) {
    if (lead <= 0) {
      look.template at<together, normalize>();
      looked += together;
      lead += length;
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) round();
      rounded += together;
      lead -= next_length;
    }
  }
  for (; rounded < length; ++rounded) round();
  job.peaks = look_at<normalize>(look, next_length - looked);
  job.looked = job.next != nullptr;
}

// Bits of the first magnitude that becomes infinite.
inline uint32_t bits_of_infinite(F16) { return 0x477ff000; }
inline uint32_t bits_of_infinite(BF16) { return 0x7f7f8000; }
inline uint32_t bits_of_infinite(float) { return 0x7f800000; }

template <bool past, Lie lie, class From, class To, class Dim>
inline void store_float(StoreJob& job, Dim dim) {
  Walk<From, Dim, lie> walk(job, job.source, dim);
  Asking<From, Dim, lie> asking(job, job.source, job.next, dim, true);
  To* out = reinterpret_cast<To*>(job.out);
  Simd::I largest = Simd::zero_integer();  // bits
  for (int64_t i = 0; i < job.source.length; ++i, out += dim) {
    asking.row();
    const From* const row = walk.next();
    convert_row<past>(row, dim, out, [&](Simd::F x) {
      largest = Simd::maximum_unsigned(largest, Simd::absolute_bits(x));
      return x;
    });
  }
  job.finite = Simd::largest_unsigned(largest) < bits_of_infinite(To{});
}

template <class From, int rows>
struct Measured {
  const From* row[rows];
  float inverse_norms[rows];
};

template <bool past, Lie lie, class From, class To, class Dim>
inline void store_normalized(StoreJob& job, Dim dim) {
  constexpr int together = kTogether<true, lie>;
  Walk<From, Dim, lie> walk(job, job.source, dim);
  Asking<From, Dim, lie> asking(job, job.source, job.next, dim, true);
  To* out = reinterpret_cast<To*>(job.out);
  const auto measure = [&](auto& some, auto count) __attribute__((always_inline)) {
    constexpr int rows = decltype(count){};
    Simd::F squares[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      asking.row();
      some.row[r] = walk.next();
      squares[r] = square_lanes(some.row[r], dim);
    }
    inverse_norms_of(squares, some.inverse_norms);
  };
  const auto store = [&](const auto& some, auto count) __attribute__((always_inline)) {
    constexpr int rows = decltype(count){};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r, out += dim) {
      const Simd::F scale = Simd::broadcast(some.inverse_norms[r]);
      convert_row<past>(some.row[r], dim, out, [&](Simd::F x) { return Simd::multiply(x, scale); });
    }
  };
  // Rows are measured while those before them are stored: what waits for a root would keep what comes next from
  // starting. Not where memory is what is waited for: it gives less to who runs further ahead. bfloat16 has too much
  // to do for that.
  constexpr int lead = past && !kSame<To, BF16> ? 0 : 1;
  const int64_t blocks = together > 1 ? job.source.length / together : 0;
  if constexpr (together > 1) {
    Measured<From, together> some, next;
    for (int64_t block = 0; block < blocks + lead; ++block) {
      if (block < blocks) measure(next, Constant<together>());
      if (lead == 0) some = next;
      if (block >= lead) store(some, Constant<together>());
      some = next;
    }
  }
  Measured<From, 1> one;
  for (int64_t i = blocks * together; i < job.source.length; ++i) {
    measure(one, Constant<1>());
    store(one, Constant<1>());
  }
  job.finite = true;
}

// The same type without normalisation: bits are kept, those of a NaN too.
template <bool past, Lie lie, class Element, class Dim>
inline void copy_rows(const StoreJob& job, Dim dim) {
  Walk<Element, Dim, lie> walk(job, job.source, dim);
  Asking<Element, Dim, lie> asking(job, job.source, job.next, dim, true);
  Element* out = reinterpret_cast<Element*>(job.out);
  for (int64_t i = 0; i < job.source.length; ++i, out += dim) {
    asking.row();
    const Element* const row = walk.next();
    if (past) {
      for (int k = 0; k < dim; k += Simd::width) Simd::stream_copy(out + k, row + k);
    } else {
      memcpy(out, row, sizeof(Element) * size_t(int(dim)));
    }
  }
}

template <bool past, Lie lie, class From, class To, class Dim>
inline void store_rows(StoreJob& job, Dim dim) {
  if constexpr (kSame<To, I8>) {
    job.normalize ? store_int8<past, true, lie, From>(job, dim) : store_int8<past, false, lie, From>(job, dim);
  } else if (job.normalize) {
    store_normalized<past, lie, From, To>(job, dim);
  } else if constexpr (kSame<From, To>) {
    copy_rows<past, lie, From>(job, dim);
    job.finite = true;
  } else {
    store_float<past, lie, From, To>(job, dim);
  }
}

// Where dimensions are side by side, as they mostly are, loops are made for that; from fp32 for the usual numbers of
// them.
template <bool past, class From, class To>
inline void store_usual_rows(StoreJob& job) {
  if (!Simd::specialises || job.source.dim_stride != int64_t(sizeof(From))) {
    return store_rows<false, Lie::any, From, To>(job, job.dim);
  }
  if constexpr (Simd::specialises) {
    const bool listed = job.source.kept || (job.next && job.next->kept);
    const auto store = [&](auto dim) {
      listed ? store_rows<past, Lie::listed, From, To>(job, dim) : store_rows<past, Lie::even, From, To>(job, dim);
    };
    if constexpr (kSame<From, float> && !kSame<To, float>) {
      with_dim(job.dim, store);
    } else {
      store(job.dim);
    }
  }
}

template <class To>
inline bool can_stream(const void* out, int64_t dim) {
  constexpr int64_t bytes = Simd::stream_bytes<To>;
  return Simd::streams && int64_t(reinterpret_cast<uintptr_t>(out)) % bytes == 0 &&
         dim * int64_t(sizeof(To)) % bytes == 0;
}

template <class From, class To>
void store_tokens(StoreJob& job) {
  if (!job.stream || !can_stream<To>(job.out, job.dim)) return store_usual_rows<false, From, To>(job);
  store_usual_rows<true, From, To>(job);
  if (!job.next) Simd::finish_streams();
}

template <bool past, class Element>
inline void load_rows(const LoadJob& job) {
  // Rows side by side are one long row.
  const bool dense = job.dim_stride == int64_t(sizeof(Element)) && job.token_stride == job.dim * job.dim_stride;
  const int64_t piece = dense ? 1024 : job.dim, total = job.rows * job.dim;
  const Simd::F scale = Simd::broadcast(job.scale);
  for (int64_t done = 0, row = 0; done < total; done += piece, ++row) {
    const int n = int(total - done < piece ? total - done : piece);
    const char* const data = job.source + (dense ? done * int64_t(sizeof(Element)) : row * job.token_stride);
    const Element* const x = dense ? reinterpret_cast<const Element*>(data)
                                   : contiguous_row<Element>(data, job.dim_stride, job.dim, job.buffer);
    if (kSame<Element, I8>) {
      convert_row<past>(x, n, job.out + done, [&](Simd::F value) { return Simd::multiply(value, scale); });
    } else {
      convert_row<past>(x, n, job.out + done, [](Simd::F value) { return value; });
    }
  }
}

template <class Element>
void load_tokens(const LoadJob& job) {
  if (!job.stream || !can_stream<float>(job.out, job.dim)) return load_rows<false, Element>(job);
  load_rows<true, Element>(job);
  Simd::finish_streams();
}

}  // namespace
