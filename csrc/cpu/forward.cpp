#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "buffer.h"
#include "driver.h"
#include "parallel.h"

namespace edgecolbert {
namespace {

// Query lanes that are scored against one document after another: as bytes for the screen, and the rows that it asks
// for again, they stay in a second-level cache beside a document.
constexpr int64_t kGroupLanes = 2048;
// Widened document tokens at a time: a fraction of any second-level cache.
constexpr int64_t kBlockBytes = 128 * 1024;
// Below this many multiply-adds a call is over before a second thread has woken up.
constexpr int64_t kSerialWork = 8'000'000;

std::atomic<int64_t> documents_tried{0}, documents_screened{0};

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t total_tokens(const Sequences& sequences) {
  if (sequences.offsets) return sequences.offsets[sequences.count] - sequences.offsets[0];
  if (!sequences.lengths) return sequences.count * sequences.length;
  int64_t total = 0;
  for (int64_t j = 0; j < sequences.count; ++j) total += sequences.lengths[j];
  return total;
}

// Of the documents that the call scores: a few of a large collection when pairs were chosen.
int64_t longest_document(const ForwardCall& call) {
  const Sequences& documents = call.documents;
  const bool chosen = call.pairs.layout == Layout::indexed;
  int64_t length = 0;
  for (int64_t i = 0; i < (chosen ? call.pairs.count : documents.count); ++i)
    length = std::max(length, documents.tokens(chosen ? call.pairs.document_index[i] : i));
  return length;
}

void check_range(const Pairs& pairs, int64_t queries, int64_t documents) {
  for (int64_t p = 0; p < pairs.count; ++p) {
    if (pairs.query_index[p] < 0 || pairs.query_index[p] >= queries) throw std::out_of_range("query_index");
    if (pairs.document_index[p] < 0 || pairs.document_index[p] >= documents) throw std::out_of_range("document_index");
  }
}

// Kept query tokens side by side in register lanes, several short queries to a register where they meet the same
// documents.
class PackedQueries {
 public:
  struct Group {
    QueryGroup registers;
    int64_t first_query, last_query;  // half open, positions in the order of query()
    int64_t first_register;
    bool integers;
  };

  PackedQueries(const Kernels& kernels, const ForwardCall& call, int64_t group_lanes, int threads)
      : width_(kernels.width),
        masked_(call.queries.mask != nullptr),
        first_lane_(size_t(call.queries.count)),
        kept_(size_t(call.queries.count)),
        group_of_(size_t(call.queries.count)) {
    const Integer integer = integer_of(kernels, call);
    const std::vector<char> admitted = admit(kernels, call, integer);
    rows_.reserve(size_t(total_tokens(call.queries) + width_));
    // Queries that integers cannot represent stand in groups of their own: a score is a function of its query and
    // document alone.
    lay_out(call.queries, group_lanes, admitted, true);
    lay_out(call.queries, group_lanes, admitted, false);
    close_group();
    words_f32_.reserve(registers() * width_ * call.queries.dim);
    if (integer == Integer::i16) words_i16_.reserve(registers() * width_ * ((call.queries.dim + 1) / 2));
    const bool screen = screens(kernels, call, integer);
    if (integer == Integer::i8 || screen) {
      words_of_token_i8_ = words_of(call.queries.dim, screen ? kScreenDimsOfWord : kernels.int8_dims_of_word);
      words_i8_.reserve(registers() * width_ * words_of_token_i8_);
      biases_.reset(new Buffer<int32_t>(registers() * width_));
      scales_.reset(new Buffer<float>(registers() * width_));
    }
    if (screen) {
      margins_.reset(new Buffer<float>(kMarginFactors * registers() * width_));
      keep_rows(call);
    }
    pack(kernels, call, threads, integer);
  }

  const std::vector<Group>& groups() const { return groups_; }
  int64_t group_of(int64_t query) const { return group_of_[size_t(query)]; }
  int64_t query(int64_t position) const { return order_[size_t(position)]; }
  int64_t registers() const { return int64_t(rows_.size()) / width_; }
  int64_t largest_group() const {
    int64_t largest = 0;
    for (const Group& group : groups_) largest = std::max(largest, group.registers.registers);
    return largest;
  }
  int64_t lane_in_group(const Group& group, int64_t query) const {
    return first_lane_[size_t(query)] - group.first_register * width_;
  }
  int64_t kept(int64_t query) const { return kept_[size_t(query)]; }
  bool masked() const { return masked_; }
  bool screened() const { return margins_ != nullptr; }
  // Token number of each kept token of a query, where there is a mask.
  const int32_t* tokens(int64_t query) const { return tokens_.data() + first_lane_[size_t(query)]; }

