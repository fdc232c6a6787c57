// Haswell and Zen: AVX2, FMA, F16C.
#include "../../abi.h"
#include "../simd/avx2.h"

namespace {
using namespace edgecolbert;
constexpr char kName[] = "avx2";
constexpr int kTileTokens = 6;
constexpr int kPanelRegisters = 2;  // 12 accumulators, 2 query registers, 1 broadcast of 16 registers
// In fp32. Fewer instructions on pointers: a busy hyperthread beside this one leaves half of what a cycle can start.
constexpr int kStepsOfRound = 2;
}  // namespace

#include "../kernels/rows_inl.h"
#include "../dot/f32.h"
#include "../dot/i16_avx2.h"
#include "../dot/i8_avx2.h"
#include "../dot/screen_avx2.h"
#include "../kernels/table_inl.h"

namespace edgecolbert {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = kTable;
}  // namespace edgecolbert
