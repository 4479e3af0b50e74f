"""Runs the steps of the ladder on the simulated GPU, checks them, and prints what they took.

python -m fastlayers.benchmarks.ladder        from the source checkout, which alone has tests/simulator; needs nvcc
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from fastlayers import ops

try:
    from tests.numerics import assert_accurate
    from tests.simulator import Module, install, record, uninstall
except ImportError:
    raise SystemExit(
        "the ladder runs on the simulated GPU in tests/simulator, which only the source checkout has: "
        "run python -m fastlayers.benchmarks.ladder from its root"
    ) from None

FOLDER = Path(__file__).parent
STEPS = ["1_naive", "2_tiles", "3_tensor_cores", "4_shared_memory", "5_softmax"]
HEAD_DIM, ROWS = 64, 128  # rows of q and threads per block, of every step


def ptx_of(source):
    """What nvcc makes of CUDA C++ text or a file, for sm_80."""
    nvcc = shlex.split(os.environ.get("NVCC", "nvcc"))
    if shutil.which(nvcc[0]) is None:
        raise SystemExit(f"the ladder needs nvcc to compile its steps; {nvcc[0]} was not found, set NVCC")
    text = source.read_text() if isinstance(source, Path) else source
    command = [*nvcc, "-std=c++17", "-O3", "-lineinfo", "-ptx", "-arch=compute_80", "-x", "cu", "-", "-o", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nvcc: {done.stderr}")
    return done.stdout


def run(ptx, query, key, value, is_causal=False):
    """The output of one step for (batch, heads, seqlen, 64), and its counts."""
    batch, heads, seqlen, _ = query.shape
    out = torch.full_like(query, float("nan"))
    grid = (-(-seqlen // ROWS), batch * heads)
    counts = Module(ptx).launch("attention", grid, ROWS, [query, key, value, out, seqlen, is_causal])
    return out, counts


def product(query, key, value, is_causal=False):
    """The same of the shipped kernel."""
    install("sm_80")
    try:
        with record() as launches:
            out = ops.attention(query, key, value, is_causal=is_causal, backend="cuda")
    finally:
        uninstall()
    (launch,) = launches
    return out, launch.counts


def qkv(seqlen, heads=1):
    return torch.randn(3, 1, heads, seqlen, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()


def check(out, query, key, value, is_causal=False):
    """Assert the tolerance rule of fastlayers/agreement.py."""
    exact = ops.attention(*(x.double() for x in (query, key, value)), is_causal=is_causal, backend="reference")
    eager = ops.attention(query, key, value, is_causal=is_causal, backend="reference")
    assert_accurate(out, exact, eager, "attention")


def counts_of_all(seqlen=512):
    """Name -> counts of each step and of the product, for one head of seqlen x seqlen scores."""
    tensors = qkv(seqlen)
    found = {}
    for name in STEPS:
        out, found[name] = run(ptx_of(FOLDER / f"{name}.cu"), *tensors)
        check(out, *tensors)
    out, found["the product"] = product(*tensors)
    check(out, *tensors)
    return found


def row(counts, seqlen=512):
    """The columns of the table, per 64 x 64 scores: instructions, the tensor cores' share of them in per cent, shared
    wavefronts, their minimum, global sectors, their minimum."""
    tiles = (seqlen / 64) ** 2
    shared, memory = counts["shared"], counts["global"]
    return [
        counts["total"] / tiles,
        100 * counts["classes"].get("tensor", 0) / counts["total"],
        shared["wavefronts"] / tiles,
        shared["minimum"] / tiles,
        memory["sectors"] / tiles,
        memory["minimum"] / tiles,
    ]


def table(found):
    """Markdown."""
    lines = ["| step | instructions | tensor cores | wavefronts | minimum | sectors | minimum |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, counts in found.items():
        instructions, share, *rest = row(counts)
        cells = [f"{instructions:,.0f}", f"{share:.1f}%", *(f"{x:,.0f}" for x in rest)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    print(table(counts_of_all()))
