"""How operators in Triton are registered, and what every launcher asks."""

import torch
from torch import Tensor
from triton import knobs

from fastlayers.triton import tiles

if knobs.runtime.interpret:  # whose kernels torch cannot look into
    operator = torch.library.custom_op

    def wrap_triton(kernel):
        return kernel

else:
    from torch.library import triton_op as operator
    from torch.library import wrap_triton

__all__ = ["is_real", "operator", "precision", "wrap_triton"]


def precision(dtype, allow_tf32=False):
    """How float32 is multiplied: as accurately as float32 arithmetic, by tensor cores where they have TF32."""
    if dtype != torch.float32 or knobs.runtime.interpret or tiles.current_gpu().arch < 80:
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def is_real(tensor):
    """Whether there is memory behind it, and not a compiler that traces or a CUDA graph that is captured."""
    known = type(tensor) in (Tensor, torch.nn.Parameter)
    return known and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