 private:
  struct Words {
    void reserve(int64_t size) { buffer.reset(new Buffer<uint32_t>(size)); }
    uint32_t* data() { return buffer ? buffer->data() : nullptr; }
    std::unique_ptr<Buffer<uint32_t>> buffer;
  };

  static Integer integer_of(const Kernels& kernels, const ForwardCall& call) {
    if (!call.fixed_point) return Integer::none;
    if (call.documents.dtype != DType::i8) return kernels.fixed_point ? Integer::i16 : Integer::none;
    // Normalised rows are no integers.
    return kernels.int8_dims_of_word > 0 && !call.normalize ? Integer::i8 : Integer::none;
  }

  static bool screens(const Kernels& kernels, const ForwardCall& call, Integer integer) {
    const int64_t shortest = integer == Integer::i16 ? kernels.shortest_screened_fast : kernels.shortest_screened;
    if (!call.screen || integer == Integer::i8 || call.queries.dim > kernels.screened_dimensions) return false;
    const int64_t longest = longest_document(call);
    return longest >= shortest && longest <= INT32_MAX;  // tokens that can win are noted as int32
  }

  static int64_t words_of(int64_t dim, int64_t dims_of_word) { return round_up(dim, dims_of_word) / dims_of_word; }

  static std::vector<char> admit(const Kernels& kernels, const ForwardCall& call, Integer integer) {
    const Sequences& queries = call.queries;
    if (integer == Integer::none) return std::vector<char>(size_t(queries.count), 0);
    Buffer<float> buffer(2 * round_up(queries.dim, kernels.width));
    std::vector<const char*> rows;
    std::vector<char> admitted;
    for (int64_t q = 0; q < queries.count; ++q) {
      rows.clear();
      for_each_kept(queries, q, [&](int64_t, const char* row) { rows.push_back(row); });
      AdmitJob job{};
      job.rows = rows.data();
      job.count = int64_t(rows.size());
      job.dtype = queries.dtype;
      job.dim = queries.dim;
      job.dim_stride = queries.dim_stride;
      job.normalize = call.normalize;
      job.integer = integer;
      job.buffer = buffer.data();
      admitted.push_back(kernels.admits_integers(&job));
    }
    return admitted;
  }

  template <class Visit>
  static void for_each_kept(const Sequences& queries, int64_t q, Visit visit) {
    const uint8_t* const mask = queries.mask_of(q);
    const char* const start = queries.start(q);
    for (int64_t i = 0; i < queries.tokens(q); ++i) {
      if (!mask || mask[i]) visit(i, start + i * queries.stride(q));
    }
  }

  void lay_out(const Sequences& queries, int64_t group_lanes, const std::vector<char>& admitted, bool integers) {
    for (int64_t q = 0; q < queries.count; ++q) {
      if (bool(admitted[size_t(q)]) != integers) continue;
      const bool fits = !groups_.empty() && groups_.back().integers == integers &&
                        int64_t(rows_.size()) - groups_.back().first_register * width_ < group_lanes;
      if (!fits) open_group(integers);
      first_lane_[size_t(q)] = int64_t(rows_.size());
      for_each_kept(queries, q, [&](int64_t token, const char* row) {
        rows_.push_back(row);
        if (masked_) tokens_.push_back(int32_t(token));
      });
      kept_[size_t(q)] = int64_t(rows_.size()) - first_lane_[size_t(q)];
      group_of_[size_t(q)] = int64_t(groups_.size()) - 1;
      order_.push_back(q);
      groups_.back().last_query = int64_t(order_.size());
    }
  }

  void open_group(bool integers) {
    close_group();
    Group group{};
    group.integers = integers;
    group.first_query = group.last_query = int64_t(order_.size());
    group.first_register = int64_t(rows_.size()) / width_;
    groups_.push_back(group);
  }

