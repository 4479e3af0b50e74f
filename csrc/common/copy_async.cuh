// Copies of 16 bytes from global to shared memory: cp.async from sm_80 on, a load and a store
// before.
#pragma once

#include <cstdint>

namespace fl {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What lies at an address in shared memory. Unlike inline assembly, the compiler makes constant
// distances between such addresses part of the instructions.
template <class T>
__device__ __forceinline__ T& shared_at(uint32_t address) {
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// Of the 16 bytes `bytes` are read and the rest is zero; before sm_80, bytes is 0 or 16.
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

// All 16 bytes, kTo and kFrom bytes behind the addresses.
template <int kTo, int kFrom>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(kTo),
               "n"(kFrom));
#else
  shared_at<uint4>(to + kTo) =
      *reinterpret_cast<const uint4*>(static_cast<const char*>(from) + kFrom);
#endif
}

// `count` numbers and zeros, 16 bytes together: by an asynchronous copy, or one by one.
template <class T>
__device__ __forceinline__ void copy_chunk(uint32_t to, const T* from, int count, bool aligned) {
  constexpr int kChunk = 16 / sizeof(T);
#if __CUDA_ARCH__ < 800
  aligned = aligned && (count == kChunk || count == 0);
#endif
  if (aligned) return copy_async(to, from, static_cast<int>(sizeof(T)) * count);
  alignas(16) T values[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) values[i] = i < count ? from[i] : T(0.0f);
  const uint4 bits = *reinterpret_cast<const uint4*>(values);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bits.x), "r"(bits.y),
               "r"(bits.z), "r"(bits.w));
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

}  // namespace fl
