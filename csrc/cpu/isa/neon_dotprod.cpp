// AArch64 with dot products and arithmetic of half floats: Cortex-A76, Neoverse N1, Apple M1 and later.
#include "../../abi.h"
#include "../simd/neon.h"

namespace {
using namespace edgecolbert;
constexpr char kName[] = "neon_dotprod";
constexpr int kTileTokens = 6;
constexpr int kPanelRegisters = 4;  // 24 accumulators, 4 query registers, 1 broadcast of 32 registers
constexpr int kStepsOfRound = 1;
}  // namespace

#include "../kernels/rows_inl.h"
#include "../dot/f32.h"
#include "../dot/none.h"
#include "../dot/i8_neon.h"
#include "../dot/screen_neon.h"
#include "../kernels/table_inl.h"

namespace edgecolbert {
extern const Kernels kernels_neon_dotprod;
const Kernels kernels_neon_dotprod = kTable;
}  // namespace edgecolbert
