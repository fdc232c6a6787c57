// MaxSim of one document against register rows of query tokens.
//
// Lanes are query tokens, so the maximum over a document needs no horizontal step. Documents stay as they are stored; their tokens are
// widened into a scratch, a block at a time, while the first panel of query registers is scored; further panels find the block ready.
//
// A ragged end runs the last T tokens again, since a maximum may see a token twice; fewer than T tokens repeat the last one.
#pragma once

#include "tile_inl.h"

namespace {

// Widened tokens of a block of a document, row by row.
template <class Dot, class Element>
class DocumentBlock {
 public:
  explicit DocumentBlock(const ScoreJob& job)
      : job_(job),
        stride_(widened_stride<Dot>(job.dim)),
        row_buffer_(reinterpret_cast<float*>(job.scratch)),
        words_(reinterpret_cast<uint32_t*>(job.scratch) + 2 * round_up(job.dim, Simd::width)),
        feedable_(!job.normalize && (job.document.dim_stride == int64_t(sizeof(Element)) || job.dim == 1)) {}

  // Tokens [first, first + tokens) of the document.
  void start(int64_t first, int64_t tokens) {
    first_ = first;
    tokens_ = tokens;
    ready_ = 0;
  }

  // Widened rows of the tile of T tokens at `token` of the block.
  const uint32_t* tile(int64_t token, int tile_tokens) {
    const int64_t wanted = token + tile_tokens;
    for (; ready_ < wanted && ready_ < tokens_; ++ready_) widen(ready_);
    for (int64_t i = tokens_; i < wanted; ++i) memcpy(words_ + i * stride_, words_ + (tokens_ - 1) * stride_, size_t(stride_) * 4);
    return words_ + token * stride_;
  }

  // The next tokens of the block, for the tile at hand to widen; they count as ready.
  Feed<Dot, Element> feed(int count) {
    const int64_t begin = ready_;
    if (feedable_) ready_ = ready_ + count < tokens_ ? ready_ + count : tokens_;
    return {&job_.document, job_.dim, first_ + begin, first_ + ready_, words_ + begin * stride_, &seen_};
  }

  int64_t stride() const { return stride_; }
  bool sound() const { return seen_.sound(*job_.group, job_.dim); }

 private:
  void widen(int64_t i) {
    const Tokens& tokens = job_.document;
    const int64_t number = tokens.kept ? tokens.kept[first_ + i] : first_ + i;
    void* const copy = row_buffer_ + round_up(job_.dim, Simd::width);
    const Element* const row = contiguous_row<Element>(tokens.data + number * tokens.token_stride, tokens.dim_stride, job_.dim, copy);
    uint32_t* const out = words_ + i * stride_;
    if (job_.normalize) {
      normalize_row(row, job_.dim, row_buffer_);
      store_widened(row_buffer_, job_.dim, out, seen_);
    } else {
      store_widened(row, job_.dim, out, seen_);
    }
  }

  const ScoreJob& job_;
  const int64_t stride_;     // k-words
  float* const row_buffer_;  // one row in fp32, and one as it is stored
  uint32_t* const words_;
  const bool feedable_;
  int64_t first_ = 0, tokens_ = 0, ready_ = 0;
  Seen<Dot, Element> seen_;
};

template <class Dot, class Element, Pick pick>
class DocumentScore {
 public:
  explicit DocumentScore(const ScoreJob& job) : job_(job), block_(job), best_(reinterpret_cast<Lane*>(job.best)) {}

  // False when the values do not allow this way of computing; `best` and `index` are then undefined.
  bool run() {
    const QueryGroup& group = *job_.group;
    for (int64_t lane = 0; lane < group.registers * Simd::width; lane += Simd::width) {
      Dot::store(best_ + lane, Dot::lowest());
      if (pick != Pick::maximum) Simd::store(job_.index + lane, Simd::zero_integer());
    }
    const int64_t length = job_.document.length;
    for (int64_t done = 0; done < length;) {
      first_ = length - done < T && length >= T ? length - T : done;
      tokens_ = length - first_ < job_.block_tokens ? length - first_ : job_.block_tokens;
      block_.start(first_, tokens_);
      for (int64_t r = 0; r < group.registers;) r += r + R <= group.registers ? panel<R>(r) : panel<1>(r);
      if (pick != Pick::argmax_or_nan && !block_.sound()) return false;
      done = first_ + tokens_;
    }
    return true;
  }

 private:
  using Lane = typename Dot::Lane;
  static constexpr int T = kTileTokens;
  static constexpr int R = kPanelRegisters;

  template <int registers>
  int panel(int64_t r) {
    const int64_t words = Dot::fixed_point ? (job_.dim + 1) / 2 : job_.dim;
    const uint32_t* const query = (Dot::fixed_point ? job_.group->words_i16 : job_.group->words_f32) + r * words * Simd::width;
    Lane* const best = best_ + r * Simd::width;
    int32_t* const index = job_.index + r * Simd::width;
    for (int64_t token = 0; token < tokens_; token += T) {
      const int64_t start = token + T > tokens_ && tokens_ >= T ? tokens_ - T : token;
      const uint32_t* const tile = block_.tile(start, T);
      auto feed = block_.feed(T);
      const int32_t number = int32_t(first_ + start);
      if (pick != Pick::argmax_or_nan && feed.next < feed.end) {
        score_tile<Dot, T, registers, pick>(tile, block_.stride(), query, words, best, index, number, feed);
        while (feed.next < feed.end) feed.step();
      } else {
        NoFeed none;
        score_tile<Dot, T, registers, pick>(tile, block_.stride(), query, words, best, index, number, none);
      }
    }
    return registers;
  }

  const ScoreJob& job_;
  DocumentBlock<Dot, Element> block_;
  Lane* const best_;
  int64_t first_ = 0, tokens_ = 0;
};

#ifndef EDGECOLBERT_NO_FIXED_POINT
template <class Element>
bool score_fixed_point(const ScoreJob& job) {
  if (!(job.argmax ? DocumentScore<DotI16, Element, Pick::argmax>(job).run() : DocumentScore<DotI16, Element, Pick::maximum>(job).run())) {
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

template <class Element>
void score(const ScoreJob& job) {
#ifndef EDGECOLBERT_NO_FIXED_POINT
  if (job.group->words_i16 && score_fixed_point<Element>(job)) return;
#endif
  if (job.argmax ? DocumentScore<DotF32, Element, Pick::argmax>(job).run() : DocumentScore<DotF32, Element, Pick::maximum>(job).run()) return;
  DocumentScore<DotF32, Element, Pick::argmax_or_nan>(job).run();
}

}  // namespace
