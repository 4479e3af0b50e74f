"""One wrong kernel for each way to go wrong, beside the right one that passes."""

import numpy as np
import pytest
import torch

from tests.simulator import Module, SimulatorError
from tests.simulator.cuda import compile_cuda

SOURCE = r"""
using u32 = unsigned;

extern "C" __global__ void copy(const float* from, float* to, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = from[i];
}
extern "C" __global__ void copy_wide(const float4* from, float4* to) { to[threadIdx.x] = from[threadIdx.x]; }

// Turns 64 numbers around through shared memory, with what belongs between, or not.
extern "C" __global__ void reverse(const float* from, float* to, int barrier) {
  __shared__ float s[64];
  const int i = threadIdx.x;
  s[i] = from[i];
  if (barrier) __syncthreads();
  to[i] = s[63 - i];
}
extern "C" __global__ void twice(float* x, int barrier) {
  __shared__ float s[64];
  const int i = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    s[i] = x[i];
    __syncthreads();
    x[i] = s[blockDim.x - 1 - i] + 1;
    if (barrier) __syncthreads();
  }
}
extern "C" __global__ void same_place(float* to, int step) {
  __shared__ float s[32];
  s[threadIdx.x % 32] = threadIdx.x / 32 * step;
  __syncthreads();
  to[threadIdx.x] = s[threadIdx.x % 32];
}
extern "C" __global__ void part(float* to, int written) {
  __shared__ float s[64];
  if (threadIdx.x < written) s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  to[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void beyond(float* to, int at) {
  extern __shared__ float d[];
  d[threadIdx.x] = 1;
  __syncthreads();
  to[threadIdx.x] = d[threadIdx.x == 5 ? at : threadIdx.x];
}
extern "C" __global__ void local(float* to, int written, int at) {
  float x[64];
  for (int i = 0; i < written; ++i) x[i] = i + to[i];
  asm volatile("" ::"l"(x) : "memory");
  to[0] = x[at];
}
extern "C" __global__ void some_lanes(u32* to, int n) {
  if (threadIdx.x < n) asm volatile("bar.sync 0;" ::: "memory");
  to[threadIdx.x] = 1;
}
extern "C" __global__ void mixed_counts(u32* to, int n) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;" ::: "memory");
  else asm volatile("bar.sync 1, %0;" ::"r"(n) : "memory");
  to[threadIdx.x] = 1;
}
extern "C" __global__ void odd_count(u32* to, int n) {
  asm volatile("bar.sync 1, %0;" ::"r"(n) : "memory");
  to[threadIdx.x] = 1;
}
extern "C" __global__ void barrier_number(u32* to, int id) {
  asm volatile("bar.sync %0, 64;" ::"r"(id) : "memory");
  to[threadIdx.x] = 1;
}
extern "C" __global__ void crossed(u32* to, int crossed) {
  const int first = crossed && threadIdx.x >= 32 ? 2 : 1;
  asm volatile("bar.sync %0, 64;" ::"r"(first) : "memory");
  asm volatile("bar.sync %0, 64;" ::"r"(3 - first) : "memory");
  to[threadIdx.x] = 1;
}
extern "C" __global__ void wait_for_ever(volatile u32* flag) {
  while (*flag == 0) {}
  flag[0] = 2;
}
extern "C" __global__ void trap(u32* x) { if (x[0]) __trap(); }
extern "C" __global__ void shuffle(u32* x, u32 mask) {
  x[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
}
extern "C" __global__ void __launch_bounds__(64) bounded(u32* x) { x[threadIdx.x] = 1; }
"""


def launch(name, block, args, grid=1, **options):
    return compile_cuda(SOURCE).launch(name, grid, block, args, **options)


def wrong(kind, name, block, args, grid=1, **options):
    """Runs into an error of this kind; returns its message."""
    with pytest.raises(SimulatorError) as caught:
        launch(name, block, args, grid, **options)
    assert caught.value.kind == kind, caught.value
    return str(caught.value)


def numbers(n):
    return torch.arange(n, dtype=torch.float32)


def test_global_out_of_bounds_by_one_element():
    x, y = numbers(1000), torch.zeros(1000)
    launch("copy", 128, [x, y, 1000], grid=8)
    assert torch.equal(x, y)
    message = wrong("out_of_bounds", "copy", 128, [x, torch.zeros(999), 1000], grid=8)
    for part in ("copy, block (7, 0, 0), thread (103, 0, 0)", "kernel.cu:6", "3996 bytes", "PTX line", "writes 4"):
        assert part in message
    assert "reads 4" in wrong("out_of_bounds", "copy", 128, [numbers(999), y, 1000], grid=8)


def test_views_reach_as_far_as_their_storage():
    x, y = numbers(300), torch.zeros(100)
    launch("copy", 128, [x[100:200], y, 100])
    assert torch.equal(x[100:200], y)


def test_read_only_memory():
    x = np.zeros(64, np.float32)
    x.flags.writeable = False
    launch("copy", 64, [x, np.zeros(64, np.float32), 64])
    assert "read-only" in wrong("out_of_bounds", "copy", 64, [np.zeros(64, np.float32), x, 64])


def test_misaligned_vector():
    x, y = numbers(132), torch.zeros(128)
    launch("copy_wide", 32, [x[4:], y])
    assert "no multiple of 16" in wrong("misaligned", "copy_wide", 32, [x[1:129], y])


