"""Writes fastlayers/choices.json: python -m tests.simulator.shipped_choices

What an H100 measured in bfloat16 (`fastlayers bench --tune`) serves float16 there, too. Elsewhere, until somebody
measures, entries come from lower bounds. For linear layers the choice is between one fused kernel, and cuBLAS followed
by a pass for the activation. Lower bounds (work over the published rates of gpus.py) tell two things apart: the pass
moves the output through DRAM once more, and the fused kernel multiplies with mma.sync, which reaches 0.63 of the tensor
cores' rate on Hopper, where cuBLAS has wgmma (Luo et al. 2024, arXiv:2402.13499), and in float32 with three TF32
products, where cuBLAS takes plain FFMA.

For attention in 16 bits on sm_80 it is between the CUDA kernels and Triton's, by what the simulator counts of each:
products, and instructions to issue. sm_120 has the instructions of sm_80, not those of sm_90, and takes its entries.

How close to its bound a kernel comes these bounds do not know.
"""

from dataclasses import replace
from pathlib import Path

import torch

from fastlayers import ops
from fastlayers.benchmarks.tune import ATTENTION, DTYPES, LAYERS
from fastlayers.choices import SHIPPED, Choice, read, write
from tests import simulator
from tests.simulator.gpus import GPUS

MEASURED = Path(__file__).parents[2] / "fastlayers/benchmarks/results/h100/choices.json"
MMA_SYNC_ON_HOPPER = 0.63
# (head_dim, backend) on sm_80: forward, backward; each (products of 64 x 64 x head_dim, instructions of a warp
# without moves) per 64 x 64 scores, as count_attention() had it with nvcc 13.0 and Triton 3.9.
COUNTS = {
    (64, "cuda"): ((2, 1218), (5, 3026)),
    (64, "triton"): ((2, 1884), (7, 3940)),
    (128, "cuda"): ((2, 1828), (5, 5692)),
    (128, "triton"): ((2, 2346), (7, 7253)),
}
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


def count_attention(head_dim, backend):
    """An entry of COUNTS, of a head of 512 rows and keys in bfloat16, on the simulator that is installed."""
    generator = torch.Generator().manual_seed(0)
    tensors = [t.requires_grad_() for t in torch.randn(3, 1, 1, 512, head_dim, generator=generator).bfloat16()]
    with simulator.record() as launches:
        out = ops.attention(*tensors, backend=backend)
        forward = len(launches)
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    passes = [[launch.counts for launch in some] for some in (launches[:forward], launches[forward:])]
    flops = [sum(counts["mma_flops"] for counts in some) for some in passes]
    issued = [sum(counts["total"] - counts["classes"]["move"] for counts in some) for some in passes]
    return tuple((f / (2 * 512 * 512 * head_dim), i / 64) for f, i in zip(flops, issued))


def attention_bound(gpu, backend, gradient, batch, heads, seqlen, head_dim):
    """Seconds at least of causal attention in 16 bits."""
    clocks, (forward, backward) = 0, COUNTS[head_dim, backend]
    for products, instructions in (forward, backward) if gradient else (forward,):
        multiply = products * 2 * 64 * 64 * head_dim / gpu.tensor
        exponentials = 64 * 64 / gpu.lanes["special"]
        clocks += max(multiply, instructions / gpu.schedulers, exponentials)
    return clocks * batch * heads * (seqlen / 64) ** 2 / 2 / gpu.multiprocessors / gpu.clock


def _attention_entries(gpu, dtype, gradient):
    for batch, heads, seqlen, head_dim in ATTENTION:
        times = {
            name: attention_bound(gpu, name, gradient, batch, heads, seqlen, head_dim) for name in ("cuda", "triton")
        }
        order = tuple(sorted(times, key=times.get))
        source = f"estimated: lower bounds on {gpu.name}, {1e6 * times['cuda']:.0f} us in CUDA C++, "
        source += f"{1e6 * times['triton']:.0f} us in Triton"
        name = str(dtype).removeprefix("torch.")
        yield Choice("attention", gpu.arch, name, gradient, (batch * heads, seqlen, seqlen, head_dim), order, source)


def _linear_entries(gpu, dtype):
    for op in ("linear_act", "gated_linear_act"):
        for gradient in (False, True):
            for sizes in LAYERS:
                fused, split = bounds(gpu, op, dtype, gradient, *sizes)
                order = ("cuda", "cublas") if fused <= split else ("cublas", "cuda")
                source = f"estimated: lower bounds on {gpu.name}, {1e6 * fused:.0f} us fused, "
                source += f"{1e6 * split:.0f} us with cuBLAS and a pass"
                yield Choice(op, gpu.arch, str(dtype).removeprefix("torch."), gradient, sizes, order, source)


def _estimated():
    for gpu in (gpu for name in MODELS for gpu in GPUS if gpu.name == name):
        for dtype in DTYPES:
            if (gpu.arch, dtype) == ("sm_75", torch.bfloat16):
                continue
            found = list(_linear_entries(gpu, dtype))
            if gpu.arch == "sm_80" and dtype != torch.float32:
                found += [entry for gradient in (False, True) for entry in _attention_entries(gpu, dtype, gradient)]
            yield from found
            if gpu.arch == "sm_80":
                yield from (replace(entry, arch="sm_120") for entry in found)


def _call(choice):
    return choice.op, choice.arch, choice.dtype, choice.gradient, choice.sizes


def entries():
    """The shipped table."""
    measured = read(MEASURED)
    measured += [replace(choice, dtype="float16", source=f"{choice.source}, in bfloat16") for choice in measured]
    known = {_call(choice) for choice in measured}
    return [*measured, *(choice for choice in _estimated() if _call(choice) not in known)]


if __name__ == "__main__":
    write(SHIPPED, entries())
