"""Every CUDA kernel of attention under every option: no bank conflicts, and no sector of global memory half read.

Per kernel, shared-memory wavefronts and global sectors are at most 1.02 times the minimum of the same accesses, for
contiguous tensors whose sizes are multiples of the tiles.
"""

import pytest
import torch

from fastlayers import ops
from tests.attention_cases import check, qkv
from tests.backends import BACKENDS
from tests.simulator import install, record, uninstall

MOST = 1.02
SEQLEN = 128
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the kernels")


@pytest.fixture(autouse=True)
def gpu():
    install("sm_80")
    yield
    uninstall()


def randn(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(dtype, shape=(1, 1, SEQLEN, SEQLEN)):
    return randn(*shape) < 0.5 if dtype == torch.bool else randn(*shape, dtype=dtype)


OPTIONS = {  # as functions of the dtype
    "none": lambda dtype: {},
    "causal": lambda dtype: {"is_causal": True},
    "window": lambda dtype: {"window": (63, 0)},
    "bool mask": lambda dtype: {"attn_mask": mask(torch.bool)},
    "bool mask of keys": lambda dtype: {"attn_mask": mask(torch.bool, (1, 1, 1, SEQLEN))},
    "additive mask": lambda dtype: {"attn_mask": mask(dtype)},
    "float32 mask": lambda dtype: {"attn_mask": mask(F32)},
    "mask of heads": lambda dtype: {"attn_mask": mask(dtype, (1, 2, SEQLEN, SEQLEN)).requires_grad_()},
    "mask of all heads": lambda dtype: {"attn_mask": mask(dtype).requires_grad_()},
    "mask of keys": lambda dtype: {"attn_mask": mask(dtype, (1, 1, 1, SEQLEN)).requires_grad_()},
    "alibi": lambda dtype: {"alibi_slopes": torch.rand(2)},
    "softcap": lambda dtype: {"softcap": 20.0},
    "sinks": lambda dtype: {"sinks": randn(2).requires_grad_()},
    "dropout": lambda dtype: {"dropout_p": 0.1},
    "several": lambda dtype: {"attn_mask": mask(torch.bool), "dropout_p": 0.1, "is_causal": True, "softcap": 20.0},
    "deterministic": lambda dtype: {"deterministic": True},
}
WIDE = ("none", "bool mask", "additive mask", "mask of all heads", "dropout")  # also with larger head dims
SHAPES = [
    *((name, dtype, 64) for name in OPTIONS for dtype in (BF16, F32)),
    *((name, dtype, head_dim) for name in WIDE for dtype in (BF16, F32) for head_dim in (128, 256)),
    *((name, F16, 64) for name in ("none", "additive mask")),
    *(("none", dtype, 32) for dtype in (BF16, F32)),
]


def misses(launches):
    """What takes more than it has to."""
    for launch in launches:
        for where, unit in (("shared", "wavefronts"), ("global", "sectors")):
            found, minimum = launch.counts[where][unit], launch.counts[where]["minimum"]
            if found > MOST * minimum:
                yield f"{launch.name}: {found / minimum:.3f} of the {unit} that are needed"


def launches_of(function, *tensors, **options):
    """Forward and backward."""
    with record() as launches:
        out = function(*tensors, backend="cuda", **options)
        inputs = [x for x in (*tensors, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
        if inputs:
            torch.autograd.grad(out, inputs, randn(*out.shape, seed=9, dtype=out.dtype))
    assert launches
    return launches


@pytest.mark.parametrize("name, dtype, head_dim", SHAPES, ids=lambda value: str(value).removeprefix("torch."))
def test_attention(name, dtype, head_dim):
    inputs = randn(3, 1, 2, SEQLEN, head_dim, seed=1, dtype=dtype).requires_grad_()
    assert list(misses(launches_of(ops.attention, *inputs.unbind(), **OPTIONS[name](dtype)))) == []


@pytest.mark.parametrize("mask_dtype", [torch.bool, BF16, F16, F32], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_whole_words_of_masks_are_right(dtype, mask_dtype):
    """Rows that are multiples of 8 bytes, beside tiles that reach over the mask's end."""
    tensors = dict(zip(("query", "key", "value"), qkv(dtype, 1, 2, seqlen_q=72, seqlen_k=136, head_dim=64)))
    for heads in (1, 2):
        attn_mask = mask(mask_dtype, (1, heads, 72, 136))
        check(ops.attention, {**tensors, "attn_mask": attn_mask}, "cuda", f"{heads} heads", is_causal=heads == 2)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_grouped_heads(dtype):
    query = randn(1, 4, SEQLEN, 64, seed=1, dtype=dtype).requires_grad_()
    key, value = (randn(1, 2, SEQLEN, 64, seed=seed, dtype=dtype).requires_grad_() for seed in (2, 3))
    launches = launches_of(ops.attention, query, key, value, enable_gqa=True, dropout_p=0.1, is_causal=True)
    assert list(misses(launches)) == []


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.1}, {"softcap": 20.0}], ids=str)
def test_packed_sequences(options, dtype):
    cu_seqlens = torch.tensor([0, 128, 320, 384], dtype=torch.int32)
    inputs = [randn(384, 2, 64, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2, 3)]
    launches = launches_of(ops.varlen_attention, *inputs, cu_seqlens, cu_seqlens, 192, 192, **options)
    assert list(misses(launches)) == []


DECODING = {  # query heads, tokens, head_dim, pages, options
    "one row": (1, 1, 128, None, {}),
    "a group": (8, 1, 64, None, {}),
    "tokens": (4, 16, 128, None, {"is_causal": True}),
    "wide": (4, 8, 256, None, {}),
    "pages": (8, 1, 128, 16, {}),
    "window": (8, 1, 64, None, {"window": (127, 0)}),
    "sinks": (8, 1, 64, None, {"sinks": randn(8)}),
    "alibi": (8, 1, 64, None, {"alibi_slopes": torch.rand(8)}),
}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("name", DECODING)
def test_decoding(name, dtype):
    heads, tokens, head_dim, page_size, options = DECODING[name]
    query, lengths = randn(2, heads, tokens, head_dim, dtype=dtype), torch.tensor([512, 256], dtype=torch.int32)
    caches = randn(2, 2, 1, 512, head_dim, seed=1, dtype=dtype)
    if page_size:
        pages = 2 * 512 // page_size
        caches = caches.view(2, pages, 1, page_size, head_dim)
        options = {**options, "page_table": torch.arange(pages, dtype=torch.int32).view(2, -1)}
    launches = launches_of(ops.decode_attention, query, *caches, lengths, enable_gqa=True, **options)
    assert list(misses(launches)) == []
