// Any CPU that the compiler targets by default.
#include "../../abi.h"
#include "../simd/scalar.h"

namespace {
using namespace edgecolbert;
constexpr char kName[] = "scalar";
constexpr int kTileTokens = 6;
constexpr int kPanelRegisters = 2;  // 12 accumulators, 2 query registers, 1 broadcast of the 16 registers of SSE2
constexpr int kStepsOfRound = 1;
}  // namespace

#include "../kernels/rows_inl.h"
#include "../dot/f32.h"
#include "../dot/none.h"
#include "../dot/no_i8.h"
#include "../kernels/table_inl.h"

namespace edgecolbert {
extern const Kernels kernels_scalar;
const Kernels kernels_scalar = kTable;
}  // namespace edgecolbert
