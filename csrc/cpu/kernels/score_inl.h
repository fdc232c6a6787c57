// MaxSim of one document against register rows of query tokens.
//
// Lanes are query tokens, so the maximum over a document needs no horizontal step. Documents stay as they are stored;
// their tokens are widened on the way. One panel of query registers: two tiles take turns, each being widened while the
// other one is scored, and never leave the nearest cache. Several panels: a block of the document is widened while the
// first panel is scored, and kept for the others.
//
// A ragged end runs the last T tokens again, since a maximum may see a token twice; fewer than T tokens repeat the last
// one.
#pragma once

#include "tile_inl.h"
#include "widen_i8_inl.h"

namespace {

// Tokens of a document by their position among the kept ones, widened where the caller wants them.
template <class Dot, class Element>
class Widener {
 public:
  explicit Widener(const ScoreJob& job)
      : job_(job),
        stride_(widened_stride<Dot>(job.dim)),
        row_buffer_(reinterpret_cast<float*>(job.scratch)),
        feedable_(!job.normalize && (job.document.dim_stride == int64_t(sizeof(Element)) || job.dim == 1)) {}

  void widen(int64_t begin, int64_t end, uint32_t* out) {
    for_each_row(begin, end, [&](const auto* row) {
      store_widened(row, job_.dim, out, seen_);
      out += stride_;
    });
  }

  // visit(row) with contiguous elements, or floats where rows are normalised.
  template <class Visit>
  [[gnu::always_inline]] void for_each_row(int64_t begin, int64_t end, Visit visit) {
    const Tokens& tokens = job_.document;
    void* const copy = row_buffer_ + round_up(job_.dim, Simd::width);
    for (int64_t i = begin; i < end; ++i) {
      const char* const data = tokens.data + (tokens.kept ? tokens.kept[i] : i) * tokens.token_stride;
      const Element* const row = contiguous_row<Element>(data, tokens.dim_stride, job_.dim, copy);
      if constexpr (Dot::rounds_floats) {
        if (job_.normalize) {
          normalize_row(row, job_.dim, row_buffer_, job_.norm_epsilon);
          visit(const_cast<const float*>(row_buffer_));
          continue;
        }
      }
      visit(row);
    }
  }

  // For a tile to widen on the side; done at once, and nothing left to do, when rows need more than a conversion.
  Feed<Dot, Element> feed(int64_t begin, int64_t end, uint32_t* out) {
    if (!feedable_) {
      widen(begin, end, out);
      begin = end;
    }
    return Feed<Dot, Element>(job_.document, job_.dim, begin, end, out, &seen_);
  }

  // Rows [count, wanted) repeat the last of `count` rows.
  void repeat_last(uint32_t* rows, int64_t count, int64_t wanted) const {
    for (int64_t i = count; i < wanted; ++i)
      memcpy(rows + i * stride_, rows + (count - 1) * stride_, size_t(stride_) * 4);
  }

  uint32_t* rows() const { return reinterpret_cast<uint32_t*>(row_buffer_ + 2 * round_up(job_.dim, Simd::width)); }
  int64_t stride() const { return stride_; }
  bool sound() const { return seen_.sound(*job_.group, job_.dim); }
  bool feedable() const { return feedable_; }

 private:
  const ScoreJob& job_;
  const int64_t stride_;     // k-words
  float* const row_buffer_;  // one row in fp32, and one as it is stored; widened rows lie behind it
  const bool feedable_;
  Seen<Dot, Element> seen_;
};

template <class Dot, class Element, Pick pick>
class DocumentScore {
 public:
  explicit DocumentScore(const ScoreJob& job)
      : job_(job),
        group_(*job.group),
        length_(job.document.length),
        widener_(job),
        best_(reinterpret_cast<Lane*>(job.best)) {}

  // False when the values do not allow this way of computing; `best` and `index` are then undefined.
  bool run() {
    for (int64_t lane = 0; lane < group_.registers * Simd::width; lane += Simd::width) {
      Dot::store(best_ + lane, Dot::lowest());
      if (pick != Pick::maximum) Simd::store(job_.index + lane, Simd::zero_integer());
    }
    if (group_.registers == R) return roll<R>();
    if (group_.registers == 1) return roll<1>();
    return score_blocks();
  }

 private:
  using Lane = typename Dot::Lane;
  static constexpr int T = kTileTokens;
  static constexpr int R = kPanelRegisters;

  bool sound() const { return pick == Pick::argmax_or_nan || widener_.sound(); }

  template <int registers>
  bool roll() {
    uint32_t* const rows = widener_.rows();
    const int64_t first_tokens = length_ < T ? length_ : T;
    widener_.widen(0, first_tokens, rows);
    widener_.repeat_last(rows, first_tokens, T);
    if (!sound()) return false;
    uint32_t *now = rows, *next = rows + T * widener_.stride();
    NoFeed nothing;
    for (int64_t start = 0;;) {
      const int64_t left = length_ - start - T;  // tokens behind this tile
      if (left <= 0) {
        tile<registers>(now, 0, start, nothing);
        return sound();
      }
      const int64_t following = left < T ? length_ - T : start + T;
      auto feed = widener_.feed(following, following + T, next);
      tile<registers>(now, 0, start, feed);
      start = following;
      uint32_t* const scored = now;
      now = next;
      next = scored;
    }
  }

