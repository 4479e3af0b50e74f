"""Peak memory of one call: what torch's allocator says on a GPU, resident memory on Linux."""

import ctypes
import gc
from pathlib import Path

import torch

_SELF = Path("/proc/self")


def peak_bytes(step, device):
    """Bytes that one call takes beyond what lies there before it; None where the system does not tell."""
    gc.collect()
    return _allocated_peak(step) if device == "cuda" else _resident_peak(step)


def _allocated_peak(step):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident_peak(step):
    """From the high-water mark of resident memory, which writing 5 to clear_refs sets back to what is there now.

    What the C library keeps of freed memory is given back first, so that its reuse counts, too.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_SELF / "clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status(name):
    lines = (_SELF / "status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[name].split()[0])