  void close_group() {
    if (groups_.empty()) return;
    rows_.resize(size_t(round_up(int64_t(rows_.size()), width_)), nullptr);
    if (masked_) tokens_.resize(rows_.size());
    groups_.back().registers.registers = int64_t(rows_.size()) / width_ - groups_.back().first_register;
  }

  // The screen reads whole query tokens: those of the caller where they are as it wants them.
  void keep_rows(const ForwardCall& call) {
    const Sequences& queries = call.queries;
    const bool whole =
        queries.dtype == DType::f32 && queries.dim_stride == 4 && queries.dim % width_ == 0 && !call.normalize;
    if (whole) return;
    const int64_t stride = round_up(queries.dim, width_);
    token_rows_.reset(new Buffer<float>(int64_t(rows_.size()) * stride));
    for (size_t lane = 0; lane < rows_.size(); ++lane)
      row_addresses_.push_back(reinterpret_cast<const char*>(token_rows_->data() + int64_t(lane) * stride));
  }

  void pack(const Kernels& kernels, const ForwardCall& call, int threads, Integer integer) {
    const int32_t dim = call.queries.dim;
    const int64_t row = round_up(dim, width_);
    threads = threads_for(registers() / 64 + 1, threads);
    Buffer<float> buffers(2 * row * threads);
    parallel_for(int64_t(groups_.size()), threads, [&](int64_t g, int thread) {
      QueryGroup& group = groups_[size_t(g)].registers;
      const int64_t first_register = groups_[size_t(g)].first_register;
      const Integer used = groups_[size_t(g)].integers ? integer : Integer::none;
      const int64_t words = (dim + 1) / 2, words_i8 = words_of_token_i8_;
      group.words_f32 = words_f32_.data() + first_register * width_ * dim;
      if (used == Integer::i16) group.words_i16 = words_i16_.data() + first_register * width_ * words;
      if (margins_) {
        group.margins = margins_->data() + kMarginFactors * first_register * width_;
        group.rows = (token_rows_ ? row_addresses_ : rows_).data() + first_register * width_;
      }
      if (used == Integer::i8 || margins_) {
        group.words_i8 = words_i8_.data() + first_register * width_ * words_i8;
        group.biases = biases_->data() + first_register * width_;
        group.scales = scales_->data() + first_register * width_;
      }
      bool screened = true;
      const int64_t in_panels = group.registers / kernels.panel_registers * kernels.panel_registers;
      for (int64_t r = 0; r < group.registers; ++r) {
        const int64_t panel = r < in_panels ? kernels.panel_registers : 1;
        const int64_t first = r / panel * panel, inside = r % panel;
        PackJob job{};
        job.rows = rows_.data() + (first_register + r) * width_;
        job.dtype = call.queries.dtype;
        job.dim = dim;
        job.dim_stride = call.queries.dim_stride;
        job.normalize = call.normalize;
        job.words_f32 = const_cast<uint32_t*>(group.words_f32) + (first * dim + inside) * width_;
        if (group.words_i16) job.words_i16 = const_cast<uint32_t*>(group.words_i16) + (first * words + inside) * width_;
        if (group.words_i8) {
          job.words_i8 = const_cast<uint32_t*>(group.words_i8) + (first * words_i8 + inside) * width_;
          job.biases = const_cast<int32_t*>(group.biases) + r * width_;
          job.scales = const_cast<float*>(group.scales) + r * width_;
        }
        if (group.margins) {
          job.margins = const_cast<float*>(group.margins) + kMarginFactors * r * width_;
          if (token_rows_) job.token_rows = token_rows_->data() + (first_register + r) * width_ * row;
        }
        job.word_stride = panel * width_;
        job.buffer = buffers.data() + 2 * row * thread;
        kernels.pack_register(&job);
        // Not finite counts as infinite, so that a plain maximum serves.
        group.peak = std::max(group.peak, std::isfinite(job.peak) ? job.peak : INFINITY);
        screened = screened && job.screened;
      }
      if (margins_ && !screened) {
        group.margins = nullptr;
        group.words_i8 = nullptr;
      }
    });
  }

