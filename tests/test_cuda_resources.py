"""What the compiler made of every CUDA kernel in the built library: nothing spilled, nothing in local memory, but for
what SPILLED names."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastlayers

LIBRARY = Path(fastlayers.__file__).parent / "lib/libfastlayers.so"


# Bytes of stack. 128 sums of a lane, and products that are added to them outside of the tensor cores, are more than
# there are registers for: some thirty addresses are spilled, once per tile of keys.
SPILLED = {"attention_decode_kernelINS_11DecodeShapeIfLi256EEE": 128}


def cuobjdump():
    """CUDA's own, or the one that Triton's package carries."""
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")):
        found = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(found) if found and Path(found).exists() else None


def resources():
    """{(architecture, kernel): {"REG": registers, "STACK": bytes, "LOCAL": bytes, ...}}"""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump: CUDA's, or pip install triton")
    done = subprocess.run([tool, "-res-usage", str(LIBRARY)], capture_output=True, text=True)
    found, arch = {}, None
    for line in (done.stdout + done.stderr).splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[arch, kernel] = {name: int(value) for name, value in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", line)}
    if not found:
        pytest.skip("the built library has no CUDA kernels")
    return found


def test_nothing_is_spilled():
    found = resources()
    assert all({"REG", "STACK", "LOCAL"} <= usage.keys() for usage in found.values())
    frames = {where: usage["STACK"] + usage["LOCAL"] for where, usage in found.items()}
    assert {where: size for where, size in frames.items() if size > allowed(where[1])} == {}


def allowed(kernel):
    return max((size for name, size in SPILLED.items() if name in kernel), default=0)
