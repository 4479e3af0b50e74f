"""The attention ops as torch ops: wrong calls, registration, torch.compile, autocast, and the choice of backend."""

import pickle

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.library import opcheck

import fastlayers
from fastlayers import backends, ops
from tests.attention_cases import DTYPES, qkv, randn
from tests.backends import BACKENDS, placed

on_backends = pytest.mark.parametrize("backend", [*BACKENDS["attention"], "reference"])
needs_native = pytest.mark.skipif("cpu" not in BACKENDS["attention"], reason="the compiled kernels are not under test")
Q = torch.zeros(2, 4, 7, 8)
CU = torch.tensor([0, 3, 7], dtype=torch.int32)
PAGES = torch.tensor([[0], [1]], dtype=torch.int32)


def tensors(*shape, **options):
    return torch.zeros(*shape, **options)


# What is wrong: changes to a legal call, the error, and words that its message has to hold.
BAD_ATTENTION = {
    "query is a list": ({"query": [1.0]}, TypeError, "query has to be a torch.Tensor, got list"),
    "key is None": ({"key": None}, TypeError, "key has to be a torch.Tensor, got NoneType"),
    "value is a number": ({"value": 3}, TypeError, "value has to be a torch.Tensor, got int"),
    "integer query": ({"query": Q.long()}, TypeError, "query has to be a floating-point tensor, got torch.int64"),
    "complex query": ({"query": Q.to(torch.complex64)}, TypeError, "floating-point"),
    "float8": ({name: Q.to(torch.float8_e4m3fn) for name in ("query", "key", "value")}, TypeError, "float8_e4m3fn"),
    "mixed dtypes": ({"key": Q.half()}, ValueError, "key is torch.float16, query is torch.float32"),
    "mixed devices": ({"value": Q.to("meta")}, ValueError, "value is on meta, query on (cpu|cuda:0)$"),
    "one dimension": ({name: tensors(8) for name in ("query", "key", "value")}, ValueError, r"\(8,\)"),
    "other dimensions": ({"key": Q[0]}, ValueError, "heads, seqlen, head_dim"),
    "head_dim": (
        {"key": tensors(2, 4, 7, 9), "value": tensors(2, 4, 7, 9)},
        ValueError,
        "key has head_dim 9, query has 8",
    ),
    "batch": ({"key": tensors(3, 4, 7, 8), "value": tensors(3, 4, 7, 8)}, ValueError, "do not broadcast"),
    "value seqlen": ({"value": tensors(2, 4, 6, 8)}, ValueError, "key has seqlen 7, value has 6"),
    "value heads": ({"value": tensors(2, 2, 7, 8)}, ValueError, "value has 2 heads, key has 4"),
    "heads without gqa": ({"key": Q[:, :2], "value": Q[:, :2]}, ValueError, "enable_gqa=True"),
    "heads do not divide": (
        {"key": Q[:, :3], "value": Q[:, :3], "enable_gqa": True},
        ValueError,
        "4 heads .* multiple .* 3",
    ),
    "no key heads": ({"key": Q[:, :0], "value": Q[:, :0], "enable_gqa": True}, ValueError, "multiple"),
    "mask is a list": ({"attn_mask": [True]}, TypeError, "attn_mask has to be a torch.Tensor"),
    "integer mask": ({"attn_mask": torch.ones(7, 7, dtype=torch.int64)}, TypeError, "attn_mask .* got torch.int64"),
    "float64 mask": ({"attn_mask": tensors(7, 7).double()}, TypeError, "attn_mask .* got torch.float64"),
    "mask size": (
        {"attn_mask": tensors(7, 6)},
        ValueError,
        r"attn_mask \(7, 6\) does not broadcast to .*\(2, 4, 7, 7\)",
    ),
    "mask batch": ({"attn_mask": tensors(3, 1, 7, 7)}, ValueError, "does not broadcast"),
    "mask dimensions": ({"attn_mask": tensors(1, 2, 4, 7, 7)}, ValueError, "does not broadcast"),
    "mask device": ({"attn_mask": tensors(7, 7, device="meta")}, ValueError, "attn_mask is on meta"),
    "dropout_p 1.5": ({"dropout_p": 1.5}, ValueError, "dropout_p has to be between 0.0 and 1.0, got 1.5"),
    "dropout_p negative": ({"dropout_p": -0.1}, ValueError, "dropout_p"),
    "dropout_p nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p .* got nan"),
    "dropout_p string": ({"dropout_p": "0.1"}, TypeError, "dropout_p has to be a number, got str"),
    "is_causal string": ({"is_causal": "yes"}, TypeError, "is_causal has to be a bool, got str"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale"),
    "scale string": ({"scale": "1"}, TypeError, "scale has to be a number"),
    "window negative": ({"window": (-1, 3)}, ValueError, "window sizes have to be >= 0"),
    "window number": ({"window": 3}, TypeError, r"window has to be a pair \(left, right\), got 3"),
    "window triple": ({"window": (1, 2, 3)}, TypeError, "pair"),
    "window fractions": ({"window": (1.5, 2)}, TypeError, "integers"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "softcap"),
    "softcap nan": ({"softcap": float("nan")}, ValueError, "softcap"),
    "alibi shape": ({"alibi_slopes": tensors(3)}, ValueError, r"alibi_slopes has to be \(4,\) or \(2, 4\), got \(3,\)"),
    "alibi dtype": ({"alibi_slopes": torch.ones(4, dtype=torch.int32)}, TypeError, "alibi_slopes"),
    "alibi gradient": ({"alibi_slopes": tensors(4, requires_grad=True)}, ValueError, "alibi_slopes has no gradient"),
    "alibi list": ({"alibi_slopes": [0.1] * 4}, TypeError, "alibi_slopes has to be a torch.Tensor"),
    "sinks shape": ({"sinks": tensors(2, 4)}, ValueError, r"sinks has to be \(4,\), got \(2, 4\)"),
    "sinks dtype": ({"sinks": torch.ones(4, dtype=torch.bool)}, TypeError, "sinks"),
    "sinks device": ({"sinks": tensors(4, device="meta")}, ValueError, "sinks is on meta"),
    "causal_alignment": ({"causal_alignment": "lower"}, ValueError, "'top_left' or 'bottom_right', got 'lower'"),
    "rng shape": ({"dropout_p": 0.1, "dropout_rng": torch.tensor([1])}, ValueError, "dropout_rng"),
    "rng dtype": ({"dropout_p": 0.1, "dropout_rng": torch.tensor([1, 2], dtype=torch.int32)}, ValueError, "int64"),
    "rng list": ({"dropout_p": 0.1, "dropout_rng": [1, 2]}, TypeError, "dropout_rng"),
    "backend name": ({"backend": "gpu"}, ValueError, "'gpu' is not one of"),
    "backend cannot": ({"backend": "cuda"}, backends.BackendError, "cuda"),
}