  const int64_t width_;
  const bool masked_;
  std::vector<Group> groups_;
  std::vector<const char*> rows_;                      // of every lane
  std::vector<const char*> row_addresses_;             // of every lane, where tokens are copied for the screen
  std::vector<int32_t> tokens_;                        // of every lane, where there is a mask
  std::vector<int64_t> first_lane_, kept_, group_of_;  // of every query
  std::vector<int64_t> order_;                         // queries as the groups hold them
  Words words_f32_, words_i16_, words_i8_;
  int64_t words_of_token_i8_ = 0;
  std::unique_ptr<Buffer<int32_t>> biases_;
  std::unique_ptr<Buffer<float>> scales_, margins_, token_rows_;
};

// Kept tokens of the document at hand.
struct DocumentView {
  int64_t document = -1;
  Tokens tokens{};
  int64_t first_masked = -1;  // -1: none is masked
};

class Scorer {
 public:
  Scorer(const Kernels& kernels, const ForwardCall& call)
      : kernels_(kernels),
        call_(call),
        wanted_threads_(worth_threads(call)),
        queries_(kernels, call, lanes_of_a_group(), wanted_threads_),
        tasks_(count_tasks()),
        threads_(threads_for(tasks_, wanted_threads_)),
        lanes_(round_up(queries_.largest_group() * kernels.width, 64)),
        row_(round_up(call.documents.dim, 2 * kernels.width)),
        best_(lanes_ * threads_),
        index_(lanes_ * threads_),
        kept_stride_(call.documents.mask ? round_up(longest_document(call), 16) : 0),
        kept_(kept_stride_ * threads_),
        views_(size_t(threads_)) {
    const int64_t tile = kernels.tile_tokens;
    const int64_t block = std::min(kBlockBytes / (row_ * 4), longest_document(call) + tile - 1);
    block_tokens_ = std::max(tile, block / tile * tile);
    scratch_stride_ = round_up((2 * row_ + (block_tokens_ + tile) * row_) * 4, 64);
    scratch_.reset(new Buffer<char>(scratch_stride_ * threads_));
    if (queries_.screened()) prepare_screens();
  }

  void run() {
    parallel_for(tasks_, threads_, [&](int64_t task, int thread) { score(task, thread); });
    for (const Screen& screen : screens_) {
      documents_tried.fetch_add(screen.tried, std::memory_order_relaxed);
      documents_screened.fetch_add(screen.done, std::memory_order_relaxed);
    }
  }

 private:
  void prepare_screens() {
    const int64_t tokens = block_tokens_ + kernels_.tile_tokens, width = kernels_.width;
    const int64_t narrowed = tokens * round_up(call_.documents.dim, kScreenDimsOfWord * width) / kScreenDimsOfWord;
    const int64_t lanes = kernels_.panel_registers * width, scores = tokens * lanes / 2;
    const int64_t hits = block_tokens_, pairs = (block_tokens_ + 2) * lanes, rows = std::max(2 * width, lanes) * row_;
    const int64_t stride = round_up(narrowed + scores + hits + 2 * pairs + rows, 16);
    screen_words_.reset(new Buffer<uint32_t>(stride * threads_));
    screens_.resize(size_t(threads_));
    for (int thread = 0; thread < threads_; ++thread) {
      Screen& screen = screens_[size_t(thread)];
      uint32_t* next = screen_words_->data() + stride * thread;
      const auto take = [&](int64_t words) { return std::exchange(next, next + words); };
      screen.narrowed = take(narrowed);
      screen.scores = reinterpret_cast<int16_t*>(take(scores));
      screen.products = reinterpret_cast<float*>(take(pairs));
      screen.rows = take(rows);
      screen.hits = take(hits);
      screen.pairs = take(pairs);
    }
  }

  static int worth_threads(const ForwardCall& call) {
    int64_t document_tokens = total_tokens(call.documents), query_tokens = total_tokens(call.queries);
    if (call.pairs.layout == Layout::own) query_tokens /= std::max<int64_t>(call.queries.count, 1);
    if (call.pairs.layout == Layout::indexed) {
      query_tokens /= std::max<int64_t>(call.queries.count, 1);
      document_tokens = document_tokens / std::max<int64_t>(call.documents.count, 1) * call.pairs.count;
    }
    const double work = double(document_tokens) * double(query_tokens) * call.documents.dim;
    return work < kSerialWork ? 1 : call.threads;
  }

