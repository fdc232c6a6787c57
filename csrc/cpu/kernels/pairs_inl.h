// What the screen leaves: pairs of a document token and a lane of a panel, token << 8 | lane.
//
// A pair's bits come from the multiply-adds of the tile in the order of the tile, for which rows have to be turned
// around. So where there are many pairs, a plain product of rows comes first, which costs a third: it is off by the
// roundings of fp32 alone, and leaves few.
#pragma once

#include "narrow_inl.h"

#ifdef EDGECOLBERT_SCREENS
namespace {

template <class Element>
class PairScore {
 public:
  // Pairs of document tokens from `first` on with registers from `r` on.
  PairScore(const ScoreJob& job, Widener<DotF32, Element>& widener, int64_t r, int64_t first)
      : job_(job),
        widener_(widener),
        pairs_(job.screen->pairs),
        rows_(job.group->rows + r * Simd::width),
        words_(reinterpret_cast<const float*>(job.group->words_f32) + r * job.dim * Simd::width),
        slack_(job.group->margins + (kMarginFactors * r + kOfSum) * Simd::width),
        best_(job.best + r * Simd::width),
        index_(job.index + r * Simd::width),
        first_(first) {}

  // So many are worth a product of rows first; which wants rows as they are stored.
  bool many(int64_t pairs) const { return widener_.feedable() && pairs > Simd::width; }

  // Keeps those that may be better than their lane's best, and returns how many these are. No document token is longer
  // than `norm`.
  template <int registers>
  int64_t keep_best(int64_t pairs, float norm) {
    fill_up(pairs);
    with_dim(job_.dim, [&](auto dim) { multiply_rows(pairs, dim); });
    pairs = keep_near<registers>(pairs, best_, norm);
    if (pairs <= Simd::width) return pairs;
    // The best of the products stand higher. Seldom are there enough pairs to look for them.
    alignas(64) float largest[registers * Simd::width];
    for (int i = 0; i < registers * Simd::width; ++i) largest[i] = best_[i];
    for (int64_t p = 0; p < pairs; ++p) {
      float& top = largest[pairs_[p] & 0xff];
      top = top > job_.screen->products[p] ? top : job_.screen->products[p];
    }
    return keep_near<registers>(pairs, largest, norm);
  }

  // A token with every lane; tokens[i] belongs to lane Scores::kLaneOf[i].
  template <int registers>
  void score_lanes(const int32_t* tokens) {
    constexpr int count = registers * Simd::width;
    alignas(64) float values[count];
    alignas(64) int32_t of_lane[Scores::lanes];
    for (int i = 0; i < Scores::lanes; ++i) of_lane[Scores::kLaneOf[i]] = int32_t(first_) + tokens[i];
    multiply_add_pairs<registers, registers>(of_lane, nullptr, values);
    for (int i = 0; i < count; i += Simd::width) {
      Simd::F best = Simd::load(best_ + i);
      const Simd::F value = Simd::load(values + i);
      if (job_.argmax) {  // blocks before have lower tokens: of equals the first stays
        Simd::I index = Simd::load(index_ + i);
        Simd::take_greater(best, index, value, Simd::load(of_lane + i));
        Simd::store(index_ + i, index);
      } else {
        best = Simd::maximum(value, best);
      }
      Simd::store(best_ + i, best);
    }
  }

  // Two registers of pairs at a time hide the latency of their sums.
  template <int registers>
  [[gnu::noinline]] void score(int64_t pairs) {
    fill_up(pairs);
    int64_t p = 0;
    for (; pairs - p > Simd::width; p += 2 * Simd::width) score_batch<registers, 2>(p, pairs);
    if (p < pairs) score_batch<registers, 1>(p, pairs);
  }

 private:
  static constexpr int kMostBatches = 2;

