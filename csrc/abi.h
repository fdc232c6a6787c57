// Plain structs between the driver and the kernels of each instruction set.
// No STL and no framework: an object compiled for AVX-512 must not leave a shared inline function behind that an older
// CPU might be handed.
#pragma once

#include <stdint.h>

namespace edgecolbert {

// i8: documents only, one scale a document. Kernels score the integers; the driver multiplies by the scale, which is 0
// or more and so commutes with the maximum.
enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, i8 = 3 };

// What queries are rounded to for precision="fast".
enum class Integer : int32_t { none = 0, i16 = 1, i8 = 2 };

// Kept tokens of one sequence, read in place.
struct Tokens {
  const char* data;        // token 0, kept or not
  int64_t token_stride;    // bytes, any sign
  int64_t dim_stride;      // bytes, any sign
  int64_t length;          // kept tokens
  const int32_t* kept;     // [length] their token numbers, ascending; null: 0 .. length - 1
  const char* memory_end;  // of the documents around, read one after another; null: unknown
};

// What a query token's margin is made of, see margin_inl.h: the rows of [kMarginFactors][width].
enum MarginFactor { kOfRest, kOfHalfSteps, kOfNorm, kOfSteps, kOfSum, kMarginFactors };

// One register row of query tokens, turned so that a lane is a token: [k-word][lane].
// A k-word is 32 bits: one float, two int16 dimensions, or Kernels::int8_dims_of_word int8 dimensions, of a screen
// kScreenDimsOfWord.
struct PackJob {
  const char* const* rows;  // [width] query tokens; null: a lane without a token
  DType dtype;
  int32_t dim;
  int64_t dim_stride;  // bytes
  bool normalize;
  uint32_t* words_f32;  // lane 0 of k-word 0
  uint32_t* words_i16;  // null: fixed point is not wanted
  uint32_t* words_i8;   // null: int8 is not wanted
  int32_t* biases;      // [width] out with words_i8, see QueryGroup
  float* scales;        // [width] out with words_i8
  float* margins;       // [kMarginFactors][width] out, null: int8 is no screen
  float* token_rows;    // [width][dim rounded up to the width] out, null: not wanted
  int64_t word_stride;  // 32-bit elements from one k-word to the next
  float* buffer;        // 2 * (dim rounded up to the width) floats of scratch
  float peak;           // out: largest |x|; NaN if any x is NaN
  bool screened;        // out with margins: every token may be screened
};

// Whether integers can represent every given query token.
struct AdmitJob {
  const char* const* rows;  // [count], none null
  int64_t count;
  DType dtype;
  int32_t dim;
  int64_t dim_stride;  // bytes
  bool normalize;
  Integer integer;
  float* buffer;  // 2 * (dim rounded up to the width) floats of scratch
};

// Register rows of one or several queries that are scored together.
// Panels of `panel_registers` rows come first, then the remaining rows one by one, each [k-word][registers of the
// panel][lane].
struct QueryGroup {
  const uint32_t* words_f32;
  const uint32_t* words_i16;  // null: exact only
  const uint32_t* words_i8;   // null: exact only; with margins they are the screen's, of four dimensions
  const int32_t* biases;      // [registers * width] with words_i8: what the kernel's own sums are too large by
  const float* scales;        // [registers * width] with words_i8: a query value is its integer times this
  // [registers][kMarginFactors][width]. Null: words_i8 are the scores' own, or there are none.
  const float* margins;
  // [registers * width] with margins: the query tokens themselves in fp32, filled up to whole registers.
  const char* const* rows;
  int64_t registers;
  float peak;  // largest |x|, infinity if any is not finite
};

// What one thread needs to screen documents.
struct Screen {
  uint32_t* narrowed;   // [block_tokens + tile_tokens] int8 document tokens
  int16_t* scores;      // [block_tokens + tile_tokens, panel_registers * width]
  uint32_t* hits;       // [block_tokens]; holds bits of the query lanes whose maximum a token can be, 16 or 32 a token
  uint32_t* pairs;      // [(block_tokens + 2) * panel_registers * width] that can win: token << 8 | lane of the panel
  float* products;      // [(block_tokens + 2) * panel_registers * width] of the pairs' rows
  uint32_t* rows;       // [the larger of 2 and panel_registers, * width] widened document tokens
  float largest;        // |x| that is expected of the next document; 0: nothing is known
  int64_t tried, done;  // documents
  int32_t failures;     // in a row
  int32_t pause;        // documents that are not tried
};

// Maximum similarity of every query lane over the tokens of one document (length >= 1).
struct ScoreJob {
  Tokens document;
  Tokens next;  // where wanted, the document that this thread scores afterwards, all of its tokens; data is null: none
  DType dtype;
  int32_t dim;
  bool normalize;
  float norm_epsilon;  // with normalize, of the stored values: kNormEpsilon over the document's scale
  bool argmax;
  const QueryGroup* group;
  int64_t block_tokens;  // document tokens widened at a time
  char* scratch;         // aligned to 64 bytes
  Screen* screen;        // null: no document is screened
  float* best;           // [registers * width] out
  int32_t* index;        // [registers * width] out when argmax: position among the kept tokens; always writable
};

