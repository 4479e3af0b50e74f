"""How operators in Triton are registered, and what every launcher asks."""

import contextvars
import math

import torch
import triton
from torch import Tensor
from triton import knobs

from fastlayers.triton import tiles

# torch.compile looks into a triton_op, and has to find out which tensors its kernels write. It cannot in the
# interpreter; nor with a torch before 2.13, whose analysis fails where a size or a stride is a multiple of 16, so that
# all tensors count as written: https://github.com/pytorch/pytorch/issues/170049
if knobs.runtime.interpret or torch.__version__ < (2, 13):
    operator = torch.library.custom_op

    def wrap_triton(kernel):
        return kernel

else:
    from torch.library import triton_op as operator
    from torch.library import wrap_triton

__all__ = ["describable", "is_real", "operator", "precision", "with_scratch", "wrap_triton"]

_SHORT_SUM = 8  # terms; three TF32 products lose the last bits of each, which shows where so few are added


def precision(dtype, allow_tf32=False, terms=math.inf):
    """How float32 is multiplied: as accurately as float32 arithmetic, by tensor cores where they have TF32.

    terms: that each sum has
    """
    if dtype != torch.float32 or knobs.runtime.interpret or tiles.current_gpu().arch < 80:
        return "ieee"
    if allow_tf32:
        return "tf32"
    return "ieee" if terms <= _SHORT_SUM else "tf32x3"


def is_real(tensor):
    """Whether there is memory behind it, and not a compiler that traces or a CUDA graph that is captured."""
    known = type(tensor) in (Tensor, torch.nn.Parameter)
    return known and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def describable(*tensors):
    """Whether tensor descriptors can read these: one dimension is dense, and every row begins at 16 bytes.

    False while torch.compile traces: it does not tell where memory will begin.
    """
    return all(map(_has_aligned_rows, tensors))


def _has_aligned_rows(tensor):
    steps = list(tensor.stride())
    if not is_real(tensor) or 1 not in steps or tensor.data_ptr() % 16:
        return False
    steps.remove(1)
    return all(step > 0 and step * tensor.itemsize % 16 == 0 for step in steps)


def with_scratch(launch, tile):
    """launch(tile), with the memory that Triton asks for where a kernel makes tensor descriptors."""
    if not tile.descriptors:
        return launch(tile)
    return contextvars.copy_context().run(_with_scratch, launch, tile)  # the user's own allocator stays


def _with_scratch(launch, tile):
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.uint8, device="cuda"))
    return launch(tile)
