// Token rows to packed storage and back: one pass over the rows, nothing between them and the result.
//
// A row is asked for some time before it is needed, then loaded, summed up where it is normalised, converted, and
// written: into the caches when the result is small, past them when it is large, so that no line of it is read before
// it is overwritten. Rows one after the other, each with its own root and division, let the processor read and write
// all the time; norms computed for several rows at once, or lines collected before they are written, were slower. int8
// must see a document's last value before it rounds the first: it looks at a document while it rounds the one before,
// whose rows are still in the second-level cache. What it looks at is asked for earlier, and where the first-level
// cache is small no further than into the second: it has too few places for what is on its way, beside two streams of
// reads. Where it is roomy, everything is asked for from two pages on: no processor's own reads ahead go beyond the
// next.
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

// The kept tokens of a document, as contiguous elements. Holes and conversions keep the processor from running ahead on
// its own, so rows are asked for before they are needed, behind the last one those of `next`; `far` is how those are
// that int8 looks at.
template <class From, class Dim, bool far = false>
class Rows {
 public:
  Rows(const StoreJob& job, const Tokens& tokens, const Tokens* next, Dim dim)
      : tokens_(tokens),
        next_(next),
        dim_(dim),
        buffer_(job.buffer),
        rows_ahead_(1 + (job.roomy ? kAheadBytesRoomy : kAheadBytes) / row_bytes()),
        into_first_(!far || job.roomy) {}

  // Valid until the next call.
  [[gnu::always_inline]] const From* operator[](int64_t i) const {
    return contiguous_row<From>(address(tokens_, i), tokens_.dim_stride, dim_, buffer_);
  }

  // Asks for the row that comes so many bytes after row i.
  [[gnu::always_inline]] void ask_ahead(int64_t i) const {
    i += rows_ahead_;
    if (i < tokens_.length) {
      ask(tokens_, i);
    } else if (next_ && i - tokens_.length < next_->length) {
      ask(*next_, i - tokens_.length);
    }
  }

 private:
  static constexpr int64_t kAheadBytes = far ? 6144 : 2048, kAheadBytesRoomy = 8192;

  int64_t row_bytes() const { return int64_t(sizeof(From)) * dim_; }

  [[gnu::always_inline]] static const char* address(const Tokens& tokens, int64_t i) {
    return tokens.data + (tokens.kept ? tokens.kept[i] : i) * tokens.token_stride;
  }

  [[gnu::always_inline]] void ask(const Tokens& tokens, int64_t i) const {
    if (tokens.dim_stride != int64_t(sizeof(From))) return;
    const char* const row = address(tokens, i);
    if (into_first_) {
      for (int64_t k = 0; k < row_bytes(); k += 64) __builtin_prefetch(row + k, 0, 3);
    } else {
      for (int64_t k = 0; k < row_bytes(); k += 64) __builtin_prefetch(row + k, 0, 2);
    }
  }

  const Tokens tokens_;
  const Tokens* const next_;
  const Dim dim_;
  char* const buffer_;
  const int64_t rows_ahead_;
  const bool into_first_;
};

// Finds the largest |x| of a document, before and after normalisation, and the norms.
template <class From, class Dim>
class Look {
 public:
  Look(const StoreJob& job, const Tokens& tokens, const Tokens* next, float* inverse_norms, Dim dim)
      : rows_(job, tokens, next, dim), dim_(dim), inverse_norms_(job.normalize ? inverse_norms : nullptr) {}

  [[gnu::always_inline]] void at(int64_t i) {
    rows_.ask_ahead(i);
    Simd::I largest = Simd::zero_integer();
    if (!inverse_norms_) {
      for_each_register(rows_[i], dim_,
                        [&](int, Simd::F x) { largest = Simd::maximum_unsigned(largest, Simd::absolute_bits(x)); });
      before_ = Simd::maximum_unsigned(before_, largest);
      return;
    }
    Simd::F squares = Simd::zero();
    for_each_register(rows_[i], dim_, [&](int, Simd::F x) {
      largest = Simd::maximum_unsigned(largest, Simd::absolute_bits(x));
      squares = Simd::multiply_add(x, x, squares);
    });
    before_ = Simd::maximum_unsigned(before_, largest);
    const float norm = inverse_norms_[i] = inverse_norm_of(squares);
    const Simd::F normalized = Simd::multiply(Simd::from_bits(largest), Simd::broadcast(norm));
    after_ = Simd::maximum_unsigned(after_, Simd::bits(normalized));
  }

  Peaks peaks() const {
    const uint32_t raw = Simd::largest_unsigned(before_);
    return {raw < 0x7f800000u, bits_to_float(inverse_norms_ ? Simd::largest_unsigned(after_) : raw)};
  }

