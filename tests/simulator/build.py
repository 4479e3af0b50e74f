"""Compiles the simulator's core with ninja when it is first used; later uses find it as it is."""

import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

_SOURCES = Path(__file__).parent / "core"
ROOT = Path(__file__).parents[2]
_FLAGS = "-std=c++20 -O3 -march=native -ffp-contract=off -Wall -Wextra -fPIC -fvisibility=hidden -pthread"


def _ninja():
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def folder_of(*parts):
    """Where a build that depends on these lies."""
    return ROOT / "build/simulator" / hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


def run_ninja(folder, text, what):
    """Build what the ninja file `text` says, one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(text)
        done = subprocess.run([_ninja()], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} did not compile:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")


def _ninja_file(compiler, includes):
    objects = [(source, source.stem + ".o") for source in sorted(_SOURCES.glob("*.cpp"))]
    lines = [
        "rule cxx",
        f"  command = {compiler} -MMD -MF $out.d {_FLAGS} {includes} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared -pthread $in -o $out",
        *(f"build {name}: cxx {source}" for source, name in objects),
        f"build simulator_core.so: link {' '.join(name for _, name in objects)}",
    ]
    return "\n".join(lines) + "\n"


@functools.cache
def core():
    """The compiled module; building it takes a minute or two, once."""
    compiler = os.environ.get("CXX", "g++")
    includes = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in cpu.splitlines() if line.startswith("flags")), "")
    folder = folder_of(compiler, includes, flags, _FLAGS, sys.version)
    run_ninja(folder, _ninja_file(compiler, includes), "the simulator")
    spec = importlib.util.spec_from_file_location("simulator_core", folder / "simulator_core.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
