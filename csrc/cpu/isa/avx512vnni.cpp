// Cascade Lake, Ice Lake, Zen 4: AVX-512 with VNNI.
#include "../../abi.h"
#include "../simd/avx512.h"

namespace {
using namespace edgecolbert;
constexpr char kName[] = "avx512vnni";
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
extern const Kernels kernels_avx512vnni;
const Kernels kernels_avx512vnni = kTable;
}  // namespace edgecolbert
