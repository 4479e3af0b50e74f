"""What every kernel needs: narrowing to 16 bits, and products of tiles."""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 x in DTYPE, to nearest even. For bfloat16 spelt out where Triton's interpreter would truncate."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300 (a dtype, not a constant)
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7F800000) != 0x7F800000, nearest, x)
    return x.to(DTYPE)


@triton.jit
def store(pointers, x, mask):
    """float32 x where the pointers point, in their dtype."""
    tl.store(pointers, narrow(x, pointers.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, summed in float32. PRECISION: of float32 factors, as tl.dot has it.

    The interpreter sums in float64: it multiplies no bfloat16, and its order of summation is no GPU's. How accurate a
    product is, compiled kernels show.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), total.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
