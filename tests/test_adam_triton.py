"""The Triton kernel of Adam beside tests/test_adam.py: interpreted, and compiled for GPUs that are not here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.backends import BACKENDS, INTERPRETED, SIMULATED

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="for the compiler"),
]


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)


def test_op_tests_in_the_interpreter():
    """tests/test_adam.py with the triton backend; another process, because the interpreter is chosen at import."""
    options = ["-q", "-p", "no:cacheprovider", "-k", "triton and not dtype2 and not (layouts and dtype1)"]
    done = python("-m", "pytest", "tests/test_adam.py", *options, TRITON_INTERPRET="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


simulated = pytest.mark.skipif("triton" not in BACKENDS["adam"] or not SIMULATED, reason="needs the simulator")


@simulated
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("dtype,bytes_per_element", [(torch.float32, 28), (torch.float16, 14)])
def test_a_step_moves_each_byte_once(arch, dtype, bytes_per_element):
    from fastlayers import ops
    from tests import simulator

    n, numbers = 3 * 2048, dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.1)
    param, grad, exp_avg, exp_avg_sq = (torch.rand(n).to(dtype) for _ in range(4))
    simulator.install(arch)
    try:
        with simulator.record() as launches:
            ops.adam_step([param], [grad], [exp_avg], [exp_avg_sq], [], [torch.zeros(())], **numbers, backend="triton")
    finally:
        simulator.uninstall()
    (launch,) = launches
    costs = [line["global"] for line in launch.counts["lines"] if "global" in line]
    elements = [cost for cost in costs if cost["sectors"] != cost["accesses"]]  # others: the same number for all
    assert sum(cost["bytes"] for cost in elements) == n * bytes_per_element
    assert all(cost["sectors"] == cost["minimum"] for cost in elements)
    assert all(cost["bytes"] == 32 * 16 * cost["accesses"] for cost in elements)  # 16 bytes by each thread
    assert launch.counts["shared"]["accesses"] == launch.counts["barriers"] == 0


def states(numels, dtypes, offset):
    """Lists of tensors for a step, a list per dtype; each tensor begins `offset` elements behind aligned memory."""
    generator, device = torch.Generator("cpu").manual_seed(0), torch.get_default_device()
    make = lambda n: torch.rand(n, generator=generator, device="cpu").to(device)  # noqa: E731
    place = lambda x, dtype: torch.cat([x.new_zeros(offset), x]).to(dtype)[offset:]  # noqa: E731
    return [[place(make(n), dtype) for n in numels] for dtype in dtypes]


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.skipif("triton" not in BACKENDS["adam"], reason="needs the simulator or a GPU")
@pytest.mark.parametrize("amsgrad,master,scale,rng", [(False, False, None, None), (True, True, 2.0, (3, 5))])
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("param,grad,moment", [(F32, F32, F32), (BF16, BF16, BF16), (F16, F32, F32), (F32, BF16, F16)])
def test_wide_accesses_give_the_same_numbers(backend, param, grad, moment, amsgrad, master, scale, rng):
    """Aligned tensors take 16 bytes at once, others one element; some of more than one program, in one call."""
    from fastlayers import ops

    def step(offset):
        numels = (3 * 2048 + 16, 16, 33, 4096)
        lists = states(numels, (param, grad, moment, moment, moment, F32), offset)
        maxima, masters = lists[4] if amsgrad else [], lists[5] if master and param != F32 else []
        steps = [torch.full((), float(i)) for i in range(len(numels))]
        options = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.1, decoupled_weight_decay=True)
        options |= dict(grad_scale=None if scale is None else torch.tensor(scale))
        options |= dict(rng=None if rng is None else torch.tensor(rng, device="cpu"))
        ops.adam_step(*lists[:4], maxima, steps, master_params=masters, **options, backend=backend)
        return [tensor for tensors in lists for tensor in tensors]

    assert all(map(torch.equal, step(offset=0), step(offset=1)))


def test_the_host_works_per_tensor_not_per_element(monkeypatch):
    """What is sent, and what torch is called for, is the same for long tensors; few calls for each tensor."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastlayers.triton import adam

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count = getattr(self, "count", 0) + 1
            return function(*args, **(kwargs or {}))

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda table, plan, *_, **__: tables.append((table, plan))

    monkeypatch.setattr(adam, "_adam_kernel", Kernel())
    numbers = (1e-3, 0.9, 0.99, 0.01, 1e-8, float("inf"), True, False)

    def step(count, numel):
        memory = torch.zeros(numel)
        lists, steps = [[memory] * count for _ in range(4)], [torch.zeros(()) for _ in range(count)]
        with Calls() as calls:
            adam.adam_step(*lists, [], [], steps, *[None] * 5, *numbers)
        return calls.count

    grids, tables = [], []
    few, long, many = step(2, 1024), step(2, 1024 * 1000), step(102, 1024)
    assert few == long and many - few <= 2 * 100
    assert grids == [(2,), (2000,), (102,)]  # 1,024 elements of float32 each
    assert [table.shape for table, _ in tables] == [(2, 10), (2, 10), (102, 10)]
    assert tables[1][1].tolist() == [0] * 1000 + [1] * 1000 and tables[1][0][:, 8].tolist() == [0, 1000]


COMPILE = """
import torch, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastlayers.triton.adam import _adam_kernel
signature = dict(table="*i64", plan="*i64", rates="*fp32", scalars="*fp32", seed="i64", offset="i64")
for capability in (75, 80, 90):
    for dtype, aligned in ((tl.float32, True), (tl.float16 if capability == 75 else tl.bfloat16, False)):
        kinds = dict(PARAM=dtype, GRAD=dtype, MOMENT=tl.float32, MOMENT_SQ=tl.float32)
        flags = dict(AMSGRAD=True, MASTER=False, STORE_GRAD=True, STOCHASTIC=dtype != tl.float32)
        constants = {**kinds, **flags, "ALIGNED": aligned, "BLOCK": 1024}
        source = ASTSource(_adam_kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
        done = compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=8))
        assert done.asm["cubin"] and f"sm_{capability}" in done.asm["ptx"]
        assert ".local" not in done.asm["ptx"]
"""


def test_compiles_for_gpus():
    done = python("-c", COMPILE)
    assert done.returncode == 0, done.stderr[-3000:]


def test_import_does_not_import_triton():
    code = "import sys, torch; before = 'triton' in sys.modules; import fastlayers; "
    assert python("-c", code + "sys.exit(('triton' in sys.modules) != before)").returncode == 0
