"""The op tests once more, on GPUs older and newer than the sm_80 that they simulate by themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import BACKENDS, SIMULATED

FILES = {  # and which of their tests
    "test_adam.py": "cuda or triton",
    "test_attention.py": "cuda",
    "test_attention_cuda.py": "",
    "test_attention_decode.py": "cuda",
    "test_attention_packed.py": "cuda",
    "test_linear_act.py": "cuda",
}


@pytest.mark.skipif("cuda" not in BACKENDS["adam"] or not SIMULATED, reason="needs the simulator")
@pytest.mark.parametrize("file, which", FILES.items(), ids=FILES)
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_ops(arch, file, which):
    command = [sys.executable, "-m", "pytest", f"tests/{file}", "-q", "-p", "no:cacheprovider", "-k", which]
    environment = {**os.environ, "FASTLAYERS_SIMULATOR": arch}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