BAD_VARLEN = {
    "four dimensions": ({"query": Q}, ValueError, "tokens, heads, head_dim"),
    "value tokens": ({"value": tensors(6, 4, 8)}, ValueError, "key has 7 tokens, value has 6"),
    "value heads": ({"value": tensors(7, 2, 8)}, ValueError, "value has 2 heads"),
    "cu list": ({"cu_seqlens_q": [0, 3, 7]}, TypeError, "cu_seqlens_q has to be a torch.Tensor"),
    "cu int64": ({"cu_seqlens_k": CU.long()}, TypeError, "cu_seqlens_k has to be int32, got torch.int64"),
    "cu matrix": ({"cu_seqlens_q": CU.view(1, 3)}, ValueError, "one-dimensional"),
    "cu sizes": ({"cu_seqlens_k": CU[:2]}, ValueError, "one size"),
    "cu empty": ({"cu_seqlens_q": CU[:0], "cu_seqlens_k": CU[:0]}, ValueError, "at least 1"),
    "cu device": ({"cu_seqlens_q": CU.to("meta")}, ValueError, "cu_seqlens_q is on meta"),
    "cu decreases": ({"cu_seqlens_q": torch.tensor([0, 5, 3], dtype=torch.int32)}, ValueError, "cu_seqlens_q"),
    "cu overruns": ({"cu_seqlens_k": torch.tensor([0, 3, 9], dtype=torch.int32)}, ValueError, "cu_seqlens_k"),
    "cu starts late": ({"cu_seqlens_q": torch.tensor([1, 3, 7], dtype=torch.int32)}, ValueError, "start with 0"),
    "cu negative": ({"cu_seqlens_q": torch.tensor([0, -4, 7], dtype=torch.int32)}, ValueError, "cu_seqlens_q"),
    "max_seqlen too small": ({"max_seqlen_q": 3}, ValueError, "cu_seqlens_q"),
    "max_seqlen negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k has to be >= 0, got -1"),
    "max_seqlen float": ({"max_seqlen_q": 4.0}, TypeError, "max_seqlen_q has to be an int, got float"),
    "alibi batch": ({"alibi_slopes": tensors(3, 4)}, ValueError, r"\(2, 4\)"),
    "dropout_p": ({"dropout_p": 2}, ValueError, "dropout_p"),
    "window": ({"window": (2, -3)}, ValueError, "window"),
}

