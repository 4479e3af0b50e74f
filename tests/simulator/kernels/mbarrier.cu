// mbarriers, bulk copies and bulk stores: right, and with something missing.
#include <cstdint>

using u32 = uint32_t;
using u64 = uint64_t;
__device__ u32 at(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
__device__ void init(u64* bar, u32 n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at(bar)), "r"(n) : "memory");
}
__device__ void arrive(u64* bar) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(at(bar))
               : "memory");
}
__device__ void expect(u64* bar, u32 bytes) {
  asm volatile(
      "{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(at(bar)),
      "r"(bytes)
      : "memory");
}
__device__ bool done(u64* bar, u32 parity) {
  u32 ok;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
      "}"
      : "=r"(ok)
      : "r"(at(bar)), "r"(parity)
      : "memory");
  return ok;
}
__device__ void wait(u64* bar, u32 parity) {
  while (!done(bar, parity)) {
  }
}
__device__ void load(void* to, const void* from, u32 bytes, u64* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(at(to)),
      "l"(from), "r"(bytes), "r"(at(bar))
      : "memory");
}
__device__ void store(void* to, const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(at(from)), "r"(bytes)
               : "memory");
}
#define FENCE() asm volatile("fence.proxy.async.shared::cta;" ::: "memory")
#define COMMIT() asm volatile("cp.async.bulk.commit_group;" ::: "memory")
#define WAIT_READ(n) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory")

// Warp 0 produces rows into a ring of two slots, warp 1 turns them around. missing: 0 nothing, 1
// the wait for a full slot, 2 the wait for an empty one, 3 the announcement of bytes, 4 the other's
// arrival.
extern "C" __global__ void pipeline(const float* from, float* to, int rows, int missing) {
  __shared__ alignas(128) float s[2][32];
  __shared__ u64 full[2], empty[2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i) {
      init(&full[i], 1);
      init(&empty[i], 32);
    }
  __syncthreads();
  for (int r = 0; r < rows; ++r) {
    const int slot = r % 2, parity = r / 2 % 2;
    if (warp == 0) {
      if (r >= 2 && missing != 2) wait(&empty[slot], parity ^ 1);
      if (lane == 0) {
        if (missing == 3)
          arrive(&full[slot]);
        else
          expect(&full[slot], 128);
        load(s[slot], from + 32 * r, 128, &full[slot]);
      }
      __syncwarp();
    } else {
      if (missing != 1) wait(&full[slot], parity);
      to[32 * r + lane] = s[slot][31 - lane];
      if (missing != 4) arrive(&empty[slot]);
    }
  }
}

// Doubles rows through shared memory with bulk stores. missing: 1 the fence, 2 the barrier, 3 the
// wait for the reads.
extern "C" __global__ void doubled(float* x, int rows, int missing) {
  __shared__ alignas(128) float s[64];
  for (int r = 0; r < rows; ++r) {
    s[threadIdx.x] = 2 * x[64 * r + threadIdx.x];
    if (missing != 1) FENCE();
    if (missing != 2) __syncthreads();
    if (threadIdx.x == 0) {
      store(x + 64 * r, s, 256);
      COMMIT();
      if (missing != 3) WAIT_READ(0);
    }
    __syncthreads();
  }
}

extern "C" __global__ void summed(float* x, int count) {
  __shared__ alignas(128) float s[64];
  s[threadIdx.x] = threadIdx.x;
  FENCE();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) {
      asm volatile(
          "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 256;" ::"l"(x),
          "r"(at(s))
          : "memory");
    }
    COMMIT();
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

extern "C" __global__ void bulk(const char* from, float* to, int bytes, int shift) {
  __shared__ alignas(128) char s[1024];
  __shared__ u64 bar;
  if (threadIdx.x == 0) {
    init(&bar, 1);
    expect(&bar, bytes);
    load(s + shift, from, bytes, &bar);
    wait(&bar, 0);
    to[0] = *reinterpret_cast<float*>(s + shift);
  }
}

// Arrivals by hand. missing: 1 room for all of them, 2 an mbarrier for nobody, 3 none at all was
// made, 4 no barrier after it.
extern "C" __global__ void arrivals(float* out, int missing) {
  __shared__ float s[64];
  __shared__ u64 bar;
  const int i = threadIdx.x;
  if (i == 0 && missing != 3) init(&bar, missing == 2 ? 0 : missing == 1 ? 96 : 64);
  if (missing != 4) __syncthreads();
  s[i] = i;
  arrive(&bar);
  wait(&bar, 0);
  out[i] = s[63 - i];
}

// cp.async counted by an mbarrier.
extern "C" __global__ void counted(const float* from, float* to, int waits) {
  __shared__ float s[64];
  __shared__ u64 bar;
  const int i = threadIdx.x;
  if (i == 0) init(&bar, 64);
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at(&s[i])), "l"(from + i)
               : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at(&bar)) : "memory");
  if (waits)
    wait(&bar, 0);
  else
    __syncthreads();
  to[i] = s[63 - i];
}
