// Boxes of tensors, by tensor maps that the host made.
#include <cstdint>

using u32 = uint32_t;
using u64 = uint64_t;
__device__ u32 at(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
struct alignas(64) Map {
  u64 word[16];
};

// The box at (x, y, z) of a tensor, as it lies in shared memory; then back to another tensor.
template <int kRank>
__device__ void box(const Map& from, const Map& to, float* out, int x, int y, int z, int words) {
  extern __shared__ __align__(1024) float s[];
  __shared__ u64 bar;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at(&bar)) : "memory");
    asm volatile(
        "{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(at(&bar)),
        "r"(4 * words)
        : "memory");
    if (kRank == 1)
      asm volatile(
          "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
          "[%1, {%3}], [%2];" ::"r"(at(s)),
          "l"(&from), "r"(at(&bar)), "r"(x)
          : "memory");
    if (kRank == 2)
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
          "[%1, {%3, %4}], [%2];" ::"r"(at(s)),
          "l"(&from), "r"(at(&bar)), "r"(x), "r"(y)
          : "memory");
    if (kRank == 3)
      asm volatile(
          "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
          "[%1, {%3, %4, %5}], [%2];" ::"r"(at(s)),
          "l"(&from), "r"(at(&bar)), "r"(x), "r"(y), "r"(z)
          : "memory");
    u32 ok = 0;
    while (!ok)
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, "
          "p; }"
          : "=r"(ok)
          : "r"(at(&bar))
          : "memory");
    for (int i = 0; i < words; ++i) out[i] = s[i];
    if (kRank == 2)
      asm volatile(
          "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
              &to),
          "r"(at(s)), "r"(x), "r"(y)
          : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
extern "C" __global__ void box1(const __grid_constant__ Map f, const __grid_constant__ Map t,
                                float* o, int x, int y, int z, int n) {
  box<1>(f, t, o, x, y, z, n);
}
extern "C" __global__ void box2(const __grid_constant__ Map f, const __grid_constant__ Map t,
                                float* o, int x, int y, int z, int n) {
  box<2>(f, t, o, x, y, z, n);
}
extern "C" __global__ void box3(const __grid_constant__ Map f, const __grid_constant__ Map t,
                                float* o, int x, int y, int z, int n) {
  box<3>(f, t, o, x, y, z, n);
}
