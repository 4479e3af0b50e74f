"""The CUDA kernels of attention: outputs and every gradient, against the reference by the tolerance rule."""

import pytest
import torch

from fastlayers import backends, ops
from tests.attention_cases import check, qkv, randn, run
from tests.backends import ARCH, BACKENDS, SIMULATED, device_of
from tests.test_attention import ODD, OPTIONS, rng

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc, or a GPU")
OLD = SIMULATED and ARCH == "sm_75"  # whose tensor cores have no bfloat16
DTYPES = [torch.float32, torch.float16] if OLD else [torch.float32, torch.float16, torch.bfloat16]
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def device():
    with device_of("cuda"):
        yield


def check_cuda(function, query, key, value, what="", **options):
    tensors = {name: options.pop(name) for name in ("attn_mask", "alibi_slopes", "sinks") if name in options}
    wide = max(query.shape[-1], value.shape[-1]) > 128
    with torch.set_grad_enabled(not (OLD and wide and query.dtype == torch.float32)):  # which has no gradient there
        return check(function, {"query": query, "key": key, "value": value, **tensors}, "cuda", what, **options)


@on_dtypes
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    sizes, tensors, options = OPTIONS[name]
    check_cuda(ops.attention, *qkv(dtype, **sizes), name, **tensors, **options)


@on_dtypes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", ODD)
def test_odd_sequence_lengths(seqlen_q, causal, dtype):
    for seqlen_k in ODD:
        sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "batch": 1, "heads_q": 2}
        check_cuda(ops.attention, *qkv(dtype, **sizes), f"{seqlen_q} x {seqlen_k}", is_causal=causal)


@on_dtypes
@pytest.mark.parametrize("head_dim", [1, 7, 8, 31, 32, 33, 40, 64, 72, 80, 96, 100, 128, 129, 160, 192, 200, 256])
def test_head_dims(head_dim, dtype):
    for head_dim_v in {head_dim, 24, 130}:
        sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "batch": 1, "heads_q": 2, "seqlen_q": 70}
        what = f"head_dim {head_dim}, {head_dim_v}"
        check_cuda(ops.attention, *qkv(dtype, **sizes), what, is_causal=True)
        check_cuda(ops.attention, *qkv(dtype, **sizes), what, softcap=3.0, dropout_p=0.2, dropout_rng=rng())


@on_dtypes
def test_strides(dtype):
    """Heads inside the sequence, rows that are not aligned, tensors that begin anywhere, broadcast heads."""
    packed = randn(2, 65, 3, 4, 32, dtype=dtype)
    check_cuda(ops.attention, *packed.permute(2, 0, 3, 1, 4), "packed", is_causal=True)
    odd = randn(3, 2, 4, 65, 33, dtype=dtype, seed=2)
    check_cuda(ops.attention, *odd[..., 1:], "rows of 33, from the second on")
    check_cuda(ops.attention, *odd[..., :32], "rows of 33")
    query, key, value = qkv(dtype)
    shared = randn(3, 4, 65, 32, dtype=dtype, seed=4)
    check_cuda(ops.attention, query, shared[:2], shared[1:], "keys and values that overlap")
    check_cuda(ops.attention, query, key[:, :1].expand(-1, 4, -1, -1), value, "broadcast")
    check_cuda(ops.attention, *(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)), "turned")


@on_dtypes
def test_empty(dtype):
    for sizes in ({"batch": 0}, {"seqlen_q": 0}, {"heads_q": 0}):
        query, key, value = qkv(dtype, **sizes)
        out, lse = ops.attention(query, key, value, return_lse=True, backend="cuda")
        assert out.shape == query.shape and lse.shape == query.shape[:3]
        check_cuda(ops.attention, query, key, value, f"{sizes}")
    query, key, value = qkv(dtype)
    ours = check_cuda(ops.attention, query, key[:, :, :0], value[:, :, :0], "no keys")
    assert not ours["out"].any() and (ours["lse"] == -torch.inf).all() and not ours["dquery"].any()
    check_cuda(ops.attention, query, key[:, :, :0], value[:, :, :0], "no keys", sinks=randn(4))
    additive = randn(2, 4, 65, 1)
    check_cuda(ops.attention, query, key[:, :, :0], value[:, :, :0], "no keys", attn_mask=additive)