def test_missing_barrier_is_a_race():
    x, y = numbers(64), torch.zeros(64)
    launch("reverse", 64, [x, y, 1])
    assert torch.equal(y, x.flip(0))
    message = wrong("uninitialised", "reverse", 64, [x, y, 0])  # the other warp has not even written
    assert "never written" in message
    launch("twice", 64, [x, 1])
    message = wrong("race", "twice", 64, [x, 0])
    assert "warp 0 reads shared bytes" in message and "warp 1 wrote" in message
    launch("twice", 64, [x, 0], race_check=False)


def test_warps_are_no_race_with_themselves():
    x = numbers(32)
    launch("twice", 32, [x, 0])


def test_two_warps_may_store_the_same_value_in_one_place():
    y = torch.ones(64)
    launch("same_place", 64, [y, 0])
    assert not y.any()
    assert "warp 0 wrote" in wrong("race", "same_place", 64, [y, 1])


def test_shared_memory_never_written():
    y = torch.zeros(64)
    launch("part", 64, [y, 64])
    message = wrong("uninitialised", "part", 64, [y, 63])
    assert "thread (63, 0, 0)" in message and "252..255" in message


def test_shared_out_of_bounds():
    y = torch.zeros(64)
    launch("beyond", 64, [y, 63], shared=256)
    assert "256..259" in wrong("out_of_bounds", "beyond", 64, [y, 64], shared=256)
    wrong("out_of_bounds", "beyond", 64, [y, -1], shared=256)
    wrong("out_of_bounds", "beyond", 64, [y, 0], shared=255)


def test_local_memory():
    y = numbers(64)
    launch("local", 1, [y, 64, 63])
    assert y[0] == 126
    wrong("uninitialised", "local", 1, [y, 63, 63])
    wrong("out_of_bounds", "local", 1, [y, 64, 64])


def test_divergent_barrier():
    out = np.zeros(64, np.uint32)
    launch("some_lanes", 64, [out, 64])
    assert "only some lanes" in wrong("divergence", "some_lanes", 64, [out, 63])
    launch("some_lanes", 64, [out, 32])  # the other warp has left: nobody waits for it


def test_shuffle_with_lanes_that_are_not_there():
    out = np.zeros(32, np.uint32)
    launch("shuffle", 32, [out, 0xFFFFFFFF])
    launch("shuffle", 16, [out, 0xFFFF])
    wrong("divergence", "shuffle", 32, [out, 0xFFFF])


def test_barriers_used_wrongly():
    out = np.zeros(64, np.uint32)
    launch("mixed_counts", 64, [out, 64])
    wrong("barrier", "mixed_counts", 64, [out, 96])
    launch("odd_count", 64, [out, 64])
    wrong("barrier", "odd_count", 64, [out, 48])
    wrong("barrier", "odd_count", 96, [np.zeros(96, np.uint32), 32 + 1])
    launch("barrier_number", 64, [out, 15])
    wrong("barrier", "barrier_number", 64, [out, 16])


def test_deadlock():
    out = np.zeros(64, np.uint32)
    launch("crossed", 64, [out, 0])
    assert "every warp waits" in wrong("deadlock", "crossed", 64, [out, 1])
    wrong("deadlock", "odd_count", 64, [out, 96])  # waits for a third warp that the block lacks


def test_timeout():
    launch("wait_for_ever", 1, [np.ones(1, np.uint32)], limit=1_000_000)
    wrong("timeout", "wait_for_ever", 1, [np.zeros(1, np.uint32)], limit=1_000_000)


def test_trap():
    launch("trap", 32, [np.zeros(1, np.uint32)])
    wrong("trap", "trap", 32, [np.ones(1, np.uint32)])


def test_arguments():
    x = np.zeros(64, np.uint32)
    assert "takes 1 arguments, got 2" in wrong("arguments", "trap", 32, [x, x])
    assert "no kernel 'nothing'" in wrong("arguments", "nothing", 32, [])
    wrong("arguments", "trap", 32, [b"1234"])
    wrong("arguments", "some_lanes", 32, [x, 2**40])
    wrong("arguments", "trap", 1025, [x])
    wrong("arguments", "trap", 0, [x])
    wrong("arguments", "trap", 32, [x], shared=200_000)
    launch("bounded", 64, [x])
    wrong("arguments", "bounded", 96, [x])


UNKNOWN = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry f() {
  .reg .b32 %r<4>;
  mov.b32 %r1, 1;
  INSTRUCTION
  ret;
}
"""


@pytest.mark.parametrize(
    "instruction",
    ["frobnicate.b32 %r2, %r1;", "add.q32 %r2, %r1, %r1;", "mov.b32 %q1, %r1;", "ld.global.b32 %r1, [x];"],
)
def test_what_is_not_known_is_an_error_with_its_line(instruction):
    Module(UNKNOWN.replace("INSTRUCTION", "add.s32 %r2, %r1, %r1;")).launch("f", 1, 32, [])
    with pytest.raises(SimulatorError) as caught:
        Module(UNKNOWN.replace("INSTRUCTION", instruction)).launch("f", 1, 32, [])
    assert caught.value.kind == "unsupported" and "line 8" in str(caught.value)
