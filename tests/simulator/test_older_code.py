"""A library that was compiled for an older GPU than the one it runs on: launchers go by the code, not by the GPU."""

import pytest
import torch

from fastlayers import ops
from tests.attention_cases import check, qkv
from tests.backends import BACKENDS
from tests.numerics import assert_accurate
from tests.simulator import install, uninstall
from tests.test_linear_act import check as check_linear
from tests.test_linear_act import make

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the kernels")


@pytest.fixture(autouse=True, params=["sm_80", "sm_90"])
def device(request):
    torch.manual_seed(0)
    install(request.param, code="sm_75")
    yield
    uninstall()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_it_runs(dtype):
    tensors = dict(zip(("query", "key", "value"), qkv(dtype, batch=1, heads_q=2, seqlen_q=140, head_dim=128)))
    check(ops.attention, tensors, "cuda", is_causal=True)
    cache = [tensors["query"][:, :, :1], tensors["key"], tensors["value"]]
    lengths, results = torch.tensor([140], dtype=torch.int32), []
    for backend, cast in (("cuda", dtype), ("reference", torch.float64), ("reference", dtype)):
        results.append(ops.decode_attention(*(t.to(cast) for t in cache), lengths, backend=backend))
    assert_accurate(*results, "decoding")
    tensors, grad = make("linear_act", (150,), 200, 130, dtype)
    check_linear("linear_act", tensors, grad, "gelu", backend="cuda")


def test_what_it_lacks():
    """bfloat16, and wide gradients in float32: the GPU could, the code cannot, and says so."""
    query, key, value = qkv(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"bfloat16 needs kernels for compute capability 8.0, this GPU runs .* 7\.5"):
        ops.attention(query, key, value, backend="cuda")
    with pytest.raises(RuntimeError, match="linear_act: bfloat16 needs kernels"):
        ops.linear_act(query[0, 0], key[0, 0], backend="cuda")
    query, key, value = (x.requires_grad_() for x in qkv(torch.float32, head_dim=136))
    with pytest.raises(RuntimeError, match="head_dim above 128 needs kernels"):
        ops.attention(query, key, value, backend="cuda").sum().backward()