 private:
  const Rows<From, Dim, true> rows_;
  const Dim dim_;
  float* const inverse_norms_;
  Simd::I before_ = Simd::zero_integer(), after_ = Simd::zero_integer();  // bits
};

constexpr float kSmallestPackedPeak = 2e-36f;  // 127 / x and x / 127 are normal numbers; below it a document is zero

// Rounds a document while it looks at the next one, so that memory is read all the time.
template <bool past, class From, class Dim>
inline void store_int8(StoreJob& job, Dim dim) {
  const int64_t length = job.source.length, next_length = job.next ? job.next->length : 0;
  if (!job.looked) {
    Look<From, Dim> look(job, job.source, job.next, job.inverse_norms, dim);
    for (int64_t i = 0; i < length; ++i) look.at(i);
    job.peaks = look.peaks();
  }
  job.looked = false;
  job.finite = job.peaks.finite;
  if (!job.finite) return;
  const bool zero = job.peaks.largest < kSmallestPackedPeak;
  job.scale = zero ? 0.0f : job.peaks.largest / 127.0f;
  const Simd::F inverse_scale = Simd::broadcast(zero ? 0.0f : 127.0f / job.peaks.largest);
  const Rows<From, Dim> rows(job, job.source, nullptr, dim);
  Look<From, Dim> look(job, job.next ? *job.next : Tokens{}, job.after, job.next_inverse_norms, dim);
  I8* out = reinterpret_cast<I8*>(job.out);
  for (int64_t i = 0; i < length; ++i, out += dim) {
    if (i < next_length) look.at(i);
    if (job.normalize) {
      const Simd::F inverse_norm = Simd::broadcast(job.inverse_norms[i]);
      convert_row<past>(rows[i], dim, out,
                        [&](Simd::F x) { return Simd::multiply(Simd::multiply(x, inverse_norm), inverse_scale); });
    } else {
      convert_row<past>(rows[i], dim, out, [&](Simd::F x) { return Simd::multiply(x, inverse_scale); });
    }
  }
  for (int64_t i = length; i < next_length; ++i) look.at(i);
  job.peaks = look.peaks();
  job.looked = job.next != nullptr;
}

// Bits of the first magnitude that becomes infinite.
inline uint32_t bits_of_infinite(F16) { return 0x477ff000; }
inline uint32_t bits_of_infinite(BF16) { return 0x7f7f8000; }
inline uint32_t bits_of_infinite(float) { return 0x7f800000; }

template <bool past, class From, class To, class Dim>
inline void store_float(StoreJob& job, Dim dim) {
  const Rows<From, Dim> rows(job, job.source, job.next, dim);
  To* out = reinterpret_cast<To*>(job.out);
  Simd::I largest = Simd::zero_integer();  // bits
  for (int64_t i = 0; i < job.source.length; ++i, out += dim) {
    rows.ask_ahead(i);
    const From* const row = rows[i];
    if (job.normalize) {
      const Simd::F scale = Simd::broadcast(inverse_norm(row, dim));
      convert_row<past>(row, dim, out, [&](Simd::F x) { return Simd::multiply(x, scale); });
    } else {
      convert_row<past>(row, dim, out, [&](Simd::F x) {
        largest = Simd::maximum_unsigned(largest, Simd::absolute_bits(x));
        return x;
      });
    }
  }
  job.finite = Simd::largest_unsigned(largest) < bits_of_infinite(To{});
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// The same type without normalisation: bits are kept, those of a NaN too.
template <class Element>
inline void copy_rows(const StoreJob& job) {
  const Rows<Element, int> rows(job, job.source, job.next, job.dim);
  const int64_t bytes = int64_t(sizeof(Element)) * job.dim;
  for (int64_t i = 0; i < job.source.length; ++i) {
    rows.ask_ahead(i);
    memcpy(job.out + i * bytes, rows[i], size_t(bytes));
  }
}

template <bool past, class From, class To, class Dim>
inline void store_rows(StoreJob& job, Dim dim) {
  if constexpr (kSame<To, I8>) {
    store_int8<past, From>(job, dim);
  } else if (kSame<From, To> && !job.normalize) {
    copy_rows<From>(job);
    job.finite = true;
  } else {
    store_float<past, From, To>(job, dim);
  }
}

// Memory is so fast that the instructions around a row count.
template <bool past, class From, class To>
inline void store_usual_rows(StoreJob& job) {
  if constexpr (kSame<From, float> && (kSame<To, F16> || kSame<To, I8>)) {
    with_dim(job.dim, [&](auto dim) { store_rows<past, From, To>(job, dim); });
  } else {
    store_rows<past, From, To>(job, job.dim);
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