BAD_DECODE = {
    "three dimensions": ({"query": Q[0]}, ValueError, "heads, seqlen, head_dim"),
    "batch": ({"query": Q[:1]}, ValueError, "heads, seqlen, head_dim"),
    "cache seqlen": ({"value_cache": tensors(2, 4, 6, 8)}, ValueError, "key_cache has seqlen 7, value_cache has 6"),
    "seqlens size": ({"cache_seqlens": CU}, ValueError, r"cache_seqlens has to be \(2,\), got \(3,\)"),
    "seqlens int64": ({"cache_seqlens": torch.tensor([1, 2])}, TypeError, "int32"),
    "seqlens overrun": ({"cache_seqlens": torch.tensor([1, 8], dtype=torch.int32)}, ValueError, "cache_seqlens"),
    "seqlens negative": ({"cache_seqlens": torch.tensor([-1, 7], dtype=torch.int32)}, ValueError, "cache_seqlens"),
    "pages list": ({"page_table": [[0], [1]]}, TypeError, "page_table has to be a torch.Tensor, got list"),
    "pages int64": ({"page_table": PAGES.long()}, TypeError, "page_table has to be int32, got torch.int64"),
    "pages device": ({"page_table": PAGES.to("meta")}, ValueError, "page_table is on meta"),
    "pages dimensions": ({"page_table": PAGES[0]}, ValueError, r"page_table has to be \(2, pages of a sequence\), got"),
    "pages batch": ({"page_table": PAGES[:1]}, ValueError, r"page_table has to be \(2, pages of .* got \(1, 1\)"),
    "pages too few": ({"page_table": PAGES[:, :0]}, ValueError, "cache_seqlens"),
    "page behind the last": ({"page_table": PAGES + 1}, ValueError, "page_table"),
    "page negative": ({"page_table": PAGES - 1}, ValueError, "page_table"),
    "page_size": (
        {"page_table": PAGES, "value_cache": tensors(2, 4, 6, 8)},
        ValueError,
        "key_cache has page_size 7, value_cache has 6",
    ),
    "page_size 0": (
        {"page_table": PAGES, "key_cache": Q[:, :, :0], "value_cache": Q[:, :, :0]},
        ValueError,
        "page_size 0",
    ),
    "pages of key and value": ({"page_table": PAGES, "value_cache": Q[:1]}, ValueError, r"caches \(pages, heads"),
    "gradient": ({"query": Q.clone().requires_grad_()}, ValueError, "has no gradient"),
}


def call(op, **changes):
    legal = {
        "attention": {"query": Q, "key": Q, "value": Q},
        "varlen_attention": {name: tensors(7, 4, 8) for name in ("query", "key", "value")}
        | {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 4, "max_seqlen_k": 4},
        "decode_attention": {"query": Q, "key_cache": Q, "value_cache": Q}
        | {"cache_seqlens": torch.tensor([3, 7], dtype=torch.int32)},
    }
    return getattr(ops, op)(**placed({**legal[op], **changes}))


CPU_TENSORS = {  # what these say lies in tensors, which on a GPU are not read without a synchronisation; or on the CPU
    "backend cannot",
    "cu decreases",
    "cu overruns",
    "cu starts late",
    "cu negative",
    "max_seqlen too small",
    "seqlens overrun",
    "seqlens negative",
    "pages too few",
    "page behind the last",
    "page negative",
}


@on_backends
@pytest.mark.parametrize(
    "op, what",
    [("attention", what) for what in BAD_ATTENTION]
    + [("varlen_attention", what) for what in BAD_VARLEN]
    + [("decode_attention", what) for what in BAD_DECODE],
)
def test_bad_calls_say_what_is_wrong(op, what, backend):
    if backend != "cpu" and what in CPU_TENSORS:
        pytest.skip("for the CPU")
    table = {"attention": BAD_ATTENTION, "varlen_attention": BAD_VARLEN, "decode_attention": BAD_DECODE}[op]
    changes, error, words = table[what]
    call(op, backend=backend)
    with pytest.raises(error, match=words) as caught:
        call(op, **{"backend": backend, **changes})
    assert str(caught.value).startswith(("attention: ", f"{op}: ", f"{op} has no", "backend "))