  // Those whose products are as large as that of their lane, but for the roundings of fp32.
  template <int registers>
  int64_t keep_near(int64_t pairs, const float* largest, float norm) {
    Simd::F limits[kPanelRegisters];
    for (int r = 0; r < kPanelRegisters; ++r) {
      const int i = r < registers ? r : registers - 1;
      const Simd::F slack =
          Simd::multiply(Simd::load(slack_ + kMarginFactors * i * Simd::width), Simd::broadcast(norm));
      limits[r] = Simd::subtract(Simd::load(largest + i * Simd::width), slack);
    }
    return Scores::keep_pairs(pairs_, pairs, job_.screen->products, limits);
  }

  // Up to whole batches, with the last one again.
  void fill_up(int64_t pairs) {
    for (int64_t p = pairs; p < round_up(pairs, kMostBatches * Simd::width); ++p) pairs_[p] = pairs_[pairs - 1];
  }

  const Element* row(int64_t token) const {
    const Tokens& document = job_.document;
    token = document.kept ? document.kept[token] : token;
    return reinterpret_cast<const Element*>(document.data + token * document.token_stride);
  }

  template <class Dim>
  [[gnu::noinline]] void multiply_rows(int64_t pairs, Dim dim) {
    for (int64_t p = 0; p < pairs; p += Simd::width) {
      Simd::F sums[Simd::width];
#pragma GCC unroll 16
      for (int i = 0; i < Simd::width; ++i) {
        const Element* const document = row(first_ + (pairs_[p + i] >> 8));
        const float* const query = reinterpret_cast<const float*>(rows_[pairs_[p + i] & 0xff]);
        Simd::F sum = Simd::zero();
        for_each_register(document, dim,
                          [&](int k, Simd::F x) { sum = Simd::multiply_add(x, Simd::load(query + k), sum); });
        sums[i] = sum;
      }
      Simd::store(job_.screen->products + p, Simd::sum_each(sums));
    }
  }

  template <int registers, int batches>
  void score_batch(int64_t p, int64_t pairs) {
    constexpr int count = batches * Simd::width;
    alignas(64) float values[count];
    alignas(64) int32_t lanes[count], tokens[count];
    for (int i = 0; i < count; ++i) {
      lanes[i] = int32_t(pairs_[p + i] & 0xff);
      tokens[i] = int32_t(first_) + int32_t(pairs_[p + i] >> 8);
    }
    multiply_add_pairs<registers, batches>(tokens, lanes, values);
    // Those that fill up the batch would wait for one another, all at the same address.
    const int valid = pairs - p < count ? int(pairs - p) : count;
    if (job_.argmax) return take(values, lanes, tokens, valid);
    for (int i = 0; i < valid; ++i) best_[lanes[i]] = best_[lanes[i]] > values[i] ? best_[lanes[i]] : values[i];
  }

  // No branches: whether a token is better than the one before it is as good as random.
  void take(const float* values, const int32_t* lanes, const int32_t* tokens, int count) {
    for (int i = 0; i < count; ++i) {
      const int lane = lanes[i];
      const float before = best_[lane];
      int32_t greater = -int32_t((values[i] > before) | ((values[i] == before) & (tokens[i] < index_[lane])));
      __asm__("" : "+r"(greater));  // else the compiler makes a branch of it
      best_[lane] = before > values[i] ? before : values[i];
      index_[lane] ^= (index_[lane] ^ tokens[i]) & greater;
    }
  }

  // values[i] = <query lane lanes[i], document token tokens[i]>; null: lane i.
  template <int registers, int batches>
  [[gnu::noinline]] void multiply_add_pairs(const int32_t* tokens, const int32_t* lanes, float* values) {
    constexpr int count = batches * Simd::width;
    if constexpr (sizeof(Element) > 1) {
      constexpr int dims_of_step = 16 / int(sizeof(Element));
      if (widener_.feedable() && job_.dim % dims_of_step == 0) {
        const Element* rows[count];
        for (int i = 0; i < count; ++i) rows[i] = row(tokens[i]);
        multiply_add_rows<registers, batches, dims_of_step>(rows, lanes, values);
        return;
      }
    }
    const float* rows[count];
    for (int i = 0; i < count; ++i) {
      uint32_t* const row = job_.screen->rows + i * widener_.stride();
      widener_.widen(tokens[i], tokens[i] + 1, row);
      rows[i] = reinterpret_cast<const float*>(row);
    }
    multiply_add_rows<registers, batches, 4>(rows, lanes, values);
  }

