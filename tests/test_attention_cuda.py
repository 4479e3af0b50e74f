"""The CUDA kernels of attention: the forward pass, against the reference by the tolerance rule."""

import pytest
import torch

from fastlayers import backends, ops
from tests.attention_cases import check, qkv, randn
from tests.backends import ARCH, BACKENDS, SIMULATED, device_of
from tests.test_attention import ODD, OPTIONS, rng

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc, or a GPU")
OLD = SIMULATED and ARCH == "sm_75"  # whose tensor cores have no bfloat16
on_dtypes = pytest.mark.parametrize("dtype", [torch.float16] if OLD else [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def device():
    with device_of("cuda"), torch.no_grad():
        yield


def check_forward(function, query, key, value, what="", **options):
    tensors = {name: options.pop(name) for name in ("attn_mask", "alibi_slopes", "sinks") if name in options}
    return check(function, {"query": query, "key": key, "value": value, **tensors}, "cuda", what, **options)


@on_dtypes
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    sizes, tensors, options = OPTIONS[name]
    check_forward(ops.attention, *qkv(dtype, **sizes), name, **tensors, **options)


@on_dtypes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", ODD)
def test_odd_sequence_lengths(seqlen_q, causal, dtype):
    for seqlen_k in ODD:
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "batch": 1, "heads_q": 2}
        check_forward(ops.attention, *qkv(dtype, **sizes), f"{seqlen_q} x {seqlen_k}", is_causal=causal)


@on_dtypes
@pytest.mark.parametrize("head_dim", [1, 7, 8, 31, 32, 33, 40, 64, 72, 80, 96, 100, 128, 129, 160, 192, 200, 256])
def test_head_dims(head_dim, dtype):
    for head_dim_v in {head_dim, 24, 130}:
        sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "batch": 1, "heads_q": 2, "seqlen_q": 70}
        what = f"head_dim {head_dim}, {head_dim_v}"
        check_forward(ops.attention, *qkv(dtype, **sizes), what, is_causal=True)
        check_forward(ops.attention, *qkv(dtype, **sizes), what, softcap=3.0, dropout_p=0.2, dropout_rng=rng())


@on_dtypes
def test_strides(dtype):
    """Heads inside the sequence, rows that are not aligned, tensors that begin anywhere, broadcast heads."""
    packed = randn(2, 65, 3, 4, 32, dtype=dtype)
    check_forward(ops.attention, *packed.permute(2, 0, 3, 1, 4), "packed", is_causal=True)
    odd = randn(3, 2, 4, 65, 33, dtype=dtype, seed=2)
    check_forward(ops.attention, *odd[..., 1:], "rows of 33, from the second on")
    check_forward(ops.attention, *odd[..., :32], "rows of 33")
    query, key, value = qkv(dtype)
    shared = randn(3, 4, 65, 32, dtype=dtype, seed=4)
    check_forward(ops.attention, query, shared[:2], shared[1:], "keys and values that overlap")
    check_forward(ops.attention, query, key[:, :1].expand(-1, 4, -1, -1), value, "broadcast")
    check_forward(
        ops.attention, *(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)), "turned"
    )


@on_dtypes
def test_empty(dtype):
    for sizes in ({"batch": 0}, {"seqlen_q": 0}, {"heads_q": 0}):
        query, key, value = qkv(dtype, **sizes)
        out, lse = ops.attention(query, key, value, return_lse=True, backend="cuda")
        assert out.shape == query.shape and lse.shape == query.shape[:3]
    query, key, value = qkv(dtype)
    out, lse = ops.attention(query, key[:, :, :0], value[:, :, :0], return_lse=True, backend="cuda")
    assert not out.any() and (lse == -torch.inf).all()


@on_dtypes
def test_rows_without_keys(dtype):
    query, key, value = qkv(dtype)
    mask = torch.ones(2, 1, 65, 65, dtype=torch.bool)
    mask[0, :, 5] = mask[1, :, 60:] = False
    out, lse = ops.attention(query, key, value, mask, return_lse=True, backend="cuda")
    assert not out[0, :, 5].any() and not out[1, :, 60:].any()
    assert (lse[0, :, 5] == -torch.inf).all() and torch.isfinite(lse[0, :, 4]).all()


@on_dtypes
def test_extreme_scores(dtype):
    """Maxima that move far from tile to tile, up and down: sums that overflow without a new maximum."""
    query, key, value = qkv(dtype, batch=1, heads_q=2, seqlen_q=300)
    for ramp in (torch.linspace(0, 40, 300), torch.linspace(40, 0, 300), 40 * (torch.arange(300) % 97 == 96)):
        scaled = (key.float() * ramp[:, None]).to(dtype)
        check_forward(ops.attention, query, scaled, value, "ramp")
        check_forward(ops.attention, query, scaled, value, "ramp", is_causal=True)
    check_forward(ops.attention, query, key, value, "window", window=(3, 5))
    query[0, 0, 7, 3] = torch.nan
    out = ops.attention(query, key, value, backend="cuda")
    assert out[0, 0, 7].isnan().all() and out.isnan().sum() == out.shape[-1]


@on_dtypes
def test_packed_sequences(dtype):
    lengths_q, lengths_k = torch.tensor([0, 65, 66, 66, 200]), torch.tensor([0, 130, 131, 140, 141])
    tensors = [randn(n, 2, 32, dtype=dtype, seed=n) for n in (210, 150, 151)]
    tensors[2] = tensors[2][:150]
    options = {
        "cu_seqlens_q": lengths_q.int(),
        "cu_seqlens_k": lengths_k.int(),
        "max_seqlen_q": 134,
        "max_seqlen_k": 130,
    }

    def run(query, key, value, **more):
        return ops.varlen_attention(query, key, value, **options, **more)

    for more in (
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_alignment": "bottom_right", "window": (20, None)},
    ):
        check_forward(run, *tensors, str(more), **more)


def test_what_it_cannot_serve():
    query, key, value = qkv(torch.float32)
    with pytest.raises(backends.BackendError, match=r"take float16 and bfloat16, not torch\.float32"):
        ops.attention(query, key, value, backend="cuda")
    query, key, value = qkv(torch.float16)
    with torch.enable_grad(), pytest.raises(backends.BackendError, match="no backward yet"):
        ops.attention(query.requires_grad_(), key, value, backend="cuda")
    mask = torch.zeros(65, 65, requires_grad=True)
    with torch.enable_grad():
        assert "no backward yet" in backends.explain("attention", key, key, value, attn_mask=mask)["cuda"]
    assert backends.explain("attention", key, key, value, attn_mask=mask)["cuda"] is None


@pytest.mark.skipif(not OLD, reason="for sm_75")
def test_bfloat16_needs_newer_tensor_cores():
    with pytest.raises(RuntimeError, match=r"bfloat16 needs compute capability 8\.0, this GPU has 7"):
        ops.attention(*qkv(torch.bfloat16), backend="cuda")
