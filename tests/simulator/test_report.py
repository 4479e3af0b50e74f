"""Occupancy and bounds against figures worked out by hand."""

import pytest
import torch

from tests.simulator.cuda import compile_cuda
from tests.simulator.gpus import GPUS
from tests.simulator.report import compile_facts, estimate, hot_lines, occupancy, report

T4, A100, H100, RTX4090 = GPUS


@pytest.mark.parametrize(
    "gpu, registers, shared, threads, blocks, limit",
    [
        (A100, 32, 0, 256, 8, "threads"),  # 2048 / 256
        (A100, 128, 0, 256, 2, "registers"),  # 65536 / (128 * 256)
        (A100, 255, 0, 128, 2, "registers"),  # 8192 per warp: two warps on each of four schedulers
        (A100, 33, 0, 1024, 1, "registers"),  # 1280 per warp: 12 * 4 = 48 warps
        (A100, 32, 50 * 1024, 128, 3, "shared"),  # 164 KB / (50 KB + 1 KB)
        (A100, 16, 0, 32, 32, "blocks"),
        (A100, 32, 164 * 1024, 128, 0, "shared"),  # more than a block may have
        (T4, 32, 0, 1024, 1, "threads"),
        (T4, 32, 32 * 1024, 128, 2, "shared"),
        (H100, 168, 100 * 1024, 128, 2, "shared"),  # 228 KB / 101 KB
        (RTX4090, 40, 0, 512, 3, "threads"),
    ],
)
def test_occupancy(gpu, registers, shared, threads, blocks, limit):
    found = occupancy(gpu, registers, shared, threads)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == blocks * -(-threads // 32)


def synthetic(**given):
    counts = {
        "total": 0,
        "classes": {},
        "mma_flops": 0,
        "shared": {"accesses": 0, "wavefronts": 0, "minimum": 0, "bytes": 0},
        "global": {"accesses": 0, "sectors": 0, "minimum": 0, "bytes": 0},
        "barriers": 0,
        "lines": [],
    }
    return counts | given


@pytest.mark.parametrize(
    "unit, given, seconds",
    [
        ("tensor", {"mma_flops": 312e12}, 1.0),  # 312 TFLOPS
        ("issue", {"total": 4 * 108 * 1.41e9}, 1.0),
        ("fp32", {"classes": {"fp32": 19.49e12 / 64}}, 1.0),  # 19.5 TFLOPS, 64 per warp instruction
        ("special", {"classes": {"special": 108 * 1.41e9}}, 2.0),  # 16 of 32 lanes per clock
        ("shared memory", {"shared": {"wavefronts": 108 * 1.41e9}}, 1.0),
        ("DRAM", {"global": {"sectors": 2039e9 / 32}}, 1.0),
    ],
)
def test_bounds(unit, given, seconds):
    counts = synthetic(**given)
    counts["global"].setdefault("sectors", 0)
    found = estimate(counts, A100)
    assert found.binding == unit
    assert found.seconds == pytest.approx(seconds, rel=2e-3)


def test_bytes_that_the_cache_serves():
    counts = synthetic(total=1000)
    counts["global"]["sectors"] = 10**9
    assert estimate(counts, T4).seconds == pytest.approx(32e9 / 320e9)
    assert estimate(counts, T4, dram_bytes=3.2e9).seconds == pytest.approx(0.01)


def test_published_peaks_follow_from_the_rates():
    peaks = {"T4": 65e12, "A100": 312e12, "H100": 989e12, "RTX 4090": 165e12}
    for gpu in GPUS:
        assert gpu.tensor * gpu.multiprocessors * gpu.clock == pytest.approx(peaks[gpu.name], rel=5e-3)


SOURCE = r"""
extern "C" __global__ void add(const float* a, const float* b, float* c) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  c[i] = a[i] + b[i];
}
extern "C" __global__ void chain(float* x, int n) {
  __shared__ float s[128];
  float y = x[threadIdx.x], z = y + 1;
  for (int i = 0; i < n; ++i) { y = fmaf(y, z, 0.5f); z = fmaf(z, y, 0.25f); }
  s[threadIdx.x] = y + z;
  __syncthreads();
  x[threadIdx.x] = s[127 - threadIdx.x];
}
"""


def test_a_sum_is_bound_by_memory():
    a, b, c = torch.randn(3, 4096)
    counts = compile_cuda(SOURCE).launch("add", 16, 256, [a, b, c])
    assert {estimate(counts, gpu).binding for gpu in GPUS} == {"DRAM"}
    text = report(counts, threads=256)
    assert text.startswith("estimate, not a measurement")
    assert [gpu.name in text for gpu in GPUS] == [True] * 4 and "DRAM" in text and "tensor" not in text


def test_a_chain_is_bound_by_arithmetic():
    counts = compile_cuda(SOURCE).launch("chain", 1, 128, [torch.zeros(128), 1000])
    assert {estimate(counts, gpu).binding for gpu in (T4, A100)} == {"fp32"}
    assert "fma.rn.f32" in hot_lines(counts, 4)
    assert len(hot_lines(counts, 4).splitlines()) == 5


def test_what_the_compiler_says():
    module = compile_cuda(SOURCE)
    facts = compile_facts(module.ptx, "chain", "sm_80")
    assert 8 <= facts.registers <= 40 and facts.shared == 512 and facts.spills == 0
    counts = module.launch("chain", 1, 128, [torch.zeros(128), 1])
    assert "100% threads" in report(counts, threads=128, resources=facts)
    with pytest.raises(RuntimeError, match="no kernel 'nothing'"):
        compile_facts(module.ptx, "nothing", "sm_80")
