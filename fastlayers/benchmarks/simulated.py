"""Counts of the GPU kernels on the simulated GPU, and of others that can be compiled here: no measurement.

python -m fastlayers.benchmarks.simulated FOLDER       from the source checkout, which alone has tests/simulator

Kernels run instruction by instruction on small tensors; a published rate per unit (tests/simulator/gpus.py) makes a
lower bound of each count. What binds is the unit with the largest of them.
"""

import csv
import importlib.util
import sys
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import torch

from fastlayers import ops
from fastlayers.benchmarks import page, pictures
from fastlayers.benchmarks.ladder import ladder
from tests.simulator import Launch, install, record, uninstall
from tests.simulator.gpus import GPUS
from tests.simulator.report import estimate

SEQLEN = 512
ROWS, IN_FEATURES, OUT_FEATURES = 256, 256, 256
PARAMETERS = 1 << 16
NAME = "simulated"
COMPILED_FOR = {"sm_75": "sm_75", "sm_80": "sm_80", "sm_89": "sm_80", "sm_90": "sm_90"}  # a GPU's -> that of its code
NOTICE = """Estimates from a simulated GPU: instructions and bytes that were counted, and lower bounds that follow from
published rates. Nothing on this page was measured; none of these kernels has run on a real GPU for it."""

CHART = "microseconds at least on an A100, and the unit that binds (estimates)"
EXPLANATION = """<h2>What this says</h2><p>Instructions are those of the PTX. Wavefronts are passes of shared memory,
sectors 32 bytes of global memory; each stands beside the least that the same accesses could take. The binding unit is
the one whose work, divided by its published rate on the whole GPU, takes longest; latency, dependences and caches are
left out, so that a real launch takes longer, and a small one much longer.</p>"""


@dataclass(frozen=True)
class Work:
    """launches: backend, dtype -> [Launch] of shipped kernels; bytes: that have to cross the memory bus once."""

    name: str
    launches: object
    bytes: int
    ladder: bool = False  # whether the steps of benchmarks/ladder do the same


def works():
    for head_dim in (64, 128):
        shape, tensor = f"{SEQLEN} x {SEQLEN}, head dim {head_dim}, 16 bits", 2 * SEQLEN * head_dim
        forward, backward = (partial(_attention, head_dim, gradient) for gradient in (False, True))
        yield Work(f"attention forward, {shape}", forward, 4 * tensor, ladder=head_dim == ladder.HEAD_DIM)
        yield Work(f"attention backward, {shape}", backward, 8 * tensor)
    moved = 2 * (ROWS * IN_FEATURES + IN_FEATURES * OUT_FEATURES + ROWS * OUT_FEATURES)
    yield Work(f"linear+gelu forward, {ROWS} x {IN_FEATURES} x {OUT_FEATURES}, 16 bits", _linear, moved)
    yield Work(f"Adam step, {PARAMETERS:,} parameters, float32", _adam, 7 * 4 * PARAMETERS)


def _attention(head_dim, gradient, backend, dtype):
    """The forward, or the backward alone."""
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(3, 1, 1, SEQLEN, head_dim, generator=generator).to(dtype).requires_grad_(gradient)
    with record() as forward:
        out = ops.attention(*tensors, backend=backend)
    if not gradient:
        return forward
    with record() as backward:
        out.backward(torch.ones_like(out))
    return backward


def _linear(backend, dtype):
    shapes = (ROWS, IN_FEATURES), (OUT_FEATURES, IN_FEATURES), (OUT_FEATURES,)
    with record() as launches, torch.no_grad():
        ops.linear_act(*(torch.randn(shape).to(dtype) for shape in shapes), backend=backend)
    return launches


def _adam(backend, dtype):
    param, grad, exp_avg, exp_avg_sq = ([torch.rand(PARAMETERS)] for _ in range(4))
    numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    with record() as launches:
        ops.adam_step(param, grad, exp_avg, exp_avg_sq, [], [torch.zeros(())], **numbers, backend=backend)
    return launches