  template <int registers, int batches, int dims_of_step, class Row>
  void multiply_add_rows(const Row* const* rows, const int32_t* lanes, float* values) {
    if constexpr (registers == batches) {
      if (!lanes) return multiply_add_rows<registers, batches, dims_of_step>(rows, Own(), values);
    }
    multiply_add_rows<registers, batches, dims_of_step>(rows, Picked<registers, batches>(lanes), values);
  }

  // Query lanes of a dimension for every pair of a batch.
  template <int registers, int batches>
  struct Picked {
    Simd::I lanes[batches];
    explicit Picked(const int32_t* numbers) {
      for (int batch = 0; batch < batches; ++batch) lanes[batch] = Simd::load(numbers + batch * Simd::width);
    }
    [[gnu::always_inline]] Simd::F operator()(const float* query, int batch) const {
      Simd::I row[registers];
#pragma GCC unroll 4
      for (int i = 0; i < registers; ++i) row[i] = Simd::bits(Simd::load(query + i * Simd::width));
      return Simd::from_bits(Simd::pick(row, lanes[batch]));
    }
  };
  struct Own {
    [[gnu::always_inline]] Simd::F operator()(const float* query, int batch) const {
      return Simd::load(query + batch * Simd::width);
    }
  };

  // Lanes are pairs: the document's rows are turned around.
  template <int registers, int batches, int dims_of_step, class Row, class Query>
  void multiply_add_rows(const Row* const* rows, Query lanes, float* values) {
    const float* query = words_;
    Simd::F sum[batches];
    for (int batch = 0; batch < batches; ++batch) sum[batch] = Simd::zero();
    int dim = 0;
    for (; dim + dims_of_step <= job_.dim; dim += dims_of_step)
      multiply_add_step<registers, dims_of_step, dims_of_step>(rows, dim, query, lanes, sum);
    if constexpr (dims_of_step == 4) {  // rows are filled up
      if (job_.dim - dim == 1) multiply_add_step<registers, 4, 1>(rows, dim, query, lanes, sum);
      if (job_.dim - dim == 2) multiply_add_step<registers, 4, 2>(rows, dim, query, lanes, sum);
      if (job_.dim - dim == 3) multiply_add_step<registers, 4, 3>(rows, dim, query, lanes, sum);
    }
    for (int batch = 0; batch < batches; ++batch) Simd::store(values + batch * Simd::width, sum[batch]);
  }

  template <int registers, int dims_of_step, int dims, int batches, class Row, class Query>
  [[gnu::always_inline]] static void multiply_add_step(const Row* const* rows, int64_t dim, const float*& query,
                                                       const Query& lanes, Simd::F (&sum)[batches]) {
#pragma GCC unroll 2
    for (int batch = 0; batch < batches; ++batch) {
      Simd::F document[dims_of_step];
      Simd::transpose(rows + batch * Simd::width, dim, document);
#pragma GCC unroll 8
      for (int k = 0; k < dims; ++k)
        sum[batch] = Simd::multiply_add(lanes(query + k * registers * Simd::width, batch), document[k], sum[batch]);
    }
    query += dims * registers * Simd::width;
  }

  const ScoreJob& job_;
  Widener<DotF32, Element>& widener_;
  uint32_t* const pairs_;
  const char* const* const rows_;
  const float *const words_, *const slack_;
  float* const best_;
  int32_t* const index_;
  const int64_t first_;
};

}  // namespace
#endif