// accumulator[target row] += gradient * source[source row], for `count` query tokens of one (query, document) pair.
// scatter: the source is the query (row i), the target the document (row winner[i]). gather: the other way round.
struct RowsJob {
  float* accumulator;  // [rows, dim] C-contiguous
  const char* source;
  DType dtype;
  int32_t dim;
  int64_t token_stride;        // bytes
  int64_t dim_stride;          // bytes
  const float* inverse_norms;  // of the source rows; null: 1
  const void* winner;          // [count] int16 or int32 document token, -1: none
  int32_t winner_bytes;
  int64_t count;
  float gradient;
  char* buffer;  // dim floats, used when dim_stride is not one element
};

// Rounds accumulated gradients to the storage type, after the Jacobian of the L2 normalisation where asked.
struct FinishJob {
  float* accumulator;  // [rows, dim], overwritten
  char* out;           // [rows, dim] C-contiguous in dtype; may be the accumulator itself
  int64_t rows;
  DType dtype;
  int32_t dim;
  const char* source;  // the rows that were normalised; null: no normalisation
  int64_t token_stride;
  int64_t dim_stride;
  const float* inverse_norms;  // [rows]
  char* buffer;                // dim floats
};

// inverse_norms[i] = 1 / max(|row i|, 1e-12)
struct NormsJob {
  const char* source;
  DType dtype;
  int32_t dim;
  int64_t rows;
  int64_t token_stride;
  int64_t dim_stride;
  float* inverse_norms;
  char* buffer;  // dim floats
};

// What int8 must know of a document beforehand.
struct Peaks {
  bool finite;
  float largest;  // |x|, normalised if the document is
};

// Kept tokens of one document, rounded to the packed storage: rows of `dim` elements back to back.
struct StoreJob {
  Tokens source;
  const Tokens* next;   // the document that this thread stores afterwards; null: none
  const Tokens* after;  // the one behind it, all of its tokens, to be asked for alone; null: none
  DType source_dtype;   // not i8
  DType dtype;
  int32_t dim;
  bool normalize;
  bool stream;                 // past the caches, where rows lie such that registers are aligned
  bool roomy;                  // the first-level cache has room for rows that come much later
  int64_t rows_ahead;          // so many rows before its turn a row is asked for
  const int32_t* all_numbers;  // 0, 1, ...: as Tokens::kept of a document beside one that has it; null: none has
  char* out;                   // [source.length, dim]
  char* buffer;                // dim elements of scratch
  // The rest, up to `scale`, is for i8, which looks at the next document while it stores this one.
  bool looked;                // in: source was `next` of the call before, on the same job; out: for the call after
  Peaks peaks;                // in, if looked: of source; out: of next
  float* inverse_norms;       // [source.length] of scratch, with normalize; if looked: what next_inverse_norms was
  float* next_inverse_norms;  // [next->length] of scratch, with normalize
  float scale;                // out
  // Out. i8: otherwise a value is not finite, and nothing was stored. Floats without normalisation: otherwise a value
  // is not finite, or becomes infinite.
  bool finite;
};

// The way back: out = float(row) * scale.
struct LoadJob {
  const char* source;
  DType dtype;
  int32_t dim;
  int64_t rows;
  int64_t token_stride;  // bytes
  int64_t dim_stride;    // bytes
  float scale;
  bool stream;   // past the caches, where rows lie such that registers are aligned
  float* out;    // [rows, dim]
  char* buffer;  // dim elements of scratch
};

// Longer than any document.
constexpr int64_t kNever = INT64_MAX;

enum class Peak : int32_t { f32 = 0, i16 = 1, i8 = 2 };

// Lines of the cache side by side, counted from the beginnings of two arrays that are aligned to a line.
struct LineRun {
  int64_t source, lines, out;  // first line read, lines read, first line written
};

// What an instruction set offers. One constant of this type an object file.
struct Kernels {
  const char* name;
  int32_t width;              // 32-bit lanes of a register
  int32_t tile_tokens;        // document tokens of a tile
  int32_t panel_registers;    // query registers of a tile
  bool fixed_point;           // int16 pays off
  int32_t int8_dims_of_word;  // dimensions of an int8 k-word; 0: int8 does not pay off
  // Document tokens from which on int8 pays off as a screen for fp32. Of calls in fixed point: longer documents are not
  // scored in it, whether or not the screen has success, as a score depends on its query and document alone.
  int64_t shortest_screened, shortest_screened_fast;
  int32_t screened_dimensions;  // at most; 0: there is no screen
  bool screen_wants_next;       // ScoreJob::next
  void (*pack_register)(PackJob*);
  bool (*admits_integers)(const AdmitJob*);
  void (*score)(const ScoreJob*);
  void (*scatter_rows)(const RowsJob*);
  void (*gather_rows)(const RowsJob*);
  void (*finish_rows)(const FinishJob*);
  void (*inverse_norms)(const NormsJob*);
  void (*store_tokens)(StoreJob*);
  void (*load_tokens)(const LoadJob*);
  uint64_t (*peak_operations)(Peak);  // runs a fixed stretch of multiply-adds and returns how many operations it was
  // For every `ratio` (1, 2 or 4) lines of a run, and for what is left at its end, writes their sum past the caches.
  void (*move_lines)(const float* source, float* out, const LineRun* runs, int64_t count, int ratio);
};

constexpr int kScreenDimsOfWord = 4;    // of a k-word of a screen
constexpr float kNormEpsilon = 1e-12f;  // of torch.nn.functional.normalize

}  // namespace edgecolbert
