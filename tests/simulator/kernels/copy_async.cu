// cp.async and its groups: right, and with something missing.
#include <cstdint>

using u32 = uint32_t;
__device__ u32 at(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
#define COPY(to, from, n)                                                                      \
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at(to)), "l"(from), "r"(n) \
               : "memory")
#define COPY16(to, from, n)                                                                     \
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at(to)), "l"(from), "r"(n) \
               : "memory")
#define COMMIT() asm volatile("cp.async.commit_group;" ::: "memory")
#define WAIT(n) asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory")

// Turns a row of 64 numbers around: each thread waits for its own copy, then for the others.
extern "C" __global__ void reverse(const float* from, float* to, int wait, int barrier) {
  __shared__ float s[64];
  const int i = threadIdx.x;
  COPY(&s[i], &from[i], 4);
  COMMIT();
  if (wait) WAIT(0);
  if (barrier) __syncthreads();
  to[i] = s[63 - i];
}

// Rows of 64 numbers through a ring of three slots; row r is turned around while r + 1, r + 2
// arrive.
template <int kPending, bool kBarrier>
__device__ void ring(const float* from, float* to, int rows) {
  __shared__ float s[3][64];
  const int i = threadIdx.x;
  for (int r = 0; r < 2; ++r) {
    if (r < rows) COPY(&s[r][i], &from[64 * r + i], 4);
    COMMIT();
  }
  for (int r = 0; r < rows; ++r) {
    WAIT(kPending);
    __syncthreads();
    to[64 * r + i] = s[r % 3][63 - i];
    if (kBarrier) __syncthreads();
    if (r + 2 < rows) COPY(&s[(r + 2) % 3][i], &from[64 * (r + 2) + i], 4);
    COMMIT();
  }
}
extern "C" __global__ void ring_right(const float* f, float* t, int rows) {
  ring<1, false>(f, t, rows);
}
extern "C" __global__ void ring_too_early(const float* f, float* t, int rows) {
  ring<2, false>(f, t, rows);
}

// A slot is filled again while the other warp still reads it.
extern "C" __global__ void overwrite(const float* from, float* to, int barrier) {
  __shared__ float s[64];
  const int i = threadIdx.x;
  for (int r = 0; r < 3; ++r) {
    COPY(&s[i], &from[64 * r + i], 4);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    to[64 * r + i] = s[63 - i];
    if (barrier) __syncthreads();
  }
}

extern "C" __global__ void tail(const float4* from, float4* to, int bytes) {
  __shared__ float4 s[32];
  const int i = threadIdx.x, mine = min(max(bytes - 16 * i, 0), 16);
  COPY16(&s[i], &from[i], mine);
  COMMIT();
  WAIT(0);
  to[i] = s[i];
}
extern "C" __global__ void ignored(const float* from, float* to, int odd) {
  __shared__ float s[32];
  const int i = threadIdx.x;
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %2, 0; cp.async.ca.shared.global [%0], [%1], 4, p; }" ::"r"(
          at(&s[i])),
      "l"(from + i), "r"(odd & i)
      : "memory");
  COMMIT();
  WAIT(0);
  to[i] = s[i];
}
extern "C" __global__ void unaligned(const float* from, float* to) {
  __shared__ float4 s[32];
  COPY16(&s[threadIdx.x], from + 4 * threadIdx.x + 1, 16);
  COMMIT();
  WAIT(0);
  to[threadIdx.x] = s[threadIdx.x].x;
}
