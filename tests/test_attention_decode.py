"""decode_attention: against the reference, and against attention on each sequence by itself."""

import pytest
import torch

from fastlayers import ops
from tests.attention_cases import DTYPES, check, generator, randn
from tests.backends import BACKENDS
from tests.numerics import assert_accurate

pytestmark = pytest.mark.tensor_cores
on_decode = pytest.mark.parametrize("backend", BACKENDS["decode_attention"])
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.02])


def cached(dtype, lengths, seqlen_q=1, capacity=300, heads_q=4, heads_k=2, head_dim=32, head_dim_v=32):
    """The tensors of a call; behind the filled part the cache holds NaN, which must not be read."""
    tensors = {
        "query": randn(len(lengths), heads_q, seqlen_q, head_dim, dtype=dtype, seed=1),
        "key_cache": randn(len(lengths), heads_k, capacity, head_dim, dtype=dtype, seed=2),
        "value_cache": randn(len(lengths), heads_k, capacity, head_dim_v, dtype=dtype, seed=3),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
    }
    for b, length in enumerate(lengths):
        tensors["key_cache"][b, :, length:] = float("nan")
        tensors["value_cache"][b, :, length:] = float("nan")
    return tensors


def check_decoding(tensors, backend, what, **options):
    with torch.no_grad():
        return check(ops.decode_attention, tensors, backend, what, **options)


DECODE = {
    "plain": ({}, {}),
    "not-causal": ({}, {"is_causal": False}),
    "window": ({}, {"window": (16, 0)}),
    "window-open": ({}, {"window": (None, 2), "is_causal": False}),
    "softcap": ({}, {"softcap": 2.0, "scale": 0.4}),
    "alibi": ({"alibi_slopes": SLOPES}, {}),
    "alibi-batch": ({"alibi_slopes": SLOPES * torch.arange(1, 6).view(5, 1)}, {}),
    "sinks": ({"sinks": randn(4, seed=7)}, {}),
    "everything": ({"alibi_slopes": SLOPES, "sinks": randn(4, seed=7)}, {"window": (100, None), "softcap": 5.0}),
}


@on_decode
@on_dtypes
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("name", DECODE)
def test_decode_options(name, seqlen_q, dtype, backend):
    extra, options = DECODE[name]
    tensors = {**cached(dtype, [300, 1, 0, 129, 3], seqlen_q, head_dim_v=40), **extra}
    ours = check_decoding(tensors, backend, name, enable_gqa=True, **options)
    assert (ours["out"][2] == 0).all()


@on_decode
@on_dtypes
@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_decode_long_caches(heads_k, dtype, backend):
    """One sequence, so that the work has to be split over the keys."""
    for seqlen_q, length in ((1, 2000), (1, 2048), (3, 1250)):
        tensors = cached(
            dtype, [length], seqlen_q, capacity=2048, heads_q=16, heads_k=heads_k, head_dim=64, head_dim_v=64
        )
        check_decoding(tensors, backend, f"{seqlen_q} {length}", enable_gqa=True)


