// Whole calls: every layout of queries, documents and pairs becomes jobs for the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "../abi.h"

namespace edgecolbert {

inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }

// Token vectors of many sequences. Strides in bytes, any sign.
struct Sequences {
  DType dtype = DType::f32;
  int32_t dim = 0;
  int64_t count = 0;
  const char* data = nullptr;
  int64_t dim_stride = 0;
  int64_t token_stride = 0;

  // Padded: sequence j starts (j / inner_count) * outer_stride + (j % inner_count) * inner_stride behind data and has
  // `length` tokens.
  int64_t inner_count = 1;
  int64_t inner_stride = 0;
  int64_t outer_stride = 0;
  int64_t length = 0;

  // Packed: sequence j is rows offsets[j] .. offsets[j + 1] of data.
  const int64_t* offsets = nullptr;

  // A list: sequence j starts at pointers[j].
  const int64_t* pointers = nullptr;
  const int64_t* lengths = nullptr;
  const int64_t* token_strides = nullptr;

  const float* scales = nullptr;  // [count] of int8: 0 or more

  const uint8_t* mask = nullptr;  // one byte a token, padded [count, length] or packed [tokens]; not for lists

  const char* start(int64_t j) const {
    if (pointers) return reinterpret_cast<const char*>(pointers[j]);
    if (offsets) return data + offsets[j] * token_stride;
    return data + (j / inner_count) * outer_stride + (j % inner_count) * inner_stride;
  }
  int64_t tokens(int64_t j) const { return lengths ? lengths[j] : offsets ? offsets[j + 1] - offsets[j] : length; }
  int64_t stride(int64_t j) const { return token_strides ? token_strides[j] : token_stride; }
  // Number of tokens before sequence j when all are laid end to end.
  int64_t first_token(int64_t j) const { return offsets ? offsets[j] : j * length; }
  const uint8_t* mask_of(int64_t j) const { return mask ? mask + first_token(j) : nullptr; }
};

enum class Layout : int32_t {
  all = 0,      // every query with every document: out [Nq, Nd]
  own = 1,      // document j with query j / (Nd / Nq): out [Nd]
  indexed = 2,  // chosen pairs: out [P]
};

struct Pairs {
  Layout layout = Layout::all;
  int64_t count = 0;  // of chosen pairs
  const int64_t* query_index = nullptr;
  const int64_t* document_index = nullptr;
};

struct Winners {
  void* data = nullptr;  // null: not wanted
  int32_t bytes = 4;     // int16 or int32
};

struct ForwardCall {
  Sequences queries;
  Sequences documents;
  Pairs pairs;
  float* out = nullptr;
  Winners winners;
  bool fixed_point = false;
  bool screen = true;  // where it pays off; exact scores have the same bits
  bool masked_is_zero = false;
  bool normalize = false;
  int threads = 1;
};

struct BackwardCall {
  Sequences queries;
  Sequences documents;
  Pairs pairs;
  const float* gradient = nullptr;  // shape of the scores
  Winners winners;
  char* grad_queries = nullptr;  // null: not wanted
  // grad_queries is fp32 whatever the queries' type and is added to, without the Jacobian of the normalisation.
  bool accumulate_queries = false;
  char* grad_documents = nullptr;  // null: not wanted
  bool normalize = false;
  int threads = 1;
};

// Kept tokens of every document to packed storage.
struct PackCall {
  Sequences source;  // floats
  DType dtype = DType::f16;
  bool normalize = false;
  const int64_t* offsets = nullptr;  // [source.count + 1] of the result: as many rows as the mask keeps
  char* out = nullptr;               // row offsets[0] of the result
  float* scales = nullptr;           // [source.count] out, for i8
  int threads = 1;
};

// Packed storage to float32.
struct UnpackCall {
  Sequences source;      // packed
  float* out = nullptr;  // row offsets[0] of the source
  int threads = 1;
};

// How many documents forward() has tried to screen, and for how many that went well, a document a group of queries.
struct Screened {
  int64_t tried, done;
};
Screened screened();

// Throw std::out_of_range for a pair that names a missing query or document, std::bad_alloc; nothing else.
void forward(const Kernels& kernels, const ForwardCall& call);
void backward(const Kernels& kernels, const BackwardCall& call);
// Where every document begins among the kept tokens: out[source.count + 1], out[0] = 0.
void pack_offsets(const Sequences& source, int64_t* out, int threads);
// Returns the first document with a value that is not finite, which int8 cannot hold, or that became infinite, for
// which floats are watched unless they are normalised; -1: there is none.
int64_t pack(const Kernels& kernels, const PackCall& call);
void unpack(const Kernels& kernels, const UnpackCall& call);

}  // namespace edgecolbert