def implementations(work, arch):
    """Yields (name, [Launch]) of each way to do the work in code for this architecture."""
    dtype = torch.float16 if arch == "sm_75" else torch.bfloat16  # which its tensor cores multiply
    backends = {"fastlayers, CUDA C++": "cuda", "fastlayers, Triton": "triton"}
    if importlib.util.find_spec("triton") is None:
        del backends["fastlayers, Triton"]
    for name, backend in backends.items():
        install(arch)
        try:
            launches = work.launches(backend, dtype)
        finally:
            uninstall()
        yield name, launches
    if work.ladder and arch == "sm_80":
        for step in ladder.STEPS:
            _, counts = ladder.run(ladder.ptx_of(ladder.FOLDER / f"{step}.cu"), *ladder.qkv(SEQLEN))
            yield f"ladder, {step}", [Launch(step, (), (), 0, counts)]


def rows():
    """One per kernel and GPU. microseconds: at least, were the launch spread over the whole of the GPU."""
    for work in works():
        for code in dict.fromkeys(COMPILED_FOR.values()):
            for name, launches in implementations(work, code):
                for gpu in (gpu for gpu in GPUS if COMPILED_FOR.get(gpu.arch) == code):
                    for launch in launches:
                        yield {"work": work.name, "implementation": name, "code": code, **_row(launch, gpu, work.bytes)}


def _row(launch, gpu, most_bytes):
    counts, memory = launch.counts, launch.counts["global"]
    found = estimate(counts, gpu, min(most_bytes, 32 * memory["sectors"]))
    return {
        "kernel": launch.name.split("<")[0],
        "gpu": gpu.name,
        "instructions": counts["total"],
        "tensor_share": counts["classes"].get("tensor", 0) / counts["total"],
        "wavefronts": counts["shared"]["wavefronts"],
        "wavefronts_minimum": counts["shared"]["minimum"],
        "sectors": memory["sectors"],
        "sectors_minimum": memory["minimum"],
        "binding": found.binding,
        "microseconds": 1e6 * found.seconds,
    }


def html(found):
    """The page: a chart and a table for each work."""
    parts = ["<h1>fastlayers' GPU kernels, simulated</h1>", f"<p class=notice><b>{escape(NOTICE)}</b></p>"]
    for work in dict.fromkeys(row["work"] for row in found):
        mine = [row for row in found if row["work"] == work]
        chart = page.embedded(pictures.bars_svg(work, _totals(mine), CHART))
        parts.append(f"<h2>{escape(work)}</h2><div class=wide>{chart}</div>{_table(mine)}")
    parts.append(EXPLANATION)
    return page.html("fastlayers' GPU kernels, simulated", "\n".join(parts))


def _totals(found):
    """{implementation, and what binds the longest of its kernels: microseconds of all together} on the A100."""
    kernels = {}
    for row in (row for row in found if row["gpu"] == "A100"):
        kernels.setdefault(row["implementation"], []).append(row)
    longest = {name: max(rows, key=lambda row: row["microseconds"])["binding"] for name, rows in kernels.items()}
    return {f"{name}: {longest[name]}": sum(row["microseconds"] for row in rows) for name, rows in kernels.items()}


def _table(found):
    heads = ("kernel", "implementation", "GPU", "binding unit (estimate)", "at least", "instructions", "tensor cores")
    heads += ("wavefronts / least", "sectors / least")
    lines = []
    for row in found:
        share, pairs = f"{row['tensor_share']:.1%}", []
        for count in ("wavefronts", "sectors"):
            pairs.append(f"{row[count]:,} / {row[f'{count}_minimum']:,}")
        numbers = (f"{row['microseconds']:.3g} us", f"{row['instructions']:,}", share, *pairs)
        texts = (row["kernel"], row["implementation"], f"{row['gpu']} ({row['code']})", row["binding"])
        lines.append((*texts, *map(page.Html, numbers)))
    return f"<details><summary>{len(lines)} rows</summary>{page.table(heads, lines)}</details>"


def main(arguments):
    if len(arguments) != 1:
        print("wanted one argument, the folder to write to: python -m fastlayers.benchmarks.simulated FOLDER")
        return 2
    folder, found = Path(arguments[0]), list(rows())
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{NAME}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    (folder / f"{NAME}.html").write_text(html(found), encoding="utf-8")
    print(f"written: {folder / NAME}.csv, {folder / NAME}.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