  int64_t lanes_of_a_group() const {
    if (call_.pairs.layout != Layout::all) return 0;  // a query each: they meet different documents
    const int64_t panel = int64_t(kernels_.panel_registers) * kernels_.width;
    const int64_t documents = std::max<int64_t>(call_.documents.count, 1);
    const int64_t groups = (8 * int64_t(wanted_threads_) + documents - 1) / documents;
    if (wanted_threads_ == 1 || groups == 1) return kGroupLanes;
    return std::clamp(round_up(total_tokens(call_.queries) / groups, panel), panel, kGroupLanes);
  }

  int64_t count_tasks() const {
    switch (call_.pairs.layout) {
      case Layout::all:
        return call_.documents.count * int64_t(queries_.groups().size());
      case Layout::own:
        return call_.documents.count;
      case Layout::indexed:
        return call_.pairs.count;
    }
    return 0;
  }

  int64_t document_of(int64_t task) const {
    if (call_.pairs.layout == Layout::all) return task % call_.documents.count;
    return call_.pairs.layout == Layout::indexed ? call_.pairs.document_index[task] : task;
  }

  // Nothing where the task behind this one has the same document, or is none.
  Tokens next_document(int64_t task, int64_t document) const {
    Tokens next{};
    if (task + 1 == tasks_) return next;
    const int64_t j = document_of(task + 1);
    if (j == document) return next;
    next.data = call_.documents.start(j);
    next.token_stride = call_.documents.stride(j);
    next.length = call_.documents.tokens(j);
    return next;
  }

  void score(int64_t task, int thread) {
    const int64_t document = document_of(task);
    int64_t group = 0;
    if (call_.pairs.layout == Layout::all) {
      group = task / call_.documents.count;
    } else if (call_.pairs.layout == Layout::own) {
      group = queries_.group_of(task / (call_.documents.count / call_.queries.count));
    } else {
      group = queries_.group_of(call_.pairs.query_index[task]);
    }
    const DocumentView& view = look_at(document, thread);
    const PackedQueries::Group& queries = queries_.groups()[size_t(group)];
    float* const best = best_.data() + lanes_ * thread;
    int32_t* const index = index_.data() + lanes_ * thread;
    if (view.tokens.length > 0 && queries.registers.registers > 0) {
      ScoreJob job{};
      job.document = view.tokens;
      if (queries_.screened() && kernels_.screen_wants_next) job.next = next_document(task, document);
      job.dtype = call_.documents.dtype;
      job.dim = call_.documents.dim;
      job.normalize = call_.normalize;
      // scale * v / max(|scale * v|, epsilon) = v / max(|v|, epsilon / scale); by a scale of 0, infinity: it becomes 0.
      job.norm_epsilon = call_.documents.scales ? kNormEpsilon / call_.documents.scales[document] : kNormEpsilon;
      job.argmax = call_.winners.data != nullptr;
      job.group = &queries.registers;
      job.block_tokens = block_tokens_;
      job.scratch = scratch_->data() + scratch_stride_ * thread;
      job.screen = queries_.screened() ? &screens_[size_t(thread)] : nullptr;
      job.best = best;
      job.index = index;
      kernels_.score(&job);
    }
    const float scale = call_.documents.scales && !call_.normalize ? call_.documents.scales[document] : 1.0f;
    for (int64_t position = queries.first_query; position < queries.last_query; ++position) {
      const int64_t q = queries_.query(position);
      const int64_t lane = queries_.lane_in_group(queries, q);
      const int64_t pair = call_.pairs.layout == Layout::all ? q * call_.documents.count + document : task;
      finish_pair(view, q, pair, scale, best + lane, index + lane);
    }
  }

