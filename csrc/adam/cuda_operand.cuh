// Eight elements of an operand at a time, whatever its dtype: 16-byte accesses where it is aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "adam/params.h"

namespace fl {

constexpr int kWidth = 8;  // elements per thread and turn: one 16-byte access of a 16-bit dtype

template <class T>
__device__ __forceinline__ float widen(T x) {
  return static_cast<float>(x);
}

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ bool aligned(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

template <class T>
__device__ __forceinline__ void load_as(const void* data, int64_t n, int count, float* out) {
  const T* from = static_cast<const T*>(data) + n;
  if (count == kWidth && aligned(from)) {
    constexpr int kVectors = kWidth * sizeof(T) / sizeof(uint4);
    uint4 vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vectors[v] = reinterpret_cast<const uint4*>(from)[v];
    T values[kWidth];
    __builtin_memcpy(values, vectors, sizeof values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = widen(values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = i < count ? widen(from[i]) : 0.0f;
}

template <class T>
__device__ __forceinline__ void store_as(void* data, int64_t n, int count, const float* in) {
  T* to = static_cast<T*>(data) + n;
  T values[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = narrow<T>(in[i]);
  if (count == kWidth && aligned(to)) {
    constexpr int kVectors = kWidth * sizeof(T) / sizeof(uint4);
    uint4 vectors[kVectors];
    __builtin_memcpy(vectors, values, sizeof values);
    // __stcg, because plain stores are merged with those of the tail below, into single elements.
#pragma unroll
    for (int v = 0; v < kVectors; ++v) __stcg(reinterpret_cast<uint4*>(to) + v, vectors[v]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (i < count) to[i] = values[i];
  }
}

// The branch on dtype is the same for all threads of a block.
__device__ __forceinline__ void load8(const void* data, DType dtype, int64_t n, int count,
                                      float* out) {
  if (dtype == DType::kFloat32) return load_as<float>(data, n, count, out);
  if (dtype == DType::kFloat16) return load_as<__half>(data, n, count, out);
  load_as<__nv_bfloat16>(data, n, count, out);
}

__device__ __forceinline__ void store8(void* data, DType dtype, int64_t n, int count,
                                       const float* in) {
  if (dtype == DType::kFloat32) return store_as<float>(data, n, count, in);
  if (dtype == DType::kFloat16) return store_as<__half>(data, n, count, in);
  store_as<__nv_bfloat16>(data, n, count, in);
}

__device__ __forceinline__ float load1(const void* data, DType dtype, int64_t n) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[n];
  if (dtype == DType::kFloat16) return widen(static_cast<const __half*>(data)[n]);
  return widen(static_cast<const __nv_bfloat16*>(data)[n]);
}

__device__ __forceinline__ void store1(void* data, DType dtype, int64_t n, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[n] = x;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[n] = narrow<__half>(x);
  } else {
    static_cast<__nv_bfloat16*>(data)[n] = narrow<__nv_bfloat16>(x);
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
