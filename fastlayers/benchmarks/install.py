"""What fastlayers costs before its first call: compiling it, and importing it."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fastlayers
from fastlayers.benchmarks.runner import OURS, Candidate, Case

SUITE = "install"
SOURCE = Path(fastlayers.__file__).parent.parent
LAUNCHERS = ("ccache", "sccache", "distcc")
_IMPORT = "import time, torch; start = time.perf_counter(); import fastlayers; print(time.perf_counter() - start)"


def _import_seconds(step):
    done = subprocess.run([sys.executable, "-c", _IMPORT], cwd=SOURCE, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _build_seconds(step):
    """Seconds to compile and link everything from nothing, in a copy of the source tree, without a compiler cache."""
    if not (SOURCE / "build_tools").is_dir():
        raise RuntimeError("fastlayers runs from an installed wheel; run this from a source tree")
    environment = dict(os.environ)
    for name in ("CXX", "NVCC"):
        words = [word for word in shlex.split(environment.pop(name, "")) if word not in LAUNCHERS]
        if words:
            environment[name] = shlex.join(words)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("csrc", "build_tools", "fastlayers"):
            shutil.copytree(SOURCE / name, Path(folder, name), ignore=shutil.ignore_patterns("lib", "__pycache__"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(SOURCE / name, folder)
        start = time.perf_counter()
        command = [sys.executable, "setup.py", "-q", "build_native"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        return time.perf_counter() - start


def _alone(clock):
    return lambda: {OURS: Candidate(step=None, clock=clock)}


def cases(setting):
    """The same on every device, and no picture."""
    yield Case(SUITE, "import fastlayers beyond import torch", _alone(_import_seconds), limit=0.1)
    yield Case(SUITE, "clean build, CUDA sources included", _alone(_build_seconds), limit=300, slow=True)
