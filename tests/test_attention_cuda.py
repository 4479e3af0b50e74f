"""The CUDA kernels of attention: outputs and every gradient, against the reference by the tolerance rule."""

import pytest
import torch

from fastlayers import backends, ops
from tests.attention_cases import check, qkv, randn, run
from tests.backends import BACKENDS, device_of, dtypes_of, has_wide_float32_gradients
from tests.test_attention import rng

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc, or a GPU")
on_dtypes = pytest.mark.parametrize("dtype", dtypes_of("cuda"), ids=str)


@pytest.fixture(autouse=True)
def device():
    with device_of("cuda"):
        yield


@on_dtypes
@pytest.mark.parametrize("head_dim", [7, 31, 32, 33, 40, 80, 100, 129, 160, 200])
def test_head_dims(head_dim, dtype):
    for head_dim_v in {head_dim, 24, 130}:
        sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "batch": 1, "heads_q": 2, "seqlen_q": 70}
        tensors = dict(zip(("query", "key", "value"), qkv(dtype, **sizes)))
        what = f"head_dim {head_dim}, {head_dim_v}"
        check(ops.attention, tensors, "cuda", what, is_causal=True)
        check(ops.attention, tensors, "cuda", what, softcap=3.0, dropout_p=0.2, dropout_rng=rng())


@on_dtypes
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_several_blocks(deterministic, dtype):
    """Blocks that wait for each other and do not, in each shape of tile; groups of heads; few and many queries."""
    for head_dim, head_dim_v in ((64, 64), (128, 72), (40, 200)):
        for options in ({}, {"is_causal": True}, {"window": (70, 40), "dropout_p": 0.2, "dropout_rng": rng()}):
            for seqlen_q, seqlen_k in ((200, 300), (33, 290)):
                sizes = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
                sizes |= {"head_dim": head_dim, "head_dim_v": head_dim_v}
                tensors = dict(zip(("query", "key", "value"), qkv(dtype, **sizes)))
                more = {**options, "enable_gqa": True, "deterministic": deterministic}
                check(ops.attention, tensors, "cuda", f"{sizes}, {options}", **more)


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


@on_dtypes
def test_maxima_that_move(dtype):
    """Far from one block of keys to the next, up and down: sums that overflow where the maximum is not renewed."""
    query, key, value = qkv(dtype, batch=1, heads_q=2, seqlen_q=300)
    for ramp in (torch.linspace(0, 40, 300), torch.linspace(40, 0, 300), 40 * (torch.arange(300) % 97 == 96)):
        tensors = {"query": query, "key": (key.float() * ramp[:, None]).to(dtype), "value": value}
        check(ops.attention, tensors, "cuda")
        check(ops.attention, tensors, "cuda", is_causal=True)


def test_what_it_cannot_serve():
    query, key, value = qkv(torch.float64)
    with pytest.raises(backends.BackendError, match=r"take float32, float16 and bfloat16, not torch\.float64"):
        ops.attention(query, key, value, backend="cuda")


@pytest.mark.skipif(has_wide_float32_gradients("cuda"), reason="for sm_75")
def test_wide_float32_gradients_need_more_shared_memory():
    query, key, value = qkv(torch.float32, head_dim=136)
    ops.attention(query, key, value, backend="cuda")
    with pytest.raises(backends.BackendError, match=r"head_dim above 128 need compute capability 8\.0, this GPU has 7"):
        ops.attention(query.requires_grad_(), key, value, backend="cuda")


@pytest.mark.skipif(torch.bfloat16 in dtypes_of("cuda"), reason="for sm_75")
def test_bfloat16_needs_newer_tensor_cores():
    with pytest.raises(RuntimeError, match=r"bfloat16 needs compute capability 8\.0, this GPU has 7"):
        ops.attention(*qkv(torch.bfloat16), backend="cuda")
