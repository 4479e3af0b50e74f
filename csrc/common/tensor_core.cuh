// Products of matrices by one warp, d (16 x 8) = a (16 x kDepth) b (kDepth x 8) + c, behind one
// interface for every dtype and architecture:
//
//   T                 sm_80 and newer                            sm_75
//   __half            mma.m16n8k16                               two mma.m16n8k8
//   __nv_bfloat16     mma.m16n8k16                               none (kHasMma)
//   float             three mma.m16n8k8 of TF32, float32's       fused multiply-adds
//                     accuracy
//   Tf32              one mma.m16n8k8 of TF32                    fused multiply-adds
//
// Lane 4 g + t holds (PTX ISA, mma.m16n8k16 and mma.m16n8k8), a word being two 16-bit numbers or
// one float and s counting words of depth:
//   Accumulator   (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   FragmentA     (g, s = t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   FragmentB     (s = t, g), (t + 4, g)
// and where float is multiplied without tensor cores, the rows g and g + 8 of a, the columns 2t and
// 2t + 1 of b. common/shared_tile.cuh loads them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/codegen.cuh"

namespace fl {

// A float of which the first 10 bits after the point are multiplied: torch's allow_tf32.
struct Tf32 {
  float value;
};

template <class T>
constexpr int kDepth = 32 / sizeof(T);

// Whether T can be multiplied here: a kernel's body is empty where it cannot.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
constexpr bool kHasMma = !std::is_same_v<T, __nv_bfloat16>;
#else
template <class T>
constexpr bool kHasMma = true;
#endif

struct Accumulator {
  float r[4];
};

// kWords words of T; set() takes one as it is in memory.
template <class T, int kWords>
struct Fragment {
  uint32_t r[kWords];
  __device__ __forceinline__ void set(int i, uint32_t word) { r[i] = word; }
};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
struct FloatRows {
  float r[2][8];
};
template <int kWords>
struct Fragment<float, kWords> : FloatRows {};
template <int kWords>
struct Fragment<Tf32, kWords> : FloatRows {};
#else
// x = big + small, up to 2^-23 |x|. Tensor cores do not read the last 13 bits, so that `small`
// needs no rounding; it is NaN where x is NaN or infinite.
template <int kWords>
struct Fragment<float, kWords> {
  uint32_t big[kWords], small[kWords];
  __device__ __forceinline__ void set(int i, uint32_t word) {
    big[i] = word + 0x1000u & 0xffffe000u;
    small[i] = __float_as_uint(__uint_as_float(word) - __uint_as_float(big[i]));
  }
};
template <int kWords>
struct Fragment<Tf32, kWords> {
  uint32_t r[kWords];
  __device__ __forceinline__ void set(int i, uint32_t word) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r[i]) : "f"(__uint_as_float(word)));
  }
};
#endif

template <class T>
using FragmentA = Fragment<T, 4>;
template <class T>
using FragmentB = Fragment<T, 2>;

#define FL_MMA(instruction, names, c, ...)                              \
  asm volatile(instruction " {%0, %1, %2, %3}, " names ";"              \
               : "=f"(d.r[0]), "=f"(d.r[1]), "=f"(d.r[2]), "=f"(d.r[3]) \
               : __VA_ARGS__, "f"(c.r[0]), "f"(c.r[1]), "f"(c.r[2]), "f"(c.r[3]))
#define FL_MMA_FULL(instruction)                                                                   \
  FL_MMA(instruction, "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13}", c, "r"(a[0]), "r"(a[1]), \
         "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#define FL_MMA_HALF(i, c)                                                                         \
  FL_MMA("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", "{%4, %5}, {%6}, {%7, %8, %9, %10}", \
         c, "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]))

// The instruction for words of T.
template <class T>
__device__ __forceinline__ void mma_words(Accumulator& d, const uint32_t (&a)[4],
                                          const uint32_t (&b)[2], const Accumulator& c) {
#if !defined(__CUDA_ARCH__)
#elif __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    FL_MMA_FULL("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    FL_MMA_FULL("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    static_assert(std::is_same_v<T, Tf32>);
    FL_MMA_FULL("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#else
  static_assert(std::is_same_v<T, __half>, "no such product before sm_80");
  FL_MMA_HALF(0, c);
  FL_MMA_HALF(1, d);
#endif
}
#undef FL_MMA_HALF
#undef FL_MMA_FULL
#undef FL_MMA

// d = a b + c. float32 leaves out small * small, 2^-22 of a product and less of a sum, unless kAll;
// c (with kAll big * big, too) is added by the ordinary units, because tensor cores cut sums off
// where others round them: over a thousand steps that bends a sum towards zero by hundreds of units
// in the last place. Ootomo & Yokota 2022, arXiv:2203.03341.
template <class T, bool kAll = false>
__device__ __forceinline__ void mma(Accumulator& d, const FragmentA<T>& a, const FragmentB<T>& b,
                                    const Accumulator& c) {
  if constexpr (sizeof(T) == 2) {
    mma_words<T>(d, a.r, b.r, c);
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Sums of eight, then of those: one chain of 256 would round more often than the rule allows.
      sum[i] = a.r[i / 2][0] * b.r[i % 2][0];
#pragma unroll
      for (int k = 1; k < 8; ++k) sum[i] = fmaf(a.r[i / 2][k], b.r[i % 2][k], sum[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) d.r[i] = c.r[i] + sum[i];
#else
    if constexpr (std::is_same_v<T, Tf32>) {
      mma_words<Tf32>(d, a.r, b.r, c);
    } else {
      const Accumulator zero = {{0.0f, 0.0f, 0.0f, 0.0f}};
      Accumulator rest, sum;
      if constexpr (kAll) mma_words<Tf32>(rest, a.small, b.small, zero);
      mma_words<Tf32>(rest, a.small, b.big, kAll ? rest : zero);
      mma_words<Tf32>(rest, a.big, b.small, rest);
      mma_words<Tf32>(sum, a.big, b.big, kAll ? zero : rest);
#pragma unroll
      for (int i = 0; i < 4; ++i) d.r[i] = c.r[i] + (kAll ? sum.r[i] + rest.r[i] : sum.r[i]);
    }
#endif
  }
}

// Two numbers to one register, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// In which order rows of memory become the depth of a product: one after the other, or as the
// columns of an accumulator do that becomes `a` (float: slot t is 2t, slot t + 4 is 2t + 1; the
// same for 16 bits).
enum class Order { kStraight, kPaired };

// a from kDepth / 8 accumulators beside each other; b's depth is in Order::kPaired.
template <class T>
__device__ __forceinline__ void to_fragment_a(FragmentA<T>& a, const Accumulator* c) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] = pack<T>(c[i / 2].r[i % 2 * 2], c[i / 2].r[i % 2 * 2 + 1]);
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    unrolled<16>([&](auto i) {
      a.r[i / 8][i % 8] = __shfl_sync(~0u, c->r[i / 8 * 2 + i % 2], i % 8 / 2, 4);
    });
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) a.set(i, __float_as_uint(c->r[i % 2 * 2 + i / 2]));
#endif
  }
}

// Four 8 x 8 matrices of 16-bit numbers, or 8 x 4 of 32-bit ones; lanes 8 m to 8 m + 7 give the
// rows of matrix m.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fl
