"""The Adam CUDA kernels: what they move, exactly, and that copies of them broken on purpose are found out."""

import contextlib
import re

import pytest
import torch

from fastlayers import ops
from tests.backends import BACKENDS
from tests.simulator import SimulatorError, host_memory, install, record, rewrite_ptx, uninstall

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the kernels")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CHUNK = 8192  # elements per block


@pytest.fixture(params=["sm_75", "sm_80", "sm_90"], autouse=True)
def arch(request):
    install(request.param)
    yield request.param
    uninstall()


def randn(n, dtype=F32, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adam(n, param=F32, grad=F32, moment=F32, amsgrad=False, masters=False, backend="cuda", steps=(), **options):
    """One step on one parameter of n elements; returns what it changed."""
    lists = [[randn(n, param)], [randn(n, grad, 1)], [randn(n, moment, 2)], [randn(n, moment, 3).abs()]]
    lists.append([randn(n, moment, 4).abs()] if amsgrad else [])
    master = [randn(n)] if masters else []
    steps = steps or [torch.zeros(())]
    options = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.1) | options
    ops.adam_step(*lists, steps, master_params=master, backend=backend, **options)
    return [tensors[0].clone() for tensors in (*lists, master, steps) if tensors]


def counts_of(kernel, call):
    """The counts of the one launch of `kernel` that call() makes."""
    with record() as launches:
        call()
    (launch,) = [launch for launch in launches if launch.name.startswith(kernel)]
    return launch.counts


def accesses(counts, space):
    """(bytes per lane, lines) of the loads and stores of a kernel, where whole warps take part."""
    lines = [line for line in counts["lines"] if re.match(rf"(ld|st)\.{space}\b", line["instruction"])]
    return {line[space]["bytes"] / line[space]["accesses"] / 32 for line in lines}, lines


