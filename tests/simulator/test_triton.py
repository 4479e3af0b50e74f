"""Kernels that Triton compiles for sm_80 and sm_90, run as they are, against torch."""

import functools

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tests.simulator import Module  # noqa: E402
from tests.simulator import triton_kernels as kernels  # noqa: E402

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


def _type(value):
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@functools.cache
def compiled(fn, types, constants, arch, options):
    names = [name for name in fn.arg_names if name not in dict(constants)]
    signature = dict(zip(names, types)) | {name: "constexpr" for name, _ in constants}
    target = GPUTarget("cuda", arch, 32)
    attributes = {(i,): [["tt.divisibility", 16]] for i, type in enumerate(types) if type[0] == "*"}
    kernel = triton.compile(ASTSource(fn, signature, dict(constants), attributes), target, dict(options))
    return kernel, Module(kernel.asm["ptx"])


def launch(fn, grid, args, arch, scratch=0, *, num_warps=4, num_stages=3, **constants):
    options = (("num_warps", num_warps), ("num_stages", num_stages))
    kernel, module = compiled(fn, tuple(map(_type, args)), tuple(constants.items()), arch, options)
    memory = torch.zeros(max(scratch, 1), dtype=torch.uint8)  # what Triton calls global scratch
    meta = kernel.metadata
    return module.launch(meta.name, grid, 32 * meta.num_warps, [*args, memory, memory], shared=meta.shared)


ARCHS = pytest.mark.parametrize("arch", [80, 90])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_close(found, wanted, unit):
    """wanted in float64; `unit`: the rounding of the output, and of the sum before it."""
    error = (found.double() - wanted).abs()
    assert (error <= unit * (wanted.abs() + 1)).all(), error.max()


UNIT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@ARCHS
@DTYPES
@pytest.mark.parametrize("n", [1, 31, 1024, 2500])
def test_vector_add(arch, dtype, n):
    a, b, out = randn(n, dtype=dtype), randn(n + 1, dtype=dtype)[1:].clone(), torch.zeros(n, dtype=dtype)
    launch(kernels.vector_add, triton.cdiv(n, 1024), [a, b, out, n], arch, BLOCK=1024)
    assert torch.equal(out, a + b)


@ARCHS
@DTYPES
@pytest.mark.parametrize("columns, num_warps", [(1, 1), (37, 1), (1000, 4), (1024, 8)])
def test_softmax(arch, dtype, columns, num_warps):
    x, out = 3 * randn(5, columns, dtype=torch.float32).to(dtype), torch.zeros(5, columns, dtype=dtype)
    block = triton.next_power_of_2(columns)
    launch(kernels.softmax, 5, [x, out, columns], arch, num_warps=num_warps, BLOCK=block)
    assert_close(out, x.double().softmax(-1), UNIT[dtype])


@ARCHS
@DTYPES
@pytest.mark.parametrize("columns, block", [(64, 64), (300, 128), (1000, 256)])
def test_layer_norm(arch, dtype, columns, block):
    x, out = randn(3, columns).mul(2).add(1).to(dtype), torch.zeros(3, columns, dtype=dtype)
    weight, bias = randn(columns), randn(columns + 1)[1:].clone()
    launch(kernels.layer_norm, 3, [x, weight, bias, out, columns, 1e-5], arch, BLOCK=block)
    wanted = torch.nn.functional.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-5)
    assert_close(out, wanted, UNIT[dtype])


def integers(*shape, dtype):
    """Small numbers, so that every sum of products is exact."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


TILES = [
    ((16, 16, 16), 1, 1),
    ((32, 64, 32), 2, 2),
    ((64, 64, 32), 4, 3),
    ((128, 128, 64), 8, 3),
    ((128, 256, 32), 8, 3),
]


@ARCHS
@pytest.mark.parametrize("dtype", [*UNIT, torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("tile, num_warps, num_stages", TILES, ids=str)
def test_matmul(arch, dtype, tile, num_warps, num_stages):
    block_m, block_n, block_k = tile
    if dtype == torch.float8_e4m3fn and arch < 90:
        pytest.skip("Triton has no e4m3 below sm_89")
    if dtype.itemsize == 1 and block_k < 32:
        pytest.skip("Triton takes 8-bit tiles from 32 on")
    m, n, k = block_m + 8, block_n + 16, 3 * block_k + 16
    a, b = integers(m, k, dtype=dtype), integers(k, n, dtype=dtype)
    out = torch.zeros(m, n)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    counts = launch(
        kernels.matmul,
        grid,
        [a, b, out, m, n, k, k, n, n],
        arch,
        num_warps=num_warps,
        num_stages=num_stages,
        M=block_m,
        N=block_n,
        K=block_k,
        TF32="tf32",
    )
    assert torch.equal(out.double(), a.double() @ b.double())
    steps = triton.cdiv(k, block_k)
    assert counts["mma_flops"] == 2 * grid[0] * block_m * grid[1] * block_n * steps * block_k


@ARCHS
@pytest.mark.parametrize("precision, unit", [("tf32", 2e-3), ("ieee", 2e-6)])
def test_matmul_of_real_numbers(arch, precision, unit):
    a, b, out = randn(64, 96), randn(96, 64), torch.zeros(64, 64)
    sizes = {"M": 64, "N": 64, "K": 32, "TF32": precision}
    launch(kernels.matmul, (1, 1), [a, b, out, 64, 64, 96, 96, 64, 64], arch, **sizes)
    scale = (a.double().abs() @ b.double().abs()).max()
    assert ((out.double() - a.double() @ b.double()).abs().max() / scale) < unit


@ARCHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen, head_dim, num_warps", [(128, 64, 4), (200, 32, 4), (77, 128, 8)])
def test_attention(arch, dtype, causal, seqlen, head_dim, num_warps):
    q, k, v = randn(3, 2, seqlen, head_dim, dtype=dtype)
    out = torch.zeros_like(q)
    scale = head_dim**-0.5
    blocks = {"M": 64 if num_warps == 4 else 128, "N": 64, "D": head_dim, "CAUSAL": causal}
    grid = (triton.cdiv(seqlen, blocks["M"]), 2)
    launch(kernels.attention, grid, [q, k, v, out, seqlen, scale], arch, num_warps=num_warps, **blocks)
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    assert_close(out, wanted, 2 * UNIT[dtype])


@pytest.mark.parametrize("tile, num_warps", [((64, 64, 64), 4), ((128, 128, 64), 8), ((128, 64, 32), 4)], ids=str)
def test_matmul_with_tensor_descriptors(tile, num_warps):
    block_m, block_n, block_k = tile
    m, n, k = block_m + 24, 2 * block_n - 8, 4 * block_k - 16
    a, b, out = integers(m, k, dtype=torch.float16), integers(n, k, dtype=torch.float16), torch.zeros(m, n)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    sizes = {"M": block_m, "N": block_n, "K": block_k}
    scratch = 128 * 3 * grid[0] * grid[1] * 2
    launch(kernels.matmul_descriptor, grid, [a, b, out, m, n, k], 90, scratch, num_warps=num_warps, **sizes)
    assert torch.equal(out.double(), a.double() @ b.double().T)
