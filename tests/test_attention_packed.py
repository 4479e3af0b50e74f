"""varlen_attention: against the reference, and against attention on each sequence by itself."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastlayers import ops
from tests.attention_cases import DTYPES, check, randn, run
from tests.backends import BACKENDS, INTERPRETED, dtypes_of

pytestmark = pytest.mark.tensor_cores
on_varlen = pytest.mark.parametrize("backend", BACKENDS["varlen_attention"])
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.02])
EXAMPLES = 20 if INTERPRETED else 60  # each takes the interpreter seconds
DROPOUT = {"dropout_p": 0.3, "dropout_rng": torch.tensor([2**40 + 1, 9])}


def starts(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed(dtype, lengths_q, lengths_k, heads_k=4, head_dim=32, head_dim_v=32, rest=0):
    """The tensors of a call; `rest` more rows lie behind the last sequence."""
    total_q, total_k = sum(lengths_q) + rest, sum(lengths_k) + rest
    return {
        "query": randn(total_q, 4, head_dim, dtype=dtype, seed=1),
        "key": randn(total_k, heads_k, head_dim, dtype=dtype, seed=2),
        "value": randn(total_k, heads_k, head_dim_v, dtype=dtype, seed=3),
        "cu_seqlens_q": starts(lengths_q),
        "cu_seqlens_k": starts(lengths_k),
    }


def longest(lengths_q, lengths_k):
    return {"max_seqlen_q": max(lengths_q, default=0), "max_seqlen_k": max(lengths_k, default=0)}


SAME = ((7, 1, 0, 65, 33), (7, 1, 0, 65, 33))
OTHER = ((7, 40, 0, 20, 1), (130, 5, 9, 0, 33))

VARLEN = {
    "plain": (SAME, {}, {}),
    "causal": (SAME, {}, {"is_causal": True}),
    "other": (OTHER, {}, {}),
    "other-causal": (OTHER, {}, {"is_causal": True}),
    "bottom-right": (OTHER, {}, {"is_causal": True, "causal_alignment": "bottom_right"}),
    "window": (SAME, {}, {"window": (5, 2)}),
    "window-bottom-right": (OTHER, {}, {"window": (5, 2), "causal_alignment": "bottom_right"}),
    "softcap": (OTHER, {}, {"softcap": 2.0, "scale": 0.3}),
    "alibi": (OTHER, {"alibi_slopes": SLOPES}, {"causal_alignment": "bottom_right"}),
    "alibi-per-sequence": (SAME, {"alibi_slopes": SLOPES * torch.arange(1, 6).view(5, 1)}, {}),
    "sinks": (OTHER, {"sinks": randn(4, seed=7)}, {"is_causal": True}),
    "dropout": (OTHER, {}, DROPOUT),
    "everything": (
        OTHER,
        {"alibi_slopes": SLOPES, "sinks": randn(4, seed=7)},
        {**DROPOUT, "is_causal": True, "window": (40, 0), "softcap": 5.0, "causal_alignment": "bottom_right"},
    ),
    "one": (((33,), (65,)), {}, {"is_causal": True}),
    "none": (((), ()), {}, {}),
}


@on_varlen
@on_dtypes
@pytest.mark.parametrize("name", VARLEN)
def test_varlen_options(name, dtype, backend):
    lengths, extra, options = VARLEN[name]
    for heads_k, rest in ((4, 0), (2, 3)):
        tensors = {**packed(dtype, *lengths, heads_k=heads_k, head_dim_v=24, rest=rest), **extra}
        shape = {**longest(*lengths), "enable_gqa": True}
        ours = check(ops.varlen_attention, tensors, backend, f"{name} {heads_k} {rest}", **shape, **options)
        if rest:
            assert all((ours[result][-rest:] == 0).all() for result in ("out", "dquery", "dkey", "dvalue"))
            assert (ours["lse"][:, -rest:] == float("-inf")).all()


@on_varlen
def test_varlen_is_attention_on_each_sequence(backend):
    tensors = packed(torch.float32, *OTHER)
    options = {"is_causal": True, "causal_alignment": "bottom_right", "return_lse": True, "backend": backend}
    out, lse = ops.varlen_attention(**tensors, **longest(*OTHER), **options)
    rows_q, rows_k = tensors["cu_seqlens_q"].tolist(), tensors["cu_seqlens_k"].tolist()
    for b in range(len(rows_q) - 1):
        part_q, part_k = slice(rows_q[b], rows_q[b + 1]), slice(rows_k[b], rows_k[b + 1])
        parts = (tensors["query"][part_q], tensors["key"][part_k], tensors["value"][part_k])
        wanted, wanted_lse = ops.attention(*(part.transpose(0, 1) for part in parts), **options)
        torch.testing.assert_close(out[part_q], wanted.transpose(0, 1))
        torch.testing.assert_close(lse[:, part_q], wanted_lse)


@on_varlen
def test_varlen_on_slices_of_one_packed_projection(backend):
    """(T, 3, H, D), as a fused qkv projection leaves it, and head-major memory."""
    lengths = (33, 2, 50)
    fused = randn(sum(lengths), 3, 4, 32)
    layouts = {
        "slices": fused.unbind(1),
        "head-major": [t.transpose(0, 1).contiguous().transpose(0, 1) for t in fused.unbind(1)],
    }
    for name, (query, key, value) in layouts.items():
        tensors = {"query": query, "key": key, "value": value, "cu_seqlens_q": starts(lengths)}
        tensors["cu_seqlens_k"] = tensors["cu_seqlens_q"]
        check(ops.varlen_attention, tensors, backend, name, **longest(lengths, lengths), is_causal=True)


@on_varlen
def test_varlen_max_seqlen_may_be_generous(backend):
    tensors = packed(torch.float32, *SAME)
    options = {**DROPOUT, "deterministic": True, "backend": backend}
    exact = run(ops.varlen_attention, tensors, {**longest(*SAME), **options})
    generous = run(ops.varlen_attention, tensors, {"max_seqlen_q": 300, "max_seqlen_k": 1000, **options})
    assert all(torch.equal(exact[name], generous[name]) for name in exact)


@on_varlen
def test_varlen_deterministic_is_bitwise_reproducible(backend):
    tensors = packed(dtypes_of(backend)[-1], *OTHER, heads_k=2)
    options = {**longest(*OTHER), **DROPOUT, "enable_gqa": True, "deterministic": True, "backend": backend}
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            runs.append(run(ops.varlen_attention, tensors, options))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[0][name], other[name]) for other in runs for name in other)


@on_varlen
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_varlen_call(data, dtype, backend):
    assume(dtype in dtypes_of(backend))
    length = st.sampled_from([0, 1, 5, 16, 33, 64, 65, 100])
    pairs = data.draw(st.lists(st.tuples(length, length), min_size=1, max_size=6))
    shortest = max(1, min(sum(q for q, _ in pairs), sum(k for _, k in pairs)))
    pairs *= -(-32 // shortest)  # the rule needs more than a handful of elements
    lengths_q, lengths_k = [q for q, _ in pairs], [k for _, k in pairs]
    sizes = {name: data.draw(st.integers(4, 72)) for name in ("head_dim", "head_dim_v")}
    tensors = packed(dtype, lengths_q, lengths_k, heads_k=data.draw(st.sampled_from([1, 2, 4])), **sizes)
    side = st.one_of(st.none(), st.integers(0, 70))
    options = {
        "is_causal": data.draw(st.booleans()),
        "causal_alignment": data.draw(st.sampled_from(["top_left", "bottom_right"])),
        "window": data.draw(st.one_of(st.none(), st.tuples(side, side))),
        **(DROPOUT if data.draw(st.booleans()) else {}),
    }
    with torch.set_grad_enabled(dtype != torch.float32 and backend == "cpu"):  # as in test_attention.test_any_call
        check(ops.varlen_attention, tensors, backend, **longest(lengths_q, lengths_k), enable_gqa=True, **options)