@on_decode
def test_decode_layouts(backend):
    """The (B, Smax, H, D) cache of other libraries, and one layer's slice of a cache of several."""
    tensors = cached(torch.float16, [50, 7], seqlen_q=2)
    stacked = torch.stack([tensors["key_cache"], tensors["value_cache"]], 2)
    layouts = {
        "sequence-major": [
            tensors[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("key_cache", "value_cache")
        ],
        "stacked": stacked.unbind(2),
    }
    for name, (key, value) in layouts.items():
        check_decoding({**tensors, "key_cache": key, "value_cache": value}, backend, name, enable_gqa=True)


@on_decode
def test_decode_is_the_last_rows_of_attention(backend):
    tensors = cached(torch.float16, [200, 37], seqlen_q=4)
    out = ops.decode_attention(**tensors, enable_gqa=True, backend=backend)
    for b, length in enumerate((200, 37)):
        key, value = (tensors[name][b : b + 1, :, :length] for name in ("key_cache", "value_cache"))
        before = randn(1, 4, length - 4, 32, dtype=torch.float16, seed=8)
        whole = (torch.cat([before, tensors["query"][b : b + 1]], 2), key, value)
        options = {"is_causal": True, "enable_gqa": True, "backend": "reference"}
        exact = ops.attention(*(x.double() for x in whole), **options)[0, :, -4:]
        assert_accurate(out[b], exact, ops.attention(*whole, **options)[0, :, -4:], f"{length} keys")


@on_decode
@on_dtypes
@pytest.mark.parametrize(
    "heads_q, heads_k, seqlen_q", [(8, 1, 8), (6, 2, 3), (6, 2, 17), (4, 1, 33), (2, 2, 64), (2, 2, 65), (4, 2, 80)]
)
def test_decode_several_tokens(heads_q, heads_k, seqlen_q, dtype, backend):
    """Up to 64 rows of a KV head, more, and as many tokens as in a prefill; some have more tokens than keys."""
    tensors = cached(dtype, [150, 40], seqlen_q, capacity=150, heads_q=heads_q, heads_k=heads_k)
    check_decoding(tensors, backend, "causal", enable_gqa=True)
    check_decoding(tensors, backend, "window", enable_gqa=True, window=(20, 3), is_causal=False)


@on_decode
@on_dtypes
@pytest.mark.parametrize("head_dim", [1, 7, 33, 64, 100, 128, 129, 200, 256])
def test_decode_head_dims(head_dim, dtype, backend):
    for head_dim_v, seqlen_q in ((head_dim, 1), (72, 9), (24, 17)):
        sizes = {"heads_q": 8, "head_dim": head_dim, "head_dim_v": head_dim_v}
        tensors = cached(dtype, [129, 77, 130], seqlen_q, capacity=130, **sizes)
        check_decoding(tensors, backend, f"{head_dim_v} {seqlen_q}", enable_gqa=True)


@on_decode
@on_dtypes
def test_decode_rows_that_are_not_aligned(dtype, backend):
    odd = randn(2, 2, 2, 70, 33, dtype=dtype, seed=2)
    for name, (key, value) in {"33, from the second on": odd[..., 1:], "33": odd[..., :32]}.items():
        tensors = cached(dtype, [70, 9], 3) | {"key_cache": key, "value_cache": value}
        tensors["query"] = randn(2, 4, 3, 33, dtype=dtype, seed=3)[..., 1:]
        check_decoding(tensors, backend, name, enable_gqa=True)


@on_decode
@on_dtypes
def test_decode_extreme_scores(dtype, backend):
    """Maxima that move far from key to key, across warps and parts, and a row of NaN."""
    tensors = cached(dtype, [1200], 2, capacity=1200, heads_q=8)
    key, top = tensors["key_cache"], 4 if (backend, dtype) == ("cpu", torch.float32) else 9
    for ramp in (torch.linspace(0, top, 1200), torch.linspace(top, 0, 1200), top * (torch.arange(1200) % 397 == 396)):
        check_decoding(
            tensors | {"key_cache": (key.float() * ramp[:, None]).to(dtype)}, backend, "ramp", enable_gqa=True
        )
    tensors["query"][0, 5, 1, 3] = torch.nan
    out = ops.decode_attention(**tensors, enable_gqa=True, backend=backend)
    assert out[0, 5, 1].isnan().all() and out.isnan().sum() == out.shape[-1]


@on_decode
@on_dtypes
def test_decode_long_caches_through_a_window(dtype, backend):
    tensors = cached(dtype, [3000, 1800], 1, capacity=3000, heads_q=8, heads_k=1) | {"sinks": randn(8, seed=7)}
    check_decoding(tensors, backend, "window", enable_gqa=True, window=(1500, None))


@on_decode
@on_dtypes
def test_decode_is_deterministic(dtype, backend):
    tensors = cached(dtype, [1000, 3], 3, capacity=1000)
    results = [ops.decode_attention(**tensors, enable_gqa=True, backend=backend) for _ in range(2)]
    assert torch.equal(*results)


# A cache in pages.


def in_pages(tensors, page_size, shared=0, spare=3):
    """The same call with its cache in shuffled pages, the first `shared` of each sequence being one and the same.

    Behind the last page in use the table holds -1; the rows there and the `spare` pages hold NaN.
    """
    lengths = tensors["cache_seqlens"].tolist()
    whole = tensors["key_cache"], tensors["value_cache"]
    for x in whole:
        x[:, :, : shared * page_size] = x[:1, :, : shared * page_size].clone()
    per_sequence = -(-whole[0].shape[2] // page_size)
    table = torch.full((len(lengths), per_sequence), -1, dtype=torch.int32)
    numbers = torch.randperm(len(lengths) * per_sequence + spare, generator=generator(9)).tolist()
    caches = [x.new_full((len(numbers), x.shape[1], page_size, x.shape[3]), torch.nan) for x in whole]
    for b, length in enumerate(lengths):
        for i in range(-(-length // page_size)):
            table[b, i] = table[0, i] if b and i < shared else numbers.pop()
            rows = slice(i * page_size, min((i + 1) * page_size, whole[0].shape[2]))
            for cache, x in zip(caches, whole):
                cache[table[b, i], :, : rows.stop - rows.start] = x[b, :, rows]
    return {**tensors, "key_cache": caches[0], "value_cache": caches[1], "page_table": table}


@on_decode
@on_dtypes
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_decode_pages(page_size, dtype, backend):
    for seqlen_q, lengths in ((1, [130, 1, 0, 77]), (3, [3, 64, 65])):
        tensors = cached(dtype, lengths, seqlen_q, capacity=135, head_dim=40, head_dim_v=64)
        paged = in_pages(tensors, page_size)
        ours = check_decoding(paged, backend, f"{seqlen_q} {lengths}", enable_gqa=True, window=(100, None))
        whole = check_decoding(tensors, backend, "whole", enable_gqa=True, window=(100, None))
        assert all(torch.equal(ours[name], whole[name]) for name in whole)


@on_decode
@on_dtypes
def test_decode_pages_that_sequences_share(dtype, backend):
    tensors = cached(dtype, [100, 70, 64], seqlen_q=2, capacity=112)
    check_decoding(in_pages(tensors, 16, shared=4), backend, "shared", enable_gqa=True)


@on_decode
def test_decode_pages_of_every_layout(backend):
    """Heads inside the page, keys and values of a page side by side, and a table that is a slice."""
    tensors = in_pages(cached(torch.float16, [100, 37]), 8)
    key, value, table = tensors["key_cache"], tensors["value_cache"], tensors["page_table"]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]
    wide = torch.cat([table, table], 1)[:, : table.shape[1]]
    for name, caches in (("turned", turned), ("beside", torch.stack([key, value], 1).unbind(1))):
        call = {**tensors, "key_cache": caches[0], "value_cache": caches[1], "page_table": wide}
        check_decoding(call, backend, name, enable_gqa=True)


@on_decode
def test_decode_without_pages(backend):
    tensors = in_pages(cached(torch.float16, [0, 0]), 8)
    for pages, columns in ((0, 38), (5, 0), (0, 0)):
        empty = {name: tensors[name][:pages] for name in ("key_cache", "value_cache")}
        call = {**tensors, **empty, "page_table": tensors["page_table"][:, :columns]}
        out, lse = ops.decode_attention(**call, enable_gqa=True, return_lse=True, backend=backend)
        assert not out.any() and (lse == -torch.inf).all()