  bool score_blocks() {
    NoFeed nothing;
    for (int64_t done = 0; done < length_;) {
      const int64_t first = length_ - done < T && length_ >= T ? length_ - T : done;
      const int64_t tokens = length_ - first < job_.block_tokens ? length_ - first : job_.block_tokens;
      widen_and_score_panel(first, tokens);
      for (int64_t r = R <= group_.registers ? R : 1; r < group_.registers;) {
        const bool panel = r + R <= group_.registers;
        for (int64_t token = 0; token < tokens; token += T) {
          const int64_t start = start_of(token, tokens);
          uint32_t* const rows = widener_.rows() + start * widener_.stride();
          panel ? tile<R>(rows, r, first + start, nothing) : tile<1>(rows, r, first + start, nothing);
        }
        r += panel ? R : 1;
      }
      if (!sound()) return false;
      done = first + tokens;
    }
    return true;
  }

  // Tokens [first, first + tokens), with the first panel of query registers.
  void widen_and_score_panel(int64_t first, int64_t tokens) {
    const auto row = [&](int64_t i) { return widener_.rows() + i * widener_.stride(); };
    int64_t ready = tokens < T ? tokens : T;
    widener_.widen(first, first + ready, row(0));
    widener_.repeat_last(row(0), ready, T);
    for (int64_t token = 0; token < tokens; token += T) {
      const int64_t start = start_of(token, tokens);
      const int64_t wanted = ready + T < tokens ? ready + T : tokens;
      auto feed = widener_.feed(first + ready, first + wanted, row(ready));
      R <= group_.registers ? tile<R>(row(start), 0, first + start, feed) : tile<1>(row(start), 0, first + start, feed);
      ready = wanted;
    }
  }

  static int64_t start_of(int64_t token, int64_t tokens) {
    return token + T > tokens && tokens >= T ? tokens - T : token;
  }

  // Scores the tile of widened rows that stand for tokens `token` and on, against registers r and on.
  template <int registers, class Feeder>
  void tile(const uint32_t* rows, int64_t r, int64_t token, Feeder& feed) {
    const int64_t words = (job_.dim + Dot::dims_of_word - 1) / Dot::dims_of_word;
    const uint32_t* const query = Dot::words(group_) + r * words * Simd::width;
    Lane* const best = best_ + r * Simd::width;
    int32_t* const index = job_.index + r * Simd::width;
    score_tile<Dot, T, registers, pick>(rows, widener_.stride(), query, words, best, index, int32_t(token), feed);
    feed.finish();
  }

  const ScoreJob& job_;
  const QueryGroup& group_;
  const int64_t length_;
  Widener<Dot, Element> widener_;
  Lane* const best_;
};

#ifndef EDGECOLBERT_NO_FIXED_POINT
template <class Element>
bool score_fixed_point(const ScoreJob& job) {
  if (!(job.argmax ? DocumentScore<DotI16, Element, Pick::argmax>(job).run()
                   : DocumentScore<DotI16, Element, Pick::maximum>(job).run())) {
    return false;
  }
  const Simd::F scale = Simd::broadcast(kSimilarityScale);
  for (int64_t lane = 0; lane < job.group->registers * Simd::width; lane += Simd::width) {
    const Simd::I sum_i32 = Simd::load(reinterpret_cast<const int32_t*>(job.best) + lane);
    Simd::store(job.best + lane, Simd::multiply(Simd::to_float(sum_i32), scale));
  }
  return true;
}
#endif

#ifndef EDGECOLBERT_NO_INT8
inline void score_int8(const ScoreJob& job) {
  job.argmax ? DocumentScore<DotI8, I8, Pick::argmax>(job).run() : DocumentScore<DotI8, I8, Pick::maximum>(job).run();
  for (int64_t lane = 0; lane < job.group->registers * Simd::width; lane += Simd::width) {
    const Simd::I biased_i32 = Simd::load(reinterpret_cast<const int32_t*>(job.best) + lane);
    const Simd::I sum_i32 = Simd::subtract(biased_i32, Simd::load(job.group->biases + lane));
    Simd::store(job.best + lane, Simd::multiply(Simd::to_float(sum_i32), Simd::load(job.group->scales + lane)));
  }
}
#endif

// False: fp32 has to.
template <class Element>
inline bool score_integers([[maybe_unused]] const ScoreJob& job) {
#ifndef EDGECOLBERT_NO_FIXED_POINT
  return job.group->words_i16 && score_fixed_point<Element>(job);
#else
  return false;
#endif
}

template <>
inline bool score_integers<I8>([[maybe_unused]] const ScoreJob& job) {
#ifndef EDGECOLBERT_NO_INT8
  if (!job.group->words_i8 || job.group->margins) return false;
  score_int8(job);
  return true;
#else
  return false;
#endif
}

}  // namespace
