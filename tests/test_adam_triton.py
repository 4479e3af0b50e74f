"""The Triton kernel of Adam: the op's tests in Triton's interpreter, and compilation for GPUs that are not here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)


def test_op_tests_in_the_interpreter():
    """tests/test_adam.py with the triton backend; another process, because the interpreter is chosen at import."""
    options = ["-q", "-p", "no:cacheprovider", "-k", "triton and not dtype2 and not (layouts and dtype1)"]
    done = python("-m", "pytest", "tests/test_adam.py", *options, TRITON_INTERPRET="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


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
