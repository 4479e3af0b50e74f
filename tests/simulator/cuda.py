"""CUDA C++ text to a Module, for tests of small kernels."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.simulator.build import ROOT
from tests.simulator.module import Module


@functools.cache
def compile_cuda(source, arch="80"):
    """The module that nvcc makes of `source`, text or a Path, for compute_<arch>; skips the test without nvcc."""
    nvcc = os.environ.get("NVCC", "").split() or [shutil.which("nvcc")]
    if nvcc[-1] is None:
        pytest.skip("needs nvcc to compile a kernel")
    with tempfile.TemporaryDirectory() as folder:
        file = source
        if isinstance(source, str):
            file = Path(folder) / "kernel.cu"
            file.write_text(source)
        options = ["-std=c++20", "-O3", "-lineinfo", f"-I{ROOT}/csrc", "-ptx", f"-arch=compute_{arch}"]
        command = [*nvcc, *options, str(file), "-o", "-"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr[-2000:]}")
    return Module(done.stdout)
