#include "common/isa.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fl {
namespace {

// Whether the CPU multiplies bfloat16 tiles and Linux lets this process use their registers, for
// which it has to be asked: 8 KB that it would save for every thread.
bool amx_allowed() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2) return Isa::kNone;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return amx_allowed() ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kNone;
#endif
}

Isa detect_or_lower() {
  const Isa best = detect();
  const char* wanted = std::getenv("FASTLAYERS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::kNone, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
    if (std::string_view(wanted) != isa_name(isa)) continue;
    FL_CHECK(isa <= best, "FASTLAYERS_CPU_ISA=", wanted, ", but this CPU offers ", isa_name(best));
    return isa;
  }
  fail("FASTLAYERS_CPU_ISA=", wanted, " is not one of none, avx2, avx512, avx512_bf16, amx");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect_or_lower();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kNone:
      return "none";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

}  // namespace fl
