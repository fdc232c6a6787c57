// The kernel table of the including instruction set, which has defined kName, kTileTokens, kPanelRegisters and included
// Simd and Dot.
#pragma once

#include "backward_inl.h"
#include "pack_queries_inl.h"
#include "peak_inl.h"
#include "score_inl.h"

namespace {

void pack_register(PackJob* job) {
  with_element(job->dtype, [&](auto element) { pack_register<decltype(element)>(*job); });
}

bool admits_fixed_point([[maybe_unused]] const AdmitJob* job) {
#ifdef EDGECOLBERT_NO_FIXED_POINT
  return false;
#else
  bool admitted = false;
  with_element(job->dtype, [&](auto element) { admitted = admits_fixed_point<decltype(element)>(*job); });
  return admitted;
#endif
}

void score(const ScoreJob* job) {
  with_element(job->dtype, [&](auto element) { score<decltype(element)>(*job); });
}

template <bool scatter>
void add_rows(const RowsJob* job) {
  with_element(job->dtype, [&](auto element) {
    if (job->winner_bytes == 2) {
      add_rows<decltype(element), int16_t, scatter>(*job);
    } else {
      add_rows<decltype(element), int32_t, scatter>(*job);
    }
  });
}

void finish_rows(const FinishJob* job) {
  with_element(job->dtype, [&](auto element) { finish_rows<decltype(element)>(*job); });
}

void inverse_norms(const NormsJob* job) {
  with_element(job->dtype, [&](auto element) { inverse_norms<decltype(element)>(*job); });
}

constexpr Kernels kTable = {
    kName,           Simd::width,        kTileTokens,   kPanelRegisters,
#ifdef EDGECOLBERT_NO_FIXED_POINT
    false,
#else
    true,
#endif
    pack_register,   admits_fixed_point, score,         add_rows<true>,
    add_rows<false>, finish_rows,        inverse_norms, peak_operations,
};

}  // namespace
