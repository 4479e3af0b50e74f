// CPU kernels exist once per instruction set, in namespaces fl::avx2, fl::avx512,
// fl::avx512_bf16 and fl::amx.
//
//   FL_DECLARE_CPU_KERNEL(void, adam_step, const AdamStep&)      in <op>/kernels.h
//   namespace fl::FL_ISA { void adam_step(const AdamStep& p) {...} }   in <op>/cpu_*.cpp
//   FL_CALL_CPU_KERNEL(adam_step, params)                        in portable code
#pragma once

#include "common/check.h"

namespace fl {

enum class Isa : int { kNone, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best instruction set this CPU and operating system offer, or the lower one named by the
// environment variable FASTLAYERS_CPU_ISA (none, avx2, avx512, avx512_bf16, amx), read once.
Isa cpu_isa();
const char* isa_name(Isa isa);

}  // namespace fl

#define FL_DECLARE_CPU_KERNEL(Result, name, ...) \
  namespace fl::avx2 {                           \
  Result name(__VA_ARGS__);                      \
  }                                              \
  namespace fl::avx512 {                         \
  Result name(__VA_ARGS__);                      \
  }                                              \
  namespace fl::avx512_bf16 {                    \
  Result name(__VA_ARGS__);                      \
  }                                              \
  namespace fl::amx {                            \
  Result name(__VA_ARGS__);                      \
  }

#if defined(__x86_64__)
#define FL_CALL_CPU_KERNEL(name, ...)                                               \
  [&] {                                                                             \
    switch (::fl::cpu_isa()) {                                                      \
      case ::fl::Isa::kAvx2:                                                        \
        return ::fl::avx2::name(__VA_ARGS__);                                       \
      case ::fl::Isa::kAvx512:                                                      \
        return ::fl::avx512::name(__VA_ARGS__);                                     \
      case ::fl::Isa::kAvx512Bf16:                                                  \
        return ::fl::avx512_bf16::name(__VA_ARGS__);                                \
      case ::fl::Isa::kAmx:                                                         \
        return ::fl::amx::name(__VA_ARGS__);                                        \
      case ::fl::Isa::kNone:                                                        \
        break;                                                                      \
    }                                                                               \
    ::fl::fail(#name, ": the CPU kernels need AVX2 and FMA, which this CPU lacks"); \
  }()
#else
#define FL_CALL_CPU_KERNEL(name, ...) ::fl::fail(#name, ": the CPU kernels are written for x86-64")
#endif
