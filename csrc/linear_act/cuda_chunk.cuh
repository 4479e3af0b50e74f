// Neighbouring elements of a row as float32, on their way between memory and arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/scalar.cuh"

namespace fl {

template <int kBytes>
struct Bits;
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};

// In one access, which the compiler cannot take apart to share its elements with a tail's.
__device__ __forceinline__ void store_whole(void* to, const uint4& bits) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}
__device__ __forceinline__ void store_whole(void* to, const uint2& bits) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x),
               "r"(bits.y)
               : "memory");
}

__device__ __forceinline__ void assign(float& to, float from) { to = from; }
__device__ __forceinline__ void assign(__half& to, float from) { to = __float2half_rn(from); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float from) {
  to = __float2bfloat16_rn(from);
}

template <int kCount_>
struct Chunk {
  static constexpr int kCount = kCount_;
  float v[kCount];

  __device__ __forceinline__ static Chunk of(float value) {
    Chunk chunk;
#pragma unroll
    for (float& x : chunk.v) x = value;
    return chunk;
  }

  // The first `count` elements from memory, in one access where they lie well; the rest is 0.
  template <class T>
  __device__ __forceinline__ void load(const T* from, int count) {
    using Whole = typename Bits<kCount * sizeof(T)>::type;
    T values[kCount];
    if (count >= kCount && reinterpret_cast<uintptr_t>(from) % sizeof(Whole) == 0) {
      *reinterpret_cast<Whole*>(values) = *reinterpret_cast<const Whole*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = i < count ? from[i] : T(0.0f);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = static_cast<float>(values[i]);
  }

  template <class T>
  __device__ __forceinline__ void store(T* to, int count) const {
    using Whole = typename Bits<kCount * sizeof(T)>::type;
    alignas(16) T values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) assign(values[i], v[i]);
    if (count >= kCount && reinterpret_cast<uintptr_t>(to) % sizeof(Whole) == 0) {
      store_whole(to, *reinterpret_cast<const Whole*>(values));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < count) to[i] = values[i];
      }
    }
  }

  __device__ __forceinline__ Chunk operator+(const Chunk& other) const {
    Chunk sum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum.v[i] = v[i] + other.v[i];
    return sum;
  }
  __device__ __forceinline__ Chunk operator*(const Chunk& other) const {
    Chunk product;
#pragma unroll
    for (int i = 0; i < kCount; ++i) product.v[i] = v[i] * other.v[i];
    return product;
  }
};

// activation(z), and its derivative there. The choice is made once for all elements.
template <int kCount>
__device__ __forceinline__ Chunk<kCount> activate(Activation activation, const Chunk<kCount>& z) {
  Chunk<kCount> out;
  with_activation(activation, [&](auto chosen) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out.v[i] = decltype(chosen)::forward(Scalar(z.v[i])).x;
  });
  return out;
}
template <int kCount>
__device__ __forceinline__ Chunk<kCount> slope(Activation activation, const Chunk<kCount>& z) {
  Chunk<kCount> out;
  with_activation(activation, [&](auto chosen) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out.v[i] = decltype(chosen)::derivative(Scalar(z.v[i])).x;
  });
  return out;
}

}  // namespace fl
