"""Lanes that part and meet again, warps that wait for each other: kernels from nvcc against models of them."""

import numpy as np
import pytest

from tests.simulator.cuda import compile_cuda

SOURCE = r"""
#define ID (blockIdx.x * blockDim.x + threadIdx.x)
using u32 = unsigned;

// Every lane takes its own way; where the ways meet, all lanes are there again.
extern "C" __global__ void nested(u32* out, u32* together) {
  u32 x = ID, r = 1;
  if (x & 1) {
    r = r * 3 + x;
    if (x & 2) { r ^= 0x55; if (x & 4) r += 7; else r -= 9; } else { r = r * r; }
  } else {
    if (x & 8) r += 1000; else { r += 2; if (x & 16) r *= 5; }
  }
  together[ID] = __activemask();
  out[ID] = r;
}

// As many rounds as the lane's number says, some skipped, some cut short.
extern "C" __global__ void loops(u32* out, u32* together) {
  u32 n = ID % 23, sum = 0;
  for (u32 i = 0; i < n; ++i) {
    if (i % 3 == 1) continue;
    if (sum > 50) break;
    for (u32 j = i; j < n; j += 2) { if (j % 5 == 4) break; sum += j * i + 1; }
  }
  together[ID] = __activemask();
  out[ID] = sum;
}

extern "C" __global__ void early_exit(u32* out) {
  const u32 lane = threadIdx.x % 32;
  if (lane >= 16) return;
  u32 x = lane;
  for (int o = 8; o; o >>= 1) x += __shfl_xor_sync(0xffff, x, o);
  out[ID] = x;
}

extern "C" __global__ void switches(u32* out, u32* together) {
  u32 r = 0;
  switch (ID % 9) {
    case 0: r = ID * ID; break;
    case 1: r += 5;
    case 2: r += 10; break;
    case 3: r = ID ^ 0xff; break;
    case 4: r = ID / 3; break;
    case 5: r = __clz(ID); break;
    case 6: r = __brev(ID); break;
    case 7: r = ID % 7; break;
    default: r = 99;
  }
  together[ID] = __activemask();
  out[ID] = r;
}

__device__ __noinline__ u32 collatz(u32 n) {
  u32 steps = 0;
  while (n > 1) {
    n = n & 1 ? 3 * n + 1 : n / 2;
    if (++steps > 200) return steps;
  }
  return steps;
}
extern "C" __global__ void calls(u32* out) {
  u32 r = collatz(ID);
  if (ID & 1) r += 1000 * collatz(ID + 7);
  out[ID] = r;
}

// A lane holds the lock while its neighbours of the same warp spin for it.
extern "C" __global__ void lock(int* lock, u32* out) {
  while (atomicCAS(lock, 0, 1) != 0) {}
  volatile u32* sum = out;
  *sum = *sum + ID;
  __threadfence();
  atomicExch(lock, 0);
}

// Two halves of a warp talk through shared memory, each with its own mask.
extern "C" __global__ void half_warps(u32* out) {
  __shared__ u32 s[32];
  const u32 lane = threadIdx.x, mask = lane < 16 ? 0xffff : 0xffff0000;
  if (lane < 16) {
    s[lane] = lane * 2; __syncwarp(mask); out[lane] = s[15 - lane];
  } else {
    s[lane] = lane * 3; __syncwarp(mask); out[lane] = s[47 - lane];
  }
}

// Lanes wait in different places of the program for one and the same __syncwarp.
extern "C" __global__ void two_places(u32* out) {
  __shared__ volatile u32 s[32];
  const u32 lane = threadIdx.x;
  if (lane % 3 == 0) {
    s[lane] = lane + 1;
    asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
    out[lane] = s[(lane + 1) % 32];
  } else {
    s[lane] = lane + 1;
    asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
    out[lane] = s[(lane + 1) % 32] + 100;
  }
}
"""

N = 4 * 64
FULL = 0xFFFFFFFF


def run(name, *counts):
    out = np.zeros(N, np.uint32)
    together = np.zeros(N, np.uint32)
    args = {"calls": [out], "early_exit": [out]}.get(name, [out, together])
    compile_cuda(SOURCE).launch(name, 4, 64, args)
    return out, together


def u32(x):
    return x & FULL


def nested(x):
    r = 1
    if x & 1:
        r = r * 3 + x
        if not x & 2:
            return u32(r * r)
        r ^= 0x55
        return u32(r + 7 if x & 4 else r - 9)
    if x & 8:
        return r + 1000
    return (r + 2) * 5 if x & 16 else r + 2


def loops(x):
    n, total = x % 23, 0
    for i in range(n):
        if i % 3 == 1:
            continue
        if total > 50:
            break
        for j in range(i, n, 2):
            if j % 5 == 4:
                break
            total += j * i + 1
    return total


