// The kernel table of the including instruction set, which has defined kName, kTileTokens, kPanelRegisters and included
// Simd and Dot.
#pragma once

#include "backward_inl.h"
#include "pack_inl.h"
#include "pack_queries_inl.h"
#include "peak_inl.h"
#include "screen_inl.h"

namespace {

void pack_register(PackJob* job) {
  with_float(job->dtype, [&](auto element) { pack_register<decltype(element)>(*job); });
}

bool admits_integers(const AdmitJob* job) {
  bool admitted = false;
  with_float(job->dtype, [&](auto element) { admitted = admits_integers<decltype(element)>(*job); });
  return admitted;
}

void score(const ScoreJob* job) {
  with_element(job->dtype, [&](auto element) { score<decltype(element)>(*job); });
}

template <bool scatter>
void add_rows(const RowsJob* job) {
  with_float(job->dtype, [&](auto element) {
    with_dim(job->dim, [&](auto dim) {
      if (job->winner_bytes == 2) {
        add_rows<decltype(element), int16_t, scatter>(*job, dim);
      } else {
        add_rows<decltype(element), int32_t, scatter>(*job, dim);
      }
    });
  });
}

void finish_rows(const FinishJob* job) {
  with_float(job->dtype, [&](auto element) { finish_rows<decltype(element)>(*job); });
}

void inverse_norms(const NormsJob* job) {
  with_float(job->dtype, [&](auto element) { inverse_norms<decltype(element)>(*job); });
}

void store_tokens(StoreJob* job) {
  with_float(job->source_dtype, [&](auto from) {
    with_element(job->dtype, [&](auto to) { store_tokens<decltype(from), decltype(to)>(*job); });
  });
}

void load_tokens(const LoadJob* job) {
  with_element(job->dtype, [&](auto element) { load_tokens<decltype(element)>(*job); });
}

#ifdef EDGECOLBERT_NO_FIXED_POINT
constexpr bool kFixedPoint = false;
#else
constexpr bool kFixedPoint = true;
#endif
#ifdef EDGECOLBERT_NO_INT8
constexpr int kInt8DimsOfWord = 0;
#else
constexpr int kInt8DimsOfWord = DotI8::dims_of_word;
#endif

constexpr Kernels kTable = {
    kName,
    Simd::width,
    kTileTokens,
    kPanelRegisters,
    kFixedPoint,
    kInt8DimsOfWord,
    kShortestScreened,
    kShortestScreenedFast,
    kScreenedDimensions,
    !kNarrowsOnTheSide,
    pack_register,
    admits_integers,
    score,
    add_rows<true>,
    add_rows<false>,
    finish_rows,
    inverse_norms,
    store_tokens,
    load_tokens,
    peak_operations,
    move_lines,
};

}  // namespace
