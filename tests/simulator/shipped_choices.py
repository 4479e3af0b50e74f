"""Writes fastlayers/choices.json from lower bounds, until somebody measures: python -m tests.simulator.shipped_choices

For linear layers the choice is between one fused kernel, and cuBLAS followed by a pass for bias and activation. Lower
bounds (work over the published rates of gpus.py) tell two things apart: the pass moves the output through DRAM once
more, and the fused kernel multiplies with mma.sync, which reaches 0.63 of the tensor cores' rate on Hopper, where
cuBLAS has wgmma (Luo et al. 2024, arXiv:2402.13499), and in float32 with three TF32 products, where cuBLAS takes plain
FFMA. How close to its bound either comes they do not know.
"""

import torch

from fastlayers.benchmarks.tune import DTYPES, LAYERS
from fastlayers.choices import SHIPPED, Choice, write
from tests.simulator.gpus import GPUS

MMA_SYNC_ON_HOPPER = 0.63
MODELS = ("T4", "A100", "H100")  # one per architecture that the library is compiled for


def _rates(gpu, dtype):
    """(fused, cuBLAS) FLOP/s of a product."""
    clocks = gpu.multiprocessors * gpu.clock
    tensor, plain = gpu.tensor * clocks, 2 * gpu.lanes["fp32"] * clocks
    share = MMA_SYNC_ON_HOPPER if gpu.arch == "sm_90" else 1.0
    if dtype != torch.float32:
        return share * tensor, tensor
    return (plain if gpu.arch == "sm_75" else share * tensor / 2 / 3), plain  # TF32 has half the rate


def bounds(gpu, op, dtype, gradient, rows, in_features, out_features):
    """Seconds at least of (fused, cuBLAS and a pass); a backward has twice the products and a pass on both sides."""
    weights = 2 if op == "gated_linear_act" else 1
    flops = 2 * weights * rows * in_features * out_features
    output = rows * out_features * dtype.itemsize
    moved = dtype.itemsize * (rows * in_features + weights * in_features * out_features) + output
    times = [max(flops / rate, moved / gpu.dram) for rate in _rates(gpu, dtype)]
    if gradient:
        times = [3 * seconds for seconds in times]
    return times[0], times[1] + (weights + 1) * output / gpu.dram


def entries():
    """The shipped table."""
    for gpu in (gpu for name in MODELS for gpu in GPUS if gpu.name == name):
        for dtype in DTYPES:
            if (gpu.arch, dtype) == ("sm_75", torch.bfloat16):
                continue
            for op in ("linear_act", "gated_linear_act"):
                for gradient in (False, True):
                    for sizes in LAYERS:
                        fused, split = bounds(gpu, op, dtype, gradient, *sizes)
                        order = ("cuda", "cublas") if fused <= split else ("cublas", "cuda")
                        source = f"estimated: lower bounds on {gpu.name}, {1e6 * fused:.0f} us fused, "
                        source += f"{1e6 * split:.0f} us with cuBLAS and a pass"
                        name = str(dtype).removeprefix("torch.")
                        yield Choice(op, gpu.arch, name, gradient, sizes, order, source)


if __name__ == "__main__":
    write(SHIPPED, entries())
