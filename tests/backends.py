"""The backends each op is tested on, and where their tensors are. A new backend joins every test of an op by being
listed here.

Without a GPU, cuda and triton are tested on the simulator where nvcc is found. FASTLAYERS_SIMULATOR=1 asks for the
simulator on a machine with a GPU, =0 leaves it out; sm_75, sm_80 (the default) or sm_90 says which GPU it is.
"""

import contextlib
import importlib.util
import os
import shutil

import torch
from torch.overrides import TorchFunctionMode

BACKENDS = {
    "attention": ["cpu", "cuda", "triton"],
    "varlen_attention": ["cpu", "cuda", "triton"],
    "decode_attention": ["cpu", "cuda", "triton"],
    "linear_act": ["cpu", "cuda", "triton"],
    "gated_linear_act": ["cpu", "cuda", "triton"],
    "adam": ["cpu", "cuda", "triton"],
}

_SIMULATOR = os.environ.get("FASTLAYERS_SIMULATOR", "")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch's product refuses its deterministic mode
_HAS_GPU = torch.cuda.is_available() and torch.version.cuda is not None
SIMULATED = _SIMULATOR != "0" and (bool(_SIMULATOR) or not _HAS_GPU)
ARCH = _SIMULATOR if _SIMULATOR.startswith("sm_") else "sm_80"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set before triton is imported, by tests/test_*_triton.py
_AVAILABLE = {"cpu"}
_HAS_NVCC = os.environ.get("FASTLAYERS_BUILD_CUDA") != "0" and (os.environ.get("NVCC") or shutil.which("nvcc"))
if _HAS_GPU or (SIMULATED and _HAS_NVCC):
    _AVAILABLE |= {"cuda", "triton"} if importlib.util.find_spec("triton") else {"cuda"}
if INTERPRETED:
    _AVAILABLE = {"triton"}
BACKENDS = {op: [name for name in names if name in _AVAILABLE] for op, names in BACKENDS.items()}
if SIMULATED and not INTERPRETED:  # each case takes the compiler seconds: tests/test_*_triton.py have some
    BACKENDS = {op: [n for n in names if n != "triton" or op == "adam"] for op, names in BACKENDS.items()}

_OLD_TENSOR_CORES = ARCH == "sm_75" if SIMULATED else _HAS_GPU and torch.cuda.get_device_capability() < (8, 0)


def dtypes_of(backend):
    """Of attention and linear layers, a 16-bit dtype last: the CUDA kernels need a GPU with products of bfloat16."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    return dtypes[:2] if backend == "cuda" and _OLD_TENSOR_CORES else dtypes


def has_wide_float32_gradients(backend):
    """Attention's, of more than 128 head dimensions: they need more shared memory than sm_75 has."""
    return backend != "cuda" or not _OLD_TENSOR_CORES


@contextlib.contextmanager
def device_of(backend):
    """Within, tensors are made where the backend takes them, and the simulator is there if it is the backend."""
    if backend not in ("cuda", "cublas", "triton") or INTERPRETED:
        yield
    elif SIMULATED:
        from tests import simulator

        simulator.install(ARCH)
        try:
            yield
        finally:
            simulator.uninstall()
    else:
        with torch.device("cuda"), _DrawnOnHost():
            yield


class _DrawnOnHost(TorchFunctionMode):
    """What a CPU generator draws is moved to the default device, so that every backend sees the same numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is None or "device" in kwargs:
            return function(*args, **kwargs)
        return function(*args, **kwargs, device="cpu").to(torch.get_default_device())


def placed(thing):
    """What was made at import, with the tensors in it on the device where tensors are made now."""
    if isinstance(thing, dict):
        return {name: placed(one) for name, one in thing.items()}
    if isinstance(thing, list):
        return [placed(one) for one in thing]
    return thing.to(torch.get_default_device()) if isinstance(thing, torch.Tensor) and not thing.is_meta else thing


def on_host(backend, *tensors):
    """Within, these tensors, made with device="cpu", count as being on the CPU."""
    if backend not in ("cuda", "triton") or INTERPRETED or not SIMULATED:
        return contextlib.nullcontext()
    from tests import simulator

    return simulator.host_memory(*tensors)