def switches(x):
    way = x % 9
    reverse = int(f"{x:032b}"[::-1], 2)
    return [x * x, 15, 10, x ^ 0xFF, x // 3, 32 - x.bit_length(), reverse, x % 7, 99][way]


@pytest.mark.parametrize("model", [nested, loops, switches], ids=lambda f: f.__name__)
def test_lanes_part_and_meet_again(model):
    out, together = run(model.__name__)
    assert out.tolist() == [model(x) for x in range(N)]
    assert set(together.tolist()) == {FULL}


def test_lanes_that_exited_take_no_part():
    out, _ = run("early_exit")
    assert out.tolist() == [sum(range(16)) if x % 32 < 16 else 0 for x in range(N)]


def test_functions_are_called_by_some_lanes():
    def steps(n):
        count = 0
        while n > 1:
            n = 3 * n + 1 if n & 1 else n // 2
            count += 1
        return count

    out, _ = run("calls")
    assert out.tolist() == [steps(x) + (1000 * steps(x + 7) if x & 1 else 0) for x in range(N)]


def test_lanes_of_a_warp_pass_a_lock_on():
    lock, total = np.zeros(1, np.int32), np.zeros(1, np.uint32)
    compile_cuda(SOURCE).launch("lock", 2, 16, [lock, total])
    assert total[0] == sum(range(32)) and lock[0] == 0


def test_half_warps_with_their_own_masks():
    out = np.zeros(32, np.uint32)
    compile_cuda(SOURCE).launch("half_warps", 1, 32, [out])
    assert out.tolist() == [(15 - i) * 2 if i < 16 else (47 - i) * 3 for i in range(32)]


def test_a_warp_barrier_in_two_places():
    out = np.zeros(32, np.uint32)
    compile_cuda(SOURCE).launch("two_places", 1, 32, [out])
    assert out.tolist() == [(i + 1) % 32 + 1 + (0 if i % 3 == 0 else 100) for i in range(32)]


BARRIERS = r"""
using u32 = unsigned;
#define BAR(kind, id, n) asm volatile("bar." kind " %0, %1;" ::"r"(id), "r"(n) : "memory")

extern "C" __global__ void votes(u32* out) {
  const u32 i = threadIdx.x;
  out[i] = __syncthreads_count(i % 3 == 0);
  out[i] += 1000 * __syncthreads_or(i == 70) + 2000 * __syncthreads_or(i > 500);
  out[i] += 4000 * __syncthreads_and(i < 96) + 8000 * __syncthreads_and(i < 95);
}

// Warp 0 fills a ring of two slots, the others empty it; "full" and "empty" are named barriers.
extern "C" __global__ void ring(u32* out, int rounds) {
  __shared__ u32 slots[2][32];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) {
    for (int i = 0; i < rounds; ++i) {
      if (i >= 2) BAR("sync", 3 + i % 2, 96);
      slots[i % 2][lane] = i * 100 + lane;
      BAR("arrive", 1 + i % 2, 96);
    }
  } else {
    u32 sum = 0;
    for (int i = 0; i < rounds; ++i) {
      BAR("sync", 1 + i % 2, 96);
      sum = sum * 3 + slots[i % 2][31 - lane];
      if (i + 2 < rounds) BAR("arrive", 3 + i % 2, 96);
    }
    out[threadIdx.x] = sum;
  }
}

// Warps leave one after the other; the barrier waits only for those that are left.
extern "C" __global__ void leaving(u32* out) {
  __shared__ u32 s[4];
  const u32 warp = threadIdx.x / 32;
  for (u32 i = 0; i < 4; ++i) {
    if (i == warp) { out[threadIdx.x] = i ? s[i - 1] : 7; return; }
    if (threadIdx.x == 96) s[i] = 10 + i;
    __syncthreads();
  }
}

// Lanes of one warp come to the same barrier from different places.
extern "C" __global__ void parted(u32* out) {
  __shared__ u32 s[64];
  const u32 i = threadIdx.x;
  s[i] = i;
  if (i % 2) asm volatile("barrier.sync 0;" ::: "memory");
  else { s[i] += 100; asm volatile("barrier.sync 0;" ::: "memory"); }
  out[i] = s[63 - i];
}
"""


def test_barriers_that_vote():
    out = np.zeros(96, np.uint32)
    compile_cuda(BARRIERS).launch("votes", 1, 96, [out])
    assert set(out.tolist()) == {32 + 1000 + 4000}


@pytest.mark.parametrize("rounds", [1, 2, 3, 10])
def test_named_barriers_make_a_ring(rounds):
    out = np.zeros(96, np.uint32)
    compile_cuda(BARRIERS).launch("ring", 1, 96, [out, rounds])

    def model(lane):
        total = 0
        for i in range(rounds):
            total = u32(total * 3 + i * 100 + 31 - lane)
        return total

    assert out.tolist() == [0] * 32 + [model(i % 32) for i in range(32, 96)]


def test_barriers_do_not_wait_for_warps_that_left():
    out = np.zeros(128, np.uint32)
    compile_cuda(BARRIERS).launch("leaving", 1, 128, [out])
    assert out.tolist() == [(7, 10, 11, 12)[i // 32] for i in range(128)]


def test_lanes_of_one_warp_come_to_a_barrier_from_two_places():
    out = np.zeros(64, np.uint32)
    counts = compile_cuda(BARRIERS).launch("parted", 1, 64, [out])
    assert out.tolist() == [63 - i + (100 if (63 - i) % 2 == 0 else 0) for i in range(64)]
    assert counts["barriers"] == 4