def test_what_the_kernels_do_not_take_goes_to_the_reference():
    wide = torch.randn(1, 1, 3, 300)
    assert ops.attention(wide, wide, wide).shape == wide.shape
    with pytest.raises(backends.BackendError, match="head_dim has to be 1 to 256, got 300"):
        ops.attention(wide, wide, wide, backend="cpu")
    double = wide[..., :8].double()
    assert ops.attention(double, double, double, return_lse=True)[1].dtype == torch.float64
    with pytest.raises(backends.BackendError, match="float64"):
        ops.attention(double, double, double, backend="cpu")


def test_explain(capsys):
    answers = fastlayers.explain("attention", Q, Q, Q, is_causal=True)
    assert answers["reference"] is None and "cuda" in answers
    assert "attention: reference" in capsys.readouterr().out
    fastlayers.explain("varlen_attention", Q[0], Q[0], Q[0], CU, CU, 4, 4)
    answers = fastlayers.explain("decode_attention", Q.double(), key_cache=Q.double(), value_cache=Q.double())
    assert "float64" in answers["cpu"]


def test_every_op_can_be_forced_to_the_reference():
    with fastlayers.use_backend("reference"):
        query = Q.clone().requires_grad_()
        assert "Attention" not in type(ops.attention(query, Q, Q).grad_fn).__name__


# The raw ops, which anybody may call: an error, never a crash.


def raw_arguments(**changes):
    """The arguments of attention_forward, in order."""
    arguments = {"query": Q, "key": Q, "value": Q, "attn_mask": None, "alibi_slopes": None, "sinks": None}
    arguments |= {"dropout_rng": None, "cu_seqlens_q": None, "cu_seqlens_k": None}
    arguments |= {"max_seqlen_q": 0, "max_seqlen_k": 0, "dropout_p": 0.0, "is_causal": False, "bottom_right": False}
    arguments |= {"scale": 1.0, "window_left": -1, "window_right": -1, "softcap": 0.0, "deterministic": False}
    assert set(changes) <= set(arguments)
    return arguments | changes


def raw_decode_arguments(**changes):
    """The arguments of attention_decode, in order."""
    arguments = {"query": Q, "key_cache": Q, "value_cache": Q, "cache_seqlens": CU[1:], "page_table": None}
    arguments |= {"alibi_slopes": None, "sinks": None, "is_causal": True, "scale": 1.0, "window_left": -1}
    arguments |= {"window_right": -1, "softcap": 0.0}
    assert set(changes) <= set(arguments)
    return arguments | changes


def packed_changes(**changes):
    rows = {name: tensors(7, 4, 8) for name in ("query", "key", "value")}
    return {**rows, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 4, "max_seqlen_k": 4, **changes}


RAW = [
    {"query": Q.double(), "key": Q.double(), "value": Q.double()},
    {"key": Q.half()},
    {"query": Q[0]},
    {"key": tensors(2, 4, 7, 9)},
    {"key": Q[:, :3], "value": Q[:, :3]},
    {"key": Q[:, :0], "value": Q[:, :0]},
    {"value": Q[:, :2]},
    {"value": Q[:, :, :5]},
    {"key": Q[:1], "value": Q[:1]},
    {name: tensors(2, 4, 7, 257) for name in ("query", "key", "value")},
    {name: tensors(2, 4, 7, 0) for name in ("query", "key", "value")},
    {"attn_mask": tensors(7, 7)},
    {"attn_mask": tensors(1, 1, 7, 6)},
    {"attn_mask": torch.ones(1, 1, 7, 7, dtype=torch.int64)},
    {"attn_mask": tensors(1, 1, 7, 7).double()},
    {"alibi_slopes": tensors(3)},
    {"alibi_slopes": tensors(4).half()},
    {"alibi_slopes": tensors(1, 2, 4)},
    {"sinks": tensors(5)},
    {"sinks": tensors(4).double()},
    {"dropout_p": 0.5},
    {"dropout_p": 1.5, "dropout_rng": torch.tensor([1, 2])},
    {"dropout_p": float("nan"), "dropout_rng": torch.tensor([1, 2])},
    {"dropout_p": 0.5, "dropout_rng": torch.tensor([1])},
    {"dropout_p": 0.5, "dropout_rng": torch.tensor([1.0, 2.0])},
    {"cu_seqlens_k": CU},
    packed_changes(query=Q),
    packed_changes(cu_seqlens_k=None),
    packed_changes(cu_seqlens_k=CU[:2]),
    packed_changes(cu_seqlens_q=CU[:0], cu_seqlens_k=CU[:0]),
    packed_changes(cu_seqlens_q=CU.view(1, 3)),
    packed_changes(cu_seqlens_q=CU.long()),
    packed_changes(cu_seqlens_q=torch.tensor([0, 5, 3], dtype=torch.int32)),
    packed_changes(cu_seqlens_k=torch.tensor([0, 3, 2**30], dtype=torch.int32)),
    packed_changes(cu_seqlens_k=torch.tensor([-(2**31), 3, 7], dtype=torch.int32)),
    packed_changes(max_seqlen_q=3),
    packed_changes(max_seqlen_k=-1, cu_seqlens_q=CU[:1], cu_seqlens_k=CU[:1]),
    packed_changes(attn_mask=tensors(1, 1, 7, 7)),
]

