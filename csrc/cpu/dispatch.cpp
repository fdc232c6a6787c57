#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#define EDGECOLBERT_X86 1
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edgecolbert {

// One row an instruction set, best first; a compiler that cannot build a file leaves its row out.
#define EDGECOLBERT_ISAS(row)          \
  EDGECOLBERT_ROW_AVX512VNNI_FP16(row) \
  EDGECOLBERT_ROW_AVX512VNNI(row)      \
  EDGECOLBERT_ROW_AVX512(row)          \
  EDGECOLBERT_ROW_AVXVNNI(row)         \
  EDGECOLBERT_ROW_AVX2(row)            \
  EDGECOLBERT_ROW_NEON_DOTPROD(row)    \
  EDGECOLBERT_ROW_NEON(row)            \
  row(scalar, true)

#ifdef EDGECOLBERT_HAVE_AVX512VNNI_FP16
#define EDGECOLBERT_ROW_AVX512VNNI_FP16(row) row(avx512vnni_fp16, cpu.avx512&& cpu.avx512vnni&& cpu.avx512fp16)
#else
#define EDGECOLBERT_ROW_AVX512VNNI_FP16(row)
#endif
#ifdef EDGECOLBERT_HAVE_AVX512VNNI
#define EDGECOLBERT_ROW_AVX512VNNI(row) row(avx512vnni, cpu.avx512&& cpu.avx512vnni)
#else
#define EDGECOLBERT_ROW_AVX512VNNI(row)
#endif
#ifdef EDGECOLBERT_HAVE_AVX512
#define EDGECOLBERT_ROW_AVX512(row) row(avx512, cpu.avx512)
#else
#define EDGECOLBERT_ROW_AVX512(row)
#endif
#ifdef EDGECOLBERT_HAVE_AVXVNNI
#define EDGECOLBERT_ROW_AVXVNNI(row) row(avxvnni, cpu.avx2&& cpu.avxvnni)
#else
#define EDGECOLBERT_ROW_AVXVNNI(row)
#endif
#ifdef EDGECOLBERT_HAVE_AVX2
#define EDGECOLBERT_ROW_AVX2(row) row(avx2, cpu.avx2)
#else
#define EDGECOLBERT_ROW_AVX2(row)
#endif
#ifdef EDGECOLBERT_HAVE_NEON_DOTPROD
#define EDGECOLBERT_ROW_NEON_DOTPROD(row) row(neon_dotprod, cpu.dotprod)
#else
#define EDGECOLBERT_ROW_NEON_DOTPROD(row)
#endif
#ifdef EDGECOLBERT_HAVE_NEON
#define EDGECOLBERT_ROW_NEON(row) row(neon, true)
#else
#define EDGECOLBERT_ROW_NEON(row)
#endif

#define EDGECOLBERT_DECLARE(name, runs) extern const Kernels kernels_##name;
EDGECOLBERT_ISAS(EDGECOLBERT_DECLARE)
#undef EDGECOLBERT_DECLARE

namespace {

struct Cpu {
  bool avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false, avx512fp16 = false;
  bool dotprod = false;
};

Cpu detect() {
  Cpu cpu;
#ifdef EDGECOLBERT_X86
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool fma = c >> 12 & 1, popcnt = c >> 23 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !avx) return cpu;
  unsigned xcr0, xcr0_high;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  const bool ymm_saved = (xcr0 & 0x06) == 0x06, zmm_saved = (xcr0 & 0xe6) == 0xe6;
  if (!ymm_saved || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  cpu.avx2 = (b >> 5 & 1) && fma && f16c && popcnt;
  const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
  cpu.avx512 = zmm_saved && cpu.avx2 && f && dq && bw && vl;
  cpu.avx512vnni = c >> 11 & 1;
  cpu.avx512fp16 = d >> 23 & 1;
#ifdef EDGECOLBERT_EVEX
  cpu.avxvnni = cpu.avx512 && cpu.avx512vnni;
#else
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.avxvnni = a >> 4 & 1;
#endif
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long wanted = HWCAP_ASIMDDP | HWCAP_ASIMDHP;
  cpu.dotprod = (getauxval(AT_HWCAP) & wanted) == wanted;
#elif defined(__aarch64__) && defined(__APPLE__)
  const auto has = [](const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
  };
  cpu.dotprod = has("hw.optional.arm.FEAT_DotProd") && has("hw.optional.arm.FEAT_FP16");
#endif
  return cpu;
}

struct Choice {
  const Kernels* kernels;
  bool runs;
};

const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = [] {
    [[maybe_unused]] const Cpu cpu = detect();
    std::vector<Choice> rows;
#define EDGECOLBERT_APPEND(name, runs) rows.push_back({&kernels_##name, runs});
    EDGECOLBERT_ISAS(EDGECOLBERT_APPEND)
#undef EDGECOLBERT_APPEND
    return rows;
  }();
  return all;
}

std::vector<std::string> names(bool only_runnable) {
  std::vector<std::string> out;
  for (const Choice& choice : choices()) {
    if (choice.runs || !only_runnable) out.push_back(choice.kernels->name);
  }
  return out;
}

// The kernels called `name`, or the reason why they cannot run.
const Kernels* find(const std::string& name, std::string* reason) {
  for (const Choice& choice : choices()) {
    if (choice.kernels->name == name && choice.runs) return choice.kernels;
  }
  bool built = false;
  for (const std::string& known : built_isas()) built = built || known == name;
  *reason =
      "instruction set '" + name + (built ? "' cannot run on this CPU" : "' is not in this build") + "; available:";
  for (const std::string& runnable : available_isas()) *reason += " " + runnable;
  return nullptr;
}

const Kernels& from_environment() {
  const char* wanted = std::getenv("EDGECOLBERT_ISA");
  if (!wanted || !*wanted) {
    for (const Choice& choice : choices()) {
      if (choice.runs) return *choice.kernels;
    }
  }
  std::string reason;
  const Kernels* found = find(wanted, &reason);
  if (!found) throw std::runtime_error("EDGECOLBERT_ISA: " + reason);
  return *found;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> built_isas() { return names(false); }
std::vector<std::string> available_isas() { return names(true); }

const Kernels& kernels() {
  const Kernels* current = in_use.load(std::memory_order_relaxed);
  if (!current) {
    current = &from_environment();
    in_use.store(current, std::memory_order_relaxed);
  }
  return *current;
}

void set_isa(const std::string& name) {
  if (name.empty()) {
    in_use.store(nullptr);
    return;
  }
  std::string reason;
  const Kernels* found = find(name, &reason);
  if (!found) throw std::invalid_argument(reason);
  in_use.store(found);
}

}  // namespace edgecolbert
