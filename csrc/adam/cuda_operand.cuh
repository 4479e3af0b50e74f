// Elements of an operand, whatever its dtype: eight per thread at a time, or a single one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "adam/params.h"

namespace fl {

constexpr int kWidth = 8;  // elements per thread and turn
constexpr int kRun = 4;    // that lie side by side at least: 16 bytes of float32
constexpr int kWarpElements = 32 * kWidth;

// Two numbers of 16 bits, the first in the lower half.
__device__ __forceinline__ float2 widen(DType dtype, uint32_t pair) {
  if (dtype == DType::kFloat16) return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

__device__ __forceinline__ uint32_t narrow(DType dtype, float low, float high) {
  if (dtype == DType::kFloat16) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The eight elements of a thread: two runs of kRun, the second `apart` from the first. kRun apart,
// they are one access of 16 bytes of a 16-bit dtype; 32 kRun apart, the accesses of a warp to
// float32 lie side by side, and each takes the 32-byte sectors it touches whole.
struct Eight {
  int64_t first;
  int apart;

  // Of a warp's kWarpElements elements from n on. `wide`: some operand is float32.
  __device__ __forceinline__ Eight(int64_t n, int lane, bool wide)
      : first(n + lane * (wide ? kRun : kWidth)), apart(wide ? 32 * kRun : kRun) {}
};

// Branches on dtype and `apart` are the same for all threads of a block. Every 16 bytes are
// aligned.
__device__ __forceinline__ void load8(const void* data, DType dtype, Eight at, float* out) {
  if (dtype == DType::kFloat32) {
    const float* from = static_cast<const float*>(data) + at.first;
    const float4 low = *reinterpret_cast<const float4*>(from);
    const float4 high = *reinterpret_cast<const float4*>(from + at.apart);
    __builtin_memcpy(out, &low, sizeof low);
    __builtin_memcpy(out + kRun, &high, sizeof high);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + at.first;
  uint4 bits;
  if (at.apart == kRun) {
    bits = *reinterpret_cast<const uint4*>(from);
  } else {
    const uint2 low = *reinterpret_cast<const uint2*>(from);
    const uint2 high = *reinterpret_cast<const uint2*>(from + at.apart);
    bits = make_uint4(low.x, low.y, high.x, high.y);
  }
  const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = widen(dtype, pairs[i]);
    out[2 * i] = x.x;
    out[2 * i + 1] = x.y;
  }
}

// By __stcg, because plain stores of two branches are merged, into single elements.
__device__ __forceinline__ void store8(void* data, DType dtype, Eight at, const float* in) {
  if (dtype == DType::kFloat32) {
    float* to = static_cast<float*>(data) + at.first;
    __stcg(reinterpret_cast<float4*>(to), make_float4(in[0], in[1], in[2], in[3]));
    __stcg(reinterpret_cast<float4*>(to + at.apart), make_float4(in[4], in[5], in[6], in[7]));
    return;
  }
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = narrow(dtype, in[2 * i], in[2 * i + 1]);
  uint16_t* to = static_cast<uint16_t*>(data) + at.first;
  if (at.apart == kRun) {
    __stcg(reinterpret_cast<uint4*>(to), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  } else {
    __stcg(reinterpret_cast<uint2*>(to), make_uint2(pairs[0], pairs[1]));
    __stcg(reinterpret_cast<uint2*>(to + at.apart), make_uint2(pairs[2], pairs[3]));
  }
}

__device__ __forceinline__ float load1(const void* data, DType dtype, int64_t n) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[n];
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(data)[n]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[n]);
}

__device__ __forceinline__ void store1(void* data, DType dtype, int64_t n, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[n] = x;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[n] = __float2half_rn(x);
  } else {
    static_cast<__nv_bfloat16*>(data)[n] = __float2bfloat16_rn(x);
  }
}

// Where element n stands in memory.
__device__ __forceinline__ int64_t offset_of(const AdamLayout& layout, int operand, int64_t n) {
  int64_t offset = 0;
  for (int d = layout.dims - 1; d >= 0; --d) {
    offset += n % layout.sizes[d] * layout.strides[operand][d];
    n /= layout.sizes[d];
  }
  return offset;
}

}  // namespace fl
