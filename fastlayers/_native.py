"""Loads the compiled library, once, and remembers why where it cannot."""

import json
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent / "lib"


def _load():
    library = _FOLDER / "libfastlayers.so"
    if not library.exists():
        return "the native library was not built; reinstall fastlayers with a C++ compiler (pip install .)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the native library does not load beside torch {torch.__version__}: {error}"
    return None


error = _load()
"""None where torch.ops.fastlayers is available, else one sentence that says why not."""

cpu_isa = "none" if error else torch.ops.fastlayers.cpu_isa()
"""The instruction set the CPU kernels run with: none, avx2, avx512, avx512_bf16 or amx."""


def build_info():
    """What the library was built with: compiler, CUDA architectures, torch headers. {} where there is none."""
    path = _FOLDER / "build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}
