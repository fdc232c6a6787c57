// Skylake-SP: AVX-512 F, BW, DQ, VL.
#include "../../abi.h"
#include "../simd/avx512.h"

namespace {
using namespace edgecolbert;
constexpr char kName[] = "avx512";
constexpr int kTileTokens = 12;
constexpr int kPanelRegisters = 2;  // 24 accumulators, 2 query registers, 1 broadcast of 32 registers
constexpr int kStepsOfRound = 1;
}  // namespace

#include "../kernels/rows_inl.h"
#include "../dot/f32.h"
#include "../dot/i16_avx512.h"
#include "../dot/i8_avx512.h"
#include "../dot/screen_avx512.h"
#include "../kernels/table_inl.h"

namespace edgecolbert {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = kTable;
}  // namespace edgecolbert
