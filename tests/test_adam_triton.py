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
    assert launch.counts["shared"]["accesses"] == launch.counts["barriers"] == 0


COMPILE = """
import torch, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastlayers.triton.adam import _BLOCK, _adam_kernel
signature = dict(table="*i64", blocks="*i64", rates="*fp32", scalars="*fp32", seed="i64", offset="i64")
for capability in (75, 80, 90):
    for dtype in (tl.float32, tl.float16 if capability == 75 else tl.bfloat16):
        kinds = dict(PARAM=dtype, GRAD=dtype, MOMENT=tl.float32, MOMENT_SQ=tl.float32)
        flags = dict(AMSGRAD=True, MASTER=False, STORE_GRAD=True, STOCHASTIC=dtype != tl.float32, BLOCK=_BLOCK)
        constants = {**kinds, **flags}
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