RAW_DECODE = [
    {"key_cache": Q[:1], "value_cache": Q[:1]},
    {"value_cache": Q[:, :, :5]},
    {"cache_seqlens": CU},
    {"cache_seqlens": CU[:2].long()},
    {"cache_seqlens": torch.tensor([3, 8], dtype=torch.int32)},
    {"cache_seqlens": torch.tensor([3, -8], dtype=torch.int32)},
    {"page_table": PAGES.long()},
    {"page_table": PAGES[0]},
    {"page_table": PAGES[:1]},
    {"page_table": PAGES[:, :0]},
    {"page_table": PAGES + 1},
    {"page_table": PAGES - 1},
    {"page_table": PAGES, "value_cache": Q[:1]},
    {"page_table": PAGES, "key_cache": Q[:, :, :0], "value_cache": Q[:, :, :0]},
]


@needs_native
@pytest.mark.parametrize("index", range(len(RAW)))
def test_raw_forward_refuses(index):
    with pytest.raises((RuntimeError, ValueError), match="attention"):
        torch.ops.fastlayers.attention_forward(**raw_arguments(**RAW[index]))


@needs_native
@pytest.mark.parametrize("index", range(len(RAW_DECODE)))
def test_raw_decode_refuses(index):
    torch.ops.fastlayers.attention_decode(**raw_decode_arguments(page_table=PAGES))
    with pytest.raises((RuntimeError, ValueError), match="attention"):
        torch.ops.fastlayers.attention_decode(**raw_decode_arguments(**RAW_DECODE[index]))


@needs_native
@pytest.mark.parametrize(
    "changes",
    [
        {"grad_out": Q[:, :, :5]},
        {"grad_out": Q.half()},
        {"out": Q[:1]},
        {"lse": tensors(2, 4, 6)},
        {"lse": tensors(2, 4, 7).double()},
        {"grad_lse": tensors(2, 4, 6)},
        {"mask_gradient": True},
        {"mask_gradient": True, "attn_mask": torch.ones(1, 1, 7, 7, dtype=torch.bool)},
        {"sinks_gradient": True},
        {"key": tensors(2, 4, 7, 9)},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_raw_backward_refuses(changes):
    arguments = raw_arguments()
    arguments |= {"grad_out": Q, "grad_lse": None, "out": Q, "lse": tensors(2, 4, 7)}
    arguments |= {"mask_gradient": False, "sinks_gradient": False}
    torch.ops.fastlayers.attention_backward(**arguments)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError, TypeError)):
        torch.ops.fastlayers.attention_backward(**{**arguments, **changes})


# Registration.


def registered_calls():
    query, key, value = qkv(torch.float32, heads_k=2, seqlen_q=9, seqlen_k=12, head_dim=8, head_dim_v=5)
    leaves = {"query": query.transpose(1, 2).contiguous().transpose(1, 2), "key": key, "value": value}
    everything = {"attn_mask": randn(2, 1, 9, 12), "alibi_slopes": tensors(4), "sinks": randn(4)}
    everything |= {
        "dropout_rng": torch.tensor([3, 4]),
        "dropout_p": 0.5,
        "window_left": 6,
        "softcap": 3.0,
        "is_causal": True,
    }
    rows = dict(zip(("query", "key", "value"), (randn(7, 4, 8), randn(7, 2, 8), randn(7, 2, 6))))
    return {
        "plain": leaves,
        "everything": {**leaves, **everything},
        "packed": packed_changes(**rows),
    }


