"""The backends each op is tested on, and where their tensors are. A new backend joins every test of an op by being
listed here.

Without a GPU, cuda is tested on the simulator where nvcc is found. FASTLAYERS_SIMULATOR=1 asks for the simulator on a
machine with a GPU, =0 leaves it out; sm_75, sm_80 (otherwise taken) or sm_90 says which GPU is simulated.
"""

import contextlib
import os
import shutil

import torch

BACKENDS = {
    "attention": ["cpu"],
    "varlen_attention": ["cpu"],
    "decode_attention": ["cpu"],
    "linear_act": ["cpu"],
    "gated_linear_act": ["cpu"],
    "adam": ["cpu", "cuda"],
}

_SIMULATOR = os.environ.get("FASTLAYERS_SIMULATOR", "")
_HAS_GPU = torch.cuda.is_available() and torch.version.cuda is not None
SIMULATED = _SIMULATOR != "0" and (bool(_SIMULATOR) or not _HAS_GPU)
_ARCH = _SIMULATOR if _SIMULATOR.startswith("sm_") else "sm_80"

if not _HAS_GPU and not (SIMULATED and (os.environ.get("NVCC") or shutil.which("nvcc"))):
    BACKENDS = {op: [backend for backend in backends if backend != "cuda"] for op, backends in BACKENDS.items()}
if os.environ.get("TRITON_INTERPRET") == "1":  # set before triton is imported, by tests/test_adam_triton.py
    BACKENDS["adam"] = ["triton"]


@contextlib.contextmanager
def device_of(backend):
    """Within, tensors are made where the backend takes them, and the simulator is there if it is the backend."""
    if backend != "cuda":
        yield
    elif SIMULATED:
        from tests import simulator

        simulator.install(_ARCH)
        try:
            yield
        finally:
            simulator.uninstall()
    else:
        with torch.device("cuda"):
            yield


def on_host(backend, *tensors):
    """Within, these tensors, made with device="cpu", count as being on the CPU."""
    if backend != "cuda" or not SIMULATED:
        return contextlib.nullcontext()
    from tests import simulator

    return simulator.host_memory(*tensors)
