// Tensor-core products of 16-bit matrices, and how their operands come from shared memory. One
// interface for sm_75 (m16n8k8, float16 only, plain copies) and sm_80 and newer (m16n8k16,
// cp.async).
//
// Fragments of a warp, lane = 4 * g + t (PTX ISA, mma.m16n8k16): of the accumulator c (16 x 8) a
// lane holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); of a (16 x 16) pairs of columns of
// rows g and g + 8, first k < 8, then k >= 8; of b (16 x 8) pairs of rows of column g, likewise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fl {

struct FragmentA {
  uint32_t r[4];
};
struct Accumulator {
  float r[4];
};

// d = a b + c
template <class T>
__device__ __forceinline__ void mma(Accumulator& d, const FragmentA& a, uint32_t b0, uint32_t b1,
                                    const Accumulator& c);

#define FL_MMA(instruction, a_names, b_names, c_names, ...)                            \
  asm volatile(instruction " {%0, %1, %2, %3}, " a_names ", " b_names ", " c_names ";" \
               : "=f"(d.r[0]), "=f"(d.r[1]), "=f"(d.r[2]), "=f"(d.r[3])                \
               : __VA_ARGS__, "f"(c.r[0]), "f"(c.r[1]), "f"(c.r[2]), "f"(c.r[3]))
#define FL_MMA16(types)                                                                         \
  FL_MMA("mma.sync.aligned.m16n8k16.row.col.f32." types ".f32", "{%4, %5, %6, %7}", "{%8, %9}", \
         "{%10, %11, %12, %13}", "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0),   \
         "r"(b1))

template <>
__device__ __forceinline__ void mma<__half>(Accumulator& d, const FragmentA& a, uint32_t b0,
                                            uint32_t b1, const Accumulator& c) {
#if __CUDA_ARCH__ >= 800
  FL_MMA16("f16.f16");
#else
  FL_MMA("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", "{%4, %5}", "{%6}",
         "{%7, %8, %9, %10}", "r"(a.r[0]), "r"(a.r[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d.r[0]), "+f"(d.r[1]), "+f"(d.r[2]), "+f"(d.r[3])
      : "r"(a.r[2]), "r"(a.r[3]), "r"(b1));
#endif
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(Accumulator& d, const FragmentA& a, uint32_t b0,
                                                   uint32_t b1, const Accumulator& c) {
#if __CUDA_ARCH__ >= 800
  FL_MMA16("bf16.bf16");
#endif
}
#undef FL_MMA16
#undef FL_MMA

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

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit numbers; lanes 8 m to 8 m + 7 give the rows of matrix m, which lie
// kOffset bytes behind their addresses.
template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address), "n"(kOffset));
}
template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address), "n"(kOffset));
}

// 16 bytes from global to shared memory, of which `bytes` are read and the rest are zero.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
#else
  uint4 value = make_uint4(0, 0, 0, 0);
  if (bytes > 0) value = *static_cast<const uint4*>(from);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w));
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}
// All but the last kPending groups of copies by this thread have arrived.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fl