@needs_native
@pytest.mark.parametrize("name", ["plain", "everything", "packed"])
def test_opcheck(name):
    arguments = raw_arguments(**registered_calls()[name])
    for differentiable in ("query", "key", "value", "attn_mask", "sinks"):
        if arguments[differentiable] is not None:
            arguments[differentiable].requires_grad_()
    opcheck(torch.ops.fastlayers.attention_forward, tuple(arguments.values()))


@needs_native
@pytest.mark.parametrize("paged", [False, True])
def test_opcheck_decode(paged):
    query, key, value = qkv(torch.float32, heads_k=2, seqlen_q=9, seqlen_k=12, head_dim=8, head_dim_v=5)
    arguments = {"query": query.transpose(1, 2).contiguous().transpose(1, 2), "key_cache": key, "value_cache": value}
    arguments |= {"cache_seqlens": torch.tensor([3, 12], dtype=torch.int32), "sinks": randn(4), "window_left": 6}
    arguments |= {"page_table": PAGES.flip(0)} if paged else {}
    opcheck(torch.ops.fastlayers.attention_decode, tuple(raw_decode_arguments(**arguments).values()))
    arguments["query"].requires_grad_()
    with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
        torch.ops.fastlayers.attention_decode(**raw_decode_arguments(**arguments))


@needs_native
@pytest.mark.parametrize("name", ["everything", "packed"])
def test_opcheck_backward(name):
    arguments = raw_arguments(**registered_calls()[name])
    out, lse = torch.ops.fastlayers.attention_forward(**arguments)
    wanted = arguments["attn_mask"] is not None
    upstream = (randn(*out.shape), randn(*lse.shape), out, lse)
    opcheck(torch.ops.fastlayers.attention_backward, (*upstream, *arguments.values(), wanted, wanted))


@on_backends
def test_double_backward(backend):
    query, key, value = (tensor.requires_grad_() for tensor in qkv(torch.float32, seqlen_q=7))
    (grad,) = torch.autograd.grad(
        ops.attention(query, key, value, backend=backend).sin().sum(), query, create_graph=True
    )
    if backend == "reference":
        torch.autograd.grad(grad.sum(), query)
    else:
        with pytest.raises(RuntimeError, match="attention is differentiable once"):
            torch.autograd.grad(grad.sum(), query)


@on_backends
def test_gradients_only_where_wanted(backend):
    query, key, value = qkv(torch.float32, seqlen_q=7)
    assert not ops.attention(query, key, value, backend=backend).requires_grad
    mask = randn(1, 4, 7, 7).requires_grad_()
    out, lse = ops.attention(query, key, value, mask, return_lse=True, backend=backend)
    (from_out,) = torch.autograd.grad(out.sum(), mask, retain_graph=True)
    (from_lse,) = torch.autograd.grad(lse.sum(), mask)
    assert from_out.shape == mask.shape and from_lse.sum().item() == pytest.approx(2 * 4 * 7, rel=1e-5)
    half_mask = mask.detach().bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(
        ops.attention(query, key, value, half_mask, backend=backend).square().sum(), half_mask
    )
    assert grad.dtype == torch.bfloat16


@on_backends
def test_the_arguments_are_left_alone(backend):
    query, key, value = (tensor.requires_grad_() for tensor in qkv(torch.float32, seqlen_q=33))
    mask, sinks, rng = randn(33, 33), randn(4), torch.tensor([1, 2])
    before = pickle.dumps([query, key, value, mask, sinks, rng])
    out = ops.attention(query, key, value, mask, 0.5, sinks=sinks, dropout_rng=rng, backend=backend)
    torch.autograd.grad(out.sum(), (query, key, value))
    assert pickle.dumps([query, key, value, mask, sinks, rng]) == before


