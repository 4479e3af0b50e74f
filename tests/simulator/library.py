"""The shipped CUDA launchers and bindings, compiled with the simulator's runtime in libcudart's place.

The operators are registered as torch.ops.fastlayers_simulated for CPU tensors; tests/simulator/device.py puts
torch.ops.fastlayers_simulator before them.
"""

import ctypes
import functools
import sys
from pathlib import Path

import torch

from tests.simulator.build import ROOT, folder_of, run_ninja

sys.path.insert(0, str(ROOT / "build_tools"))
import native

sys.path.pop(0)

NAMESPACE = "fastlayers_simulated"
_RUNTIME = Path(__file__).parent / "runtime"
_ARCHS = ("75", "80", "90a")
_COMMON = f"-std=c++20 -O2 -I{ROOT}/csrc -I{_RUNTIME}"
_HOST = "-fPIC -fvisibility=hidden -Wall -Wextra"


def _sources():
    """The CUDA side of csrc: kernels, bindings, and what they share; not the CPU operators."""
    for source in sorted((ROOT / "csrc").rglob("*.c*")):
        replaced = source.name == "cuda_device.cpp"
        for_cpu = source.name.startswith("cpu_") or "TORCH_LIBRARY_IMPL(fastlayers," in source.read_text()
        if source.suffix in (".cpp", ".cu") and not for_cpu and not replaced:
            yield source
    yield from sorted(_RUNTIME.glob("*.cpp"))


def _ninja_file(sources, nvcc, host_compiler, torch_root):
    gencode = " ".join(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in _ARCHS)
    torch_flags = (
        f"-DTORCH_TARGET_VERSION=0x{native.TORCH_FLOOR[0]:02x}{native.TORCH_FLOOR[1]:02x}000000000000"
        f" -isystem {torch_root}/include -DFL_NAMESPACE={NAMESPACE} -DFL_CUDA_KEY=CPU"
    )
    lines = [
        "rule nvcc",
        f"  command = {nvcc} -MD -MF $out.d -ccbin {host_compiler} {_COMMON}"
        f" -Xcompiler {_HOST.replace(' ', ',')} $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {host_compiler} -shared -o $out $in -L{torch_root}/lib -ltorch_cpu -lc10"
        " -Wl,--no-undefined -Wl,-Bsymbolic",
    ]
    objects = []
    for source in sources:
        name = "_".join(source.relative_to(ROOT).with_suffix(".o").parts)
        kernels = f"-O3 -lineinfo --no-compress {gencode}"
        lines += [
            f"build {name}: nvcc {source}",
            f"  extra = {kernels if source.suffix == '.cu' else torch_flags}",
        ]
        objects.append(name)
    lines.append(f"build libsimulated.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _compilers():
    """nvcc, its version, and the host's compiler."""
    try:
        found, compiler = native.check_nvcc(), native.host_compiler(native.compiler()[0])
    except native.BuildError as error:
        raise RuntimeError(str(error)) from None
    if found is None:
        raise RuntimeError("the simulator of the CUDA kernels needs nvcc; install the CUDA toolkit or set NVCC")
    return " ".join(found[0]), found[1], compiler


def build(name, sources):
    """The path of a library of these sources, compiled; building takes minutes, once."""
    nvcc, version, compiler = _compilers()
    torch_root = Path(torch.__file__).parent
    folder = folder_of(name, nvcc, version, compiler, torch_root, torch.__version__)
    run_ninja(folder, _ninja_file(sources, nvcc, compiler, torch_root), f"the simulated {name}")
    return folder / "libsimulated.so"


def build_small(source):
    """The path of a library of one .cu file and the runtime, without Torch: tests of the runtime."""
    return build(source.stem, [source, *(file for file in _RUNTIME.glob("*.cpp") if file.name != "cuda_device.cpp")])


@functools.cache
def library():
    """The loaded library as ctypes sees it. Raises RuntimeError where it cannot be compiled."""
    path = build("library", list(_sources()))
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))