@on_dtypes
def test_rows_without_keys(dtype):
    query, key, value = qkv(dtype)
    mask = torch.ones(2, 1, 65, 65, dtype=torch.bool)
    mask[0, :, 5] = mask[1, :, 60:] = False
    ours = check_cuda(ops.attention, query, key, value, "bool", attn_mask=mask)
    for name in ("out", "dquery"):
        assert not ours[name][0, :, 5].any() and not ours[name][1, :, 60:].any()
    assert (ours["lse"][0, :, 5] == -torch.inf).all() and torch.isfinite(ours["lse"][0, :, 4]).all()
    lowest = torch.zeros(2, 1, 65, 65, dtype=dtype)
    for number in (torch.finfo(torch.float16).min, torch.finfo(dtype).min):
        lowest[..., 20:] = number
        lowest[1, :, 3] = number
        check_cuda(ops.attention, query, key, value, f"a whole row hidden by {number}", attn_mask=lowest)


@on_dtypes
def test_extreme_scores(dtype):
    """Maxima that move far from tile to tile, up and down: sums that overflow without a new maximum."""
    query, key, value = qkv(dtype, batch=1, heads_q=2, seqlen_q=300)
    for ramp in (torch.linspace(0, 40, 300), torch.linspace(40, 0, 300), 40 * (torch.arange(300) % 97 == 96)):
        scaled = (key.float() * ramp[:, None]).to(dtype)
        check_cuda(ops.attention, query, scaled, value, "ramp")
        check_cuda(ops.attention, query, scaled, value, "ramp", is_causal=True)
    check_cuda(ops.attention, query, key, value, "window", window=(3, 5))
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
        check_cuda(run, *tensors, str(more), **more)


@on_dtypes
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_several_blocks(deterministic, dtype):
    """Blocks that wait for each other and do not, in each shape of tile; groups of heads; few and many queries."""
    for head_dim, head_dim_v in ((64, 64), (128, 72), (40, 200)):
        for options in ({}, {"is_causal": True}, {"window": (70, 40), "dropout_p": 0.2, "dropout_rng": rng()}):
            for seqlen_q, seqlen_k in ((200, 300), (33, 290)):
                sizes = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
                tensors = qkv(dtype, **sizes, head_dim=head_dim, head_dim_v=head_dim_v)
                what = f"{head_dim}, {head_dim_v}, {seqlen_q} x {seqlen_k}, {options}"
                check_cuda(ops.attention, *tensors, what, deterministic=deterministic, enable_gqa=True, **options)


@on_dtypes
def test_deterministic_gradients_are_bitwise_the_same(dtype, monkeypatch):
    """Whatever blocks run at the same time; the simulator runs as many as there are cores."""
    sizes = {"batch": 1, "heads_q": 4, "heads_k": 2, "seqlen_q": 200, "seqlen_k": 520, "head_dim": 64}
    query, key, value = qkv(dtype, **sizes)
    mask = randn(1, 200, 1, seed=6)
    for extra in ({}, {"attn_mask": mask, "sinks": randn(4, seed=7)}):
        results = []
        for cores in (1, 2, 5):
            monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
            tensors = {"query": query, "key": key, "value": value, **extra}
            options = {"is_causal": True, "deterministic": True, "enable_gqa": True, "backend": "cuda"}
            results.append(run(ops.attention, tensors, options))
        assert all(torch.equal(other[name], results[0][name]) for other in results for name in other)


def test_what_it_cannot_serve():
    query, key, value = qkv(torch.float64)
    with pytest.raises(backends.BackendError, match=r"take float32, float16 and bfloat16, not torch\.float64"):
        ops.attention(query, key, value, backend="cuda")


@pytest.mark.skipif(not OLD, reason="for sm_75")
def test_wide_float32_gradients_need_more_shared_memory():
    query, key, value = qkv(torch.float32, head_dim=136)
    ops.attention(query, key, value, backend="cuda")
    with pytest.raises(backends.BackendError, match=r"head_dim above 128 need compute capability 8\.0, this GPU has 7"):
        ops.attention(query.requires_grad_(), key, value, backend="cuda")


@pytest.mark.skipif(not OLD, reason="for sm_75")
def test_bfloat16_needs_newer_tensor_cores():
    with pytest.raises(RuntimeError, match=r"bfloat16 needs compute capability 8\.0, this GPU has 7"):
        ops.attention(*qkv(torch.bfloat16), backend="cuda")
