"""The Adam CUDA kernels: what they move, exactly, and that copies of them broken on purpose are found out."""

import functools
import re

import pytest
import torch

from fastlayers import ops
from tests.backends import BACKENDS
from tests.simulator import SimulatorError, host_memory, install, record, rewrite_ptx, uninstall

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the kernels")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HYPER = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.1)
CHUNK = 8192  # elements per block


@pytest.fixture(params=["sm_75", "sm_80", "sm_90"], autouse=True)
def arch(request):
    install(request.param)
    yield request.param
    uninstall()


def randn(n, dtype=F32, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adam(n, param=F32, grad=F32, moment=F32, amsgrad=False, masters=False, steps=(), **options):
    """One step on one parameter of n elements; returns what it changed."""
    lists = [[randn(n, param)], [randn(n, grad, 1)], [randn(n, moment, 2)], [randn(n, moment, 3).abs()]]
    lists.append([randn(n, moment, 4).abs()] if amsgrad else [])
    master = [randn(n)] if masters else []
    steps = steps or [torch.zeros(())]
    ops.adam_step(*lists, steps, master_params=master, backend="cuda", **{**HYPER, **options})
    return [tensors[0].clone() for tensors in (*lists, master, steps) if tensors]


def counts_of(kernel, call):
    """The counts of the one launch of `kernel` that call() makes."""
    with record() as launches:
        call()
    (launch,) = [launch for launch in launches if launch.name.startswith(kernel)]
    return launch.counts


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
def test_a_step_moves_each_byte_once_in_whole_sectors(case):
    fours, twos, options = CASES[case]
    n, steps = 2 * CHUNK, [torch.zeros(())]
    with host_memory(*steps):
        counts = counts_of("adam_dense_kernel", lambda: adam(n, steps=steps, **options))
    lines = memory_lines(counts, "global")
    scalars = [line for line in lines if line["global"]["sectors"] == line["global"]["accesses"]]
    assert len(scalars) == ("grad_scale" in options)  # one number for all
    vectors = [line["global"] for line in lines if line not in scalars]
    assert sum(line["bytes"] for line in vectors) == n * (4 * fours + 2 * twos)
    assert sum(line["sectors"] for line in vectors) == n * (4 * fours + 2 * twos) // 32
    # A thread's 8 elements are one access of 16-bit numbers, or two where others are float32.
    assert {line["bytes"] / line["accesses"] for line in vectors} == (
        {32 * 16, 32 * 8} if fours and twos else {32 * 16}
    )
    assert not memory_lines(counts, "local") and not memory_lines(counts, "shared")


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_the_norm_reads_each_element_once(dtype):
    n = 2 * 65536
    with record() as launches:
        ops.grad_norm([randn(n, dtype)], backend="cuda")
    partial, total = launches
    names_and_grids = [(launch.name, launch.grid) for launch in launches]
    assert names_and_grids == [("norm_dense_kernel", (2, 1, 1)), ("norm_total_kernel", (1, 1, 1))]
    counts = partial.counts
    assert counts["global"]["bytes"] == n * dtype.itemsize + 2 * 8
    assert counts["global"]["sectors"] == n * dtype.itemsize // 32 + 2
    reads = [line["global"] for line in memory_lines(counts, "global") if line["instruction"].startswith("ld")]
    assert {line["bytes"] / line["accesses"] for line in reads} == {32 * 16}
    assert not memory_lines(counts, "local")
    assert counts["shared"]["wavefronts"] == counts["shared"]["minimum"]
    assert total.counts["global"]["bytes"] == 2 * 8 + 4


def test_many_parameters_take_one_launch():
    params, grads, exp_avgs, exp_avg_sqs = ([randn(n).abs() for n in range(1, 101)] for _ in range(4))
    steps = [torch.zeros(()) for _ in params]
    with record() as launches:
        ops.adam_step(params, grads, exp_avgs, exp_avg_sqs, [], steps, **HYPER, backend="cuda")
    names_and_grids = [(launch.name, launch.grid) for launch in launches]
    assert names_and_grids == [("adam_advance_kernel", (1, 1, 1)), ("adam_dense_kernel<false>", (100, 1, 1))]


def memory_lines(counts, space):
    return [line for line in counts["lines"] if re.match(rf"(ld|st)\.{space}\b", line["instruction"])]


def norm(n, dtype=F32):
    return [ops.grad_norm([randn(n, dtype)], backend="cuda")]


def half(n):
    return adam(n, param=F16, grad=F16, moment=F16)


def on_device(n):
    return adam(n, lr=torch.tensor(0.01), found_inf=torch.tensor(0.0), grad_norm=torch.tensor(3.0), max_grad_norm=1.0)


def shift(instruction, by):
    """Another address: what to find, and what becomes of it."""
    return rf"({instruction}.*\[%\w+)(\+\d+)?\]", lambda found: f"{found[1]}+{int(found[2] or 0) + by}]"


STORE, LOAD = r"st\.global", r"ld\.global"
BREAKS = {  # kernel, call, elements, what to find, what becomes of it, and which of those that run (None: each in turn)
    "no barrier": ("norm_dense", norm, 3000, r"bar\.sync 0;", "", (0, 1, 2)),
    "no barrier in the total": ("norm_total", norm, 300000, r"bar\.sync 0;", "", (0, 1, 2)),
    "a step of the sum is left out": ("norm_dense", norm, 3000, r"st\.shared\S* .*", "", None),
    "the sum reads its neighbour": ("norm_dense", norm, 3000, *shift(r"ld\.shared", 8), None),
    "the norm goes to the next element": ("norm_total", norm, 3000, *shift(STORE, 4), None),
    "the norm's tail counts as whole": ("norm_dense", norm, 3001, r"min\.s64", "max.s64", None),
    "a store goes to the next vector": ("adam_dense", adam, 8200, *shift(rf"{STORE}\S*v4", 16), None),
    "a store goes to the next element": ("adam_dense", adam, 8195, *shift(STORE, 4), None),
    "a load comes from the next element": ("adam_dense", adam, 8195, *shift(LOAD, 4), None),
    "a store of float16 is shifted": ("adam_dense", half, 8195, *shift(STORE, 2), None),
    "a store is left out": ("adam_dense", adam, 8195, rf"{STORE}.*;", "", None),
    "the tail counts as whole": ("adam_dense", adam, 8195, r"min\.s64", "max.s64", None),
    "float16 is truncated": ("adam_dense", half, 8192, r"cvt\.rn\.(f16\S*)\.f32", r"cvt.rz.\1.f32", None),
    "no square root": ("adam_dense", adam, 8192, r"sqrt\.rn\.f32", "mov.f32", None),
    "a quotient becomes a product": ("adam_dense", adam, 8192, r"div\.rn\.f32", "mul.f32", None),
    "coefficients go to the next": ("adam_advance", adam, 5, *shift(rf"{STORE}\S*v2", 8), None),
    "a step count goes to the next": ("adam_advance", adam, 5, *shift(rf"{STORE}\S*f32 ", 4), None),
    "threads without a count go on": (
        "adam_advance",
        adam,
        5,
        r"setp\.ge\.s32 (\S+,) .*;",
        r"setp.ne.s32 \1 0, 0;",
        (0,),
    ),
    "a number beside the device's": ("adam_dense", on_device, 100, *shift(rf"{LOAD}\.f32", 4), (0, 1, 2)),
}


def instructions_that_run(kernel, call, pattern):
    """Numbers of the PTX lines that `call` runs and that match."""
    texts = []
    with record() as launches, rewrite_ptx(lambda text: texts.append(text) or text):
        call()
    (index,) = [i for i, launch in enumerate(launches) if launch.name.startswith(kernel)]
    lines = texts[index].splitlines()
    return [at["line"] for at in launches[index].counts["lines"] if re.search(pattern, lines[at["line"] - 1])]


def changed(text, number, pattern, replacement):
    lines = text.splitlines()
    lines[number - 1] = re.sub(pattern, replacement, lines[number - 1])
    return "\n".join(lines)


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_found_out(name):
    kernel, function, elements, pattern, replacement, which = BREAKS[name]
    call = functools.partial(function, elements)
    right = call()
    numbers = instructions_that_run(kernel, call, pattern)
    assert numbers
    for number in numbers if which is None else [numbers[i] for i in which]:
        with rewrite_ptx(lambda text, number=number: changed(text, number, pattern, replacement)):
            try:
                found = call()
            except SimulatorError as error:
                assert error.kind in ("out_of_bounds", "misaligned", "uninitialised", "race"), error
                continue
        assert not all(map(torch.equal, found, right)), f"line {number}"
