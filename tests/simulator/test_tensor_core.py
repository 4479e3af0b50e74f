"""The primitives of csrc/common/tensor_core.cuh and shared_tile.cuh: every load, conversion and product, per dtype."""

from pathlib import Path

import pytest
import torch

from tests.numerics import assert_accurate
from tests.simulator.cuda import compile_cuda

SOURCE = Path(__file__).parent / "kernels/tensor_core.cu"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
PRODUCTS = {  # what they compute, and the size of the result
    "by rows": (lambda x, y: x @ y.T, (32, 32)),
    "across rows": (lambda x, y: x.T @ y, (64, 64)),
    "across rows, paired": (lambda x, y: x.T @ y, (64, 64)),
    "by rows and across": (lambda x, y: x[:, :32] @ y, (32, 64)),
    "chained": (lambda x, y: (x @ y.T) @ y, (32, 64)),
}


def matrices(name, rows, columns, stride):
    full = torch.randn(2, rows, stride, generator=torch.Generator().manual_seed(0)).to(DTYPES[name])
    if name == "tf32":  # what is left after the rounding of the tensor cores
        full = ((full.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    padded = torch.zeros(2, 32, 64, dtype=full.dtype)
    padded[:, :rows, :columns] = full[..., :columns]
    return full, padded


@pytest.mark.parametrize("rows, columns, stride", [(32, 64, 64), (27, 50, 57)])
@pytest.mark.parametrize("what", PRODUCTS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("arch", ["75", "80"])
def test_products(arch, name, what, rows, columns, stride):
    if (arch, name) == ("75", "bfloat16") or (name, what) == ("tf32", "chained"):
        pytest.skip("bfloat16 has no products there" if name == "bfloat16" else "rounds in between")
    (x, y), padded = matrices(name, rows, columns, stride)
    product, size = PRODUCTS[what]
    out = torch.full(size, torch.nan, dtype=x.dtype)
    number = list(PRODUCTS).index(what)
    counts = compile_cuda(SOURCE, arch).launch(
        f"products_{name}", 1, 64, [x.clone(), y.clone(), out, rows, columns, stride, number]
    )
    assert_accurate(out, product(*padded.double()), product(*padded), what)
    assert counts["shared"]["wavefronts"] == counts["shared"]["minimum"]


def test_three_products_or_one():
    """float32 takes three products where allow_tf32 takes one, and what one rounds away."""
    (x, y), padded = matrices("float32", 32, 64, 64)
    flops = {}
    for name in ("float32", "tf32"):
        out = torch.zeros(32, 32)
        counts = compile_cuda(SOURCE).launch(f"products_{name}", 1, 64, [x.clone(), y.clone(), out, 32, 64, 64, 0])
        flops[name] = counts["mma_flops"]
        error = (out - padded[0].double() @ padded[1].double().T).abs().max()
        assert (error > 1e-4) == (name == "tf32")
    assert flops["float32"] == 3 * flops["tf32"]


@pytest.mark.parametrize("name", ["float32", "tf32"])
def test_nan_stays(name):
    x, y = torch.randn(2, 32, 64)
    x.view(torch.int32)[3, 5] = 0x7FFFFFFF  # the NaN that GPUs make
    out = torch.zeros(32, 32)
    compile_cuda(SOURCE).launch(f"products_{name}", 1, 64, [x, y.contiguous(), out, 32, 64, 64, 0])
    assert out[3].isnan().all() and out.isnan().sum() == 32