CASES = {  # accesses of 4 bytes and of 2 bytes per element
    "float32": (7, 0, dict()),
    "float32 with amsgrad": (9, 0, dict(amsgrad=True)),
    "float32, gradients unscaled": (8, 0, dict(grad_scale=torch.tensor(8.0))),
    "bfloat16 gradients": (6, 1, dict(grad=BF16)),
    "float16": (0, 7, dict(param=F16, grad=F16, moment=F16)),
    "float16 with float32 moments": (4, 3, dict(param=F16, grad=F16)),
    "float16 with masters": (6, 2, dict(param=F16, grad=F16, masters=True)),
    "bfloat16": (0, 7, dict(param=BF16, grad=BF16, moment=BF16)),
    "bfloat16, rounded stochastically": (0, 7, dict(param=BF16, grad=BF16, moment=BF16, rng=torch.tensor([1, 2]))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_moves_each_byte_once_and_16_at_a_time(case):
    fours, twos, options = CASES[case]
    n, steps = 2 * CHUNK, [torch.zeros(())]
    with host_memory(*steps):
        counts = counts_of("adam_dense_kernel", lambda: adam(n, steps=steps, **options))
    lines = memory_lines(counts, "global")
    scalars = [line for line in lines if line["global"]["sectors"] == line["global"]["accesses"]]
    assert len(scalars) == ("grad_scale" in options)  # one number for all
    vectors = [line["global"] for line in lines if line not in scalars]
    assert sum(line["bytes"] for line in vectors) == n * (4 * fours + 2 * twos)
    assert {line["bytes"] / line["accesses"] for line in vectors} == {32 * 16}
    # A thread's 8 elements are one access of 2-byte numbers, and two of float32, which share their sectors.
    assert sum(line["sectors"] for line in vectors) == n * (2 * 4 * fours + 2 * twos) // 32
    assert not memory_lines(counts, "local") and not memory_lines(counts, "shared")


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_the_norm_reads_each_element_once(dtype):
    n = 2 * 65536
    with record() as launches:
        ops.grad_norm([randn(n, dtype)], backend="cuda")
    partial, total = launches
    assert (partial.name, partial.grid, total.name, total.grid) == (
        "norm_dense_kernel",
        (2, 1, 1),
        "norm_total_kernel",
        (1, 1, 1),
    )
    counts = partial.counts
    assert counts["global"]["bytes"] == n * dtype.itemsize + 2 * 8
    assert counts["global"]["sectors"] == n * dtype.itemsize // 32 * (2 if dtype == F32 else 1) + 2
    reads = [line["global"] for line in memory_lines(counts, "global") if line["instruction"].startswith("ld")]
    assert {line["bytes"] / line["accesses"] for line in reads} == {32 * 16}
    assert not memory_lines(counts, "local")
    assert counts["shared"]["wavefronts"] == counts["shared"]["minimum"]
    assert total.counts["global"]["bytes"] == 2 * 8 + 4


def test_many_parameters_take_one_launch():
    params, steps = [randn(n) for n in range(1, 101)], [torch.zeros(()) for _ in range(100)]
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    with record() as launches:
        ops.adam_step(
            params,
            [p.clone() for p in params],
            *state,
            [],
            steps,
            lr=0.1,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.0,
            eps=1e-8,
            backend="cuda",
        )
    assert [(launch.name, launch.grid) for launch in launches] == [
        ("adam_advance_kernel", (1, 1, 1)),
        ("adam_dense_kernel<false>", (100, 1, 1)),
    ]


def memory_lines(counts, space):
    return [line for line in counts["lines"] if re.match(rf"(ld|st)\.{space}\b", line["instruction"])]


def norm(n, dtype=F32):
    return [ops.grad_norm([randn(n, dtype)], backend="cuda")]


def half(n):
    return adam(n, param=F16, grad=F16, moment=F16)


def on_device(n):
    return adam(n, lr=torch.tensor(0.01), found_inf=torch.tensor(0.0), grad_norm=torch.tensor(3.0), max_grad_norm=1.0)


# kernel, call, instruction, what becomes of it, and which of those that run (None: each in turn)
BREAKS = {
    "a barrier is dropped": ("norm_dense_kernel", lambda: norm(3000), r"bar\.sync 0", "", (0, 1, 2)),
    "a barrier of the total is dropped": ("norm_total_kernel", lambda: norm(300000), r"bar\.sync 0", "", (0, 1, 2)),
    "a step of the sum is dropped": ("norm_dense_kernel", lambda: norm(3000), r"st\.shared\S* .*", "", None),
    "the sum reads its neighbour": ("norm_dense_kernel", lambda: norm(3000), r"(ld\.shared.*)\]", r"\1+8]", None),
    "the norm goes to the next element": ("norm_total_kernel", lambda: norm(3000), r"(st\.global.*)\]", r"\1+4]", None),
    "the norm reads on after the end": ("norm_dense_kernel", lambda: norm(3000), r"setp\.lt\.s64", "setp.ne.s64", (0,)),
    "a store goes to the next vector": ("adam_dense_kernel", lambda: adam(8200), r"(st\.global\S*v4.* \[%\w+)", r"\1+16", None),
    "a store goes to the next element": ("adam_dense_kernel", lambda: adam(8195), r"(st\.global.* \[%\w+)", r"\1+4", None),
    "a load comes from the next element": ("adam_dense_kernel", lambda: adam(8195), r"(ld\.global\S* .* \[%\w+)", r"\1+4", None),
    "a store of float16 is shifted": ("adam_dense_kernel", lambda: half(8195), r"(st\.global.* \[%\w+)", r"\1+2", None),
    "a store is dropped": ("adam_dense_kernel", lambda: adam(8195), r"st\.global.*;", "", None),
    "the tail counts as whole": ("adam_dense_kernel", lambda: adam(8195), r"min\.s64 (\S+) .*;", r"mov.b64 \1 8;", None),
    "float16 is truncated": ("adam_dense_kernel", lambda: half(8192), r"cvt\.rn\.f16\.f32", "cvt.rz.f16.f32", None),
    "the square root is left out": ("adam_dense_kernel", lambda: adam(8192), r"sqrt\.rn\.f32", "mov.f32", None),
    "a quotient becomes a product": ("adam_dense_kernel", lambda: adam(8192), r"div\.rn\.f32", "mul.f32", None),
    "a coefficient goes to the next": ("adam_advance_kernel", lambda: adam(5), r"(st\.global\S*v2.* \[%\w+)", r"\1+8", None),
    "a step count goes to the next": ("adam_advance_kernel", lambda: adam(5), r"(st\.global\S*f32 \[%\w+)", r"\1+4", None),
    "threads without a count go on": ("adam_advance_kernel", lambda: adam(5), r"setp\.ge\.s32 (\S+) (\S+), .*;", r"setp.ne.s32 \1 \2, \2;", (0,)),
    "a number of the device is another": ("adam_dense_kernel", lambda: on_device(100), r"(ld\.global\.f32 .* \[%\w+)", r"\1+4", (0, 1, 2)),
}  # fmt: skip


def instructions_that_run(kernel, call, pattern):
    """Numbers of the PTX lines that `call` runs and that match; the PTX."""
    texts = []
    with record() as launches, rewrite_ptx(lambda text: texts.append(text) or text):
        call()
    (index,) = [i for i, launch in enumerate(launches) if launch.name.startswith(kernel)]
    lines = texts[index].splitlines()
    return [at["line"] for at in launches[index].counts["lines"] if re.search(pattern, lines[at["line"] - 1])]


def changed(text, number, pattern, replacement, kernel):
    lines = text.splitlines()
    lines[number - 1] = re.sub(pattern, replacement, lines[number - 1])
    return "\n".join(lines)


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_found_out(name):
    kernel, call, pattern, replacement, which = BREAKS[name]
    right = call()
    numbers = instructions_that_run(kernel, call, pattern)
    assert numbers
    for number in numbers if which is None else [numbers[i] for i in which]:
        found = []
        with rewrite_ptx(lambda text, number=number: changed(text, number, pattern, replacement, kernel)):
            with contextlib.suppress(SimulatorError):
                found = call()
        assert not found or not all(map(torch.equal, found, right)), f"line {number}"