# torch.compile and autocast.


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@on_backends
def test_compile(backend, compiler):
    """The same bits as eager, forward and backward, with every option; one graph."""

    def function(query, key, value, attn_mask, sinks, rng):
        options = {"is_causal": True, "window": (20, None), "softcap": 4.0, "causal_alignment": "bottom_right"}
        return ops.attention(
            *(query * 1, key, value, attn_mask, 0.3),
            **options,
            enable_gqa=True,
            sinks=sinks,
            dropout_rng=rng,
            return_lse=True,
            backend=backend,
        )

    arguments = [t.requires_grad_() for t in (*qkv(torch.float32, heads_k=2), randn(4, 65, 65), randn(4))]
    rng = torch.tensor([5, 6])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        out, lse = call(*arguments, rng)
        results.append(
            [out, lse, *torch.autograd.grad([out, lse], arguments, [torch.ones_like(out), torch.ones_like(lse)])]
        )
    assert all(torch.equal(eager, traced) for eager, traced in zip(*results))


@needs_native
def test_compile_with_inductor_and_dynamic_shapes(compiler):
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("torch's inductor finds no C++ compiler")

    def function(query, key, value):
        out = ops.attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True)
        return out.transpose(1, 2).flatten(2) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for seqlen in (33, 65):
        leaves = [randn(2, seqlen, 4, 16, seed=seed).requires_grad_() for seed in range(3)]
        wanted, got = function(*leaves), compiled(*leaves)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        upstream = randn(*wanted.shape)
        for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.manual_seed(1)
    noisy = torch.compile(lambda *args: ops.attention(*args, dropout_p=0.5), fullgraph=True)
    assert noisy(*(randn(2, 4, 33, 16) for _ in range(3))).count_nonzero() > 0


@on_backends
def test_compile_varlen_and_decode(backend, compiler):
    varlen = torch.compile(ops.varlen_attention, fullgraph=True, backend="aot_eager")
    starts, cache, pages = placed(CU), placed(Q), placed(PAGES)
    arguments = [t.requires_grad_() for t in (randn(7, 4, 8, seed=1), randn(7, 4, 8, seed=2), randn(7, 4, 8, seed=3))]
    results = []
    for function in (ops.varlen_attention, varlen):
        out = function(*arguments, starts, starts, 4, 4, is_causal=True, backend=backend)
        results.append([out, *torch.autograd.grad(out.sin().sum(), arguments)])
    assert all(torch.equal(eager, traced) for eager, traced in zip(*results))
    decode = torch.compile(ops.decode_attention, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    with torch.no_grad():
        query = randn(2, 4, 1, 8)
        wanted = ops.decode_attention(query, cache + 1, cache + 2, lengths, backend=backend)
        assert torch.equal(decode(query, cache + 1, cache + 2, lengths, backend=backend), wanted)
        assert torch.equal(decode(query, cache + 1, cache + 2, lengths, page_table=pages, backend=backend), wanted)


@needs_native
def test_compiled_calls_check_the_values_too(compiler):
    varlen = torch.compile(ops.varlen_attention, fullgraph=True, backend="aot_eager")
    rows = tensors(7, 4, 8)
    for bad in ([0, 5, 3], [0, 3, 9]):
        with pytest.raises(ValueError, match="cu_seqlens_q"):
            varlen(rows, rows, rows, torch.tensor(bad, dtype=torch.int32), CU, 4, 4)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])
def test_autocast(dtype, backend):
    """As torch's own function: the inputs in the autocast dtype, gradients in their own."""
    query, key, value = (tensor.requires_grad_() for tensor in qkv(torch.float32, seqlen_q=33))
    mask = randn(33, 33).requires_grad_()
    with torch.autocast(query.device.type, dtype):
        out, lse = ops.attention(query, key.to(dtype), value, mask, return_lse=True, backend=backend)
        decoded = ops.decode_attention(
            *(tensor.detach() for tensor in (query, key, value)),
            torch.tensor([33, 3], dtype=torch.int32),
            backend=backend,
        )
    assert (out.dtype, lse.dtype, decoded.dtype) == (dtype, torch.float32, dtype)
    wanted = ops.attention(*(tensor.to(dtype) for tensor in (query, key, value)), mask, backend=backend)
    assert torch.equal(out, wanted)
    grads = torch.autograd.grad(out.sum(), (query, key, value, mask))
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_meta_tensors_give_shapes():
    query, key, value = (tensor.to("meta") for tensor in qkv(torch.float32, heads_k=2, head_dim_v=16))
    out, lse = ops.attention(query, key, value, enable_gqa=True, return_lse=True)
    assert out.is_meta and out.shape == (2, 4, 65, 16) and lse.shape == (2, 4, 65)