  const DocumentView& look_at(int64_t document, int thread) {
    DocumentView& view = views_[size_t(thread)];
    if (view.document == document) return view;
    const Sequences& documents = call_.documents;
    view.document = document;
    view.tokens.data = documents.start(document);
    view.tokens.token_stride = documents.stride(document);
    view.tokens.dim_stride = documents.dim_stride;
    view.tokens.length = documents.tokens(document);
    view.tokens.kept = nullptr;
    // Documents of one array are read one after another: prefetching may run ahead into the next one.
    const bool dense = !documents.pointers && documents.token_stride > 0 && documents.data;
    const int64_t last = documents.count - 1;
    view.tokens.memory_end = dense ? documents.start(last) + (documents.tokens(last) - 1) * documents.token_stride +
                                         (documents.dim - 1) * documents.dim_stride + bytes_of(documents.dtype)
                                   : nullptr;
    view.first_masked = -1;
    const uint8_t* const mask = documents.mask_of(document);
    if (!mask) return view;
    int32_t* const kept = kept_.data() + kept_stride_ * thread;
    int64_t count = 0;
    for (int64_t t = 0; t < view.tokens.length; ++t) {
      if (mask[t]) {
        kept[count++] = int32_t(t);
      } else if (view.first_masked < 0) {
        view.first_masked = t;
      }
    }
    const bool prefix = count == 0 || kept[count - 1] == count - 1;
    view.tokens.kept = prefix ? nullptr : kept;
    view.tokens.length = count;
    return view;
  }

  void finish_pair(const DocumentView& view, int64_t query, int64_t pair, float scale, float* best, int32_t* index) {
    const int64_t count = queries_.kept(query);
    const bool any = view.tokens.length > 0;
    const bool want_winners = call_.winners.data != nullptr;
    if (any && want_winners && view.tokens.kept) {
      for (int64_t i = 0; i < count; ++i) index[i] = view.tokens.kept[index[i]];
    }
    if (any && call_.masked_is_zero && view.first_masked >= 0) {
      for (int64_t i = 0; i < count; ++i) {
        const bool zero_wins = best[i] < 0.0f || (want_winners && best[i] == 0.0f && index[i] > view.first_masked);
        if (!zero_wins) continue;
        best[i] = 0.0f;
        index[i] = -1;
      }
    }
    call_.out[pair] = any ? sum(best, count) * scale : 0.0f;
    if (want_winners) {
      if (!any) std::fill(index, index + count, -1);
      const int64_t length = call_.queries.tokens(query);
      const int64_t offset =
          call_.pairs.layout == Layout::all
              ? call_.queries.first_token(query) * call_.documents.count + (pair % call_.documents.count) * length
              : pair * length;
      if (call_.winners.bytes == 2) {
        save_winners(static_cast<int16_t*>(call_.winners.data) + offset, length, query, index);
      } else {
        save_winners(static_cast<int32_t*>(call_.winners.data) + offset, length, query, index);
      }
    }
  }

  template <class Index>
  void save_winners(Index* out, int64_t length, int64_t query, const int32_t* index) const {
    const int64_t count = queries_.kept(query);
    if (!queries_.masked()) {
      for (int64_t i = 0; i < count; ++i) out[i] = Index(index[i]);
      return;
    }
    const int32_t* const tokens = queries_.tokens(query);
    std::fill(out, out + length, Index(-1));
    for (int64_t i = 0; i < count; ++i) out[tokens[i]] = Index(index[i]);
  }

  // Eight running sums from the first token on: the result depends on the query alone, not on its lane.
  static float sum(const float* values, int64_t count) {
    float sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (int lane = 0; lane < 8; ++lane) sums[lane] += values[i + lane];
    }
    for (int lane = 0; i < count; ++i, ++lane) sums[lane] += values[i];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  }

  const Kernels& kernels_;
  const ForwardCall& call_;
  const int wanted_threads_;
  PackedQueries queries_;
  const int64_t tasks_;
  const int threads_;
  const int64_t lanes_;  // of a thread's buffers
  const int64_t row_;    // floats of a widened document token, at most
  Buffer<float> best_;
  Buffer<int32_t> index_;
  const int64_t kept_stride_;
  Buffer<int32_t> kept_;
  std::vector<DocumentView> views_;
  int64_t block_tokens_ = 0;
  int64_t scratch_stride_ = 0;
  std::unique_ptr<Buffer<char>> scratch_;
  std::unique_ptr<Buffer<uint32_t>> screen_words_;
  std::vector<Screen> screens_;  // of every thread
};

}  // namespace

Screened screened() {
  return {documents_tried.load(std::memory_order_relaxed), documents_screened.load(std::memory_order_relaxed)};
}

void forward(const Kernels& kernels, const ForwardCall& call) {
  if (call.pairs.layout == Layout::indexed) check_range(call.pairs, call.queries.count, call.documents.count);
  Scorer(kernels, call).run();
}

}  // namespace edgecolbert
