#include "common/isa.h"

#include <cstdlib>
#include <string_view>

namespace fl {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2) return Isa::kNone;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kNone;
#endif
}

Isa detect_or_lower() {
  const Isa best = detect();
  const char* wanted = std::getenv("FASTLAYERS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::kNone, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (std::string_view(wanted) != isa_name(isa)) continue;
    FL_CHECK(isa <= best, "FASTLAYERS_CPU_ISA=", wanted, ", but this CPU offers ", isa_name(best));
    return isa;
  }
  fail("FASTLAYERS_CPU_ISA=", wanted, " is not one of none, avx2, avx512, avx512_bf16");
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
  }
  return "unknown";
}

}  // namespace fl
