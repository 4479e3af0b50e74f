"""Attention of the newest tokens over a KV cache, whole or in pages."""

import torch

from fastlayers import backends, reference
from fastlayers.ops._autograd import register_autograd, register_fake
from fastlayers.ops._checks import check_beside, check_tensor
from fastlayers.ops.attention import (
    _allocate_like,
    _check_heads,
    _check_inputs,
    _check_lengths,
    _check_options,
    _check_tensors,
    _cpu_reason,
    _cuda_reason,
    _facts_of,
    _tensors,
    _triton_reason,
)


def decode_attention(
    query,
    key_cache,
    value_cache,
    cache_seqlens,
    is_causal=True,
    scale=None,
    enable_gqa=False,
    *,
    page_table=None,
    window=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    return_lse=False,
    backend=None,
):
    """Attention of the newest tokens over the filled part of a KV cache; no gradient, the cache is not changed.

    query:  (B, Hq, Sq, D), the last Sq tokens of each sequence
    key_cache: (B, Hk, Smax, D), value_cache: (B, Hk, Smax, Dv), the newest tokens already in place
    cache_seqlens: (B,) int32, how many keys of each sequence are filled; what lies behind them is not read
    page_table: (B, pages of a sequence) int32: the caches are (pages, Hk, page_size, D) and (pages, Hk, page_size, Dv),
            and key j of sequence b is row j % page_size of page page_table[b, j // page_size]. Sequences may share
            pages; entries behind a sequence's last page in use are not read. Lengths and pages are checked on the CPU;
            on a GPU they are not looked at, since that would wait for it
    is_causal: the newest tokens do not see those after them; always aligned "bottom_right", as is `window`
    returns (B, Hq, Sq, Dv); with return_lse also (B, Hq, Sq), float32. The other arguments as in attention
    source  pages: Kwon et al. 2023, "PagedAttention", arXiv:2309.06180; split keys: Dao et al. 2023, "Flash-Decoding"
    """
    op = "decode_attention"
    query, key, value = _check_inputs(op, query, key_cache=key_cache, value_cache=value_cache)
    _check_caches(op, query, key, value, page_table)
    _check_heads(op, query, key, value, enable_gqa)
    if key.shape[2] != value.shape[2]:
        what = "seqlen" if page_table is None else "page_size"
        raise ValueError(f"{op}: key_cache has {what} {key.shape[2]}, value_cache has {value.shape[2]}")
    _check_lengths(op, "cache_seqlens", cache_seqlens, query, query.shape[0])
    options = _check_options(op, query, is_causal, scale, window, softcap)
    tensors = _check_tensors(op, query, query.shape[0], alibi_slopes, sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, *tensors)):
        raise ValueError(f"{op} has no gradient: call it under torch.no_grad(), or use attention")
    chosen = backends.choose(op, _facts_of(query, key, value, *tensors), backend)
    arguments = (query, key, value, cache_seqlens, page_table, *tensors, is_causal, *options)
    if chosen == "reference":
        _check_values(op, key, cache_seqlens, page_table)
        out, lse = reference.attention_decode(*arguments)
    else:
        out, lse = backends.operators(chosen).attention_decode(*arguments)
    return (out, lse) if return_lse else out


def _check_caches(op, query, key, value, page_table):
    """Four dimensions, and one batch, or a page table for it."""
    paged = page_table is not None
    batches = key.shape[:1] == value.shape[:1] and (paged or query.shape[:1] == key.shape[:1])
    if not query.dim() == key.dim() == value.dim() == 4 or not batches:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        caches = ", caches (pages, heads, page_size, head_dim)" if paged else ""
        raise ValueError(
            f"{op}: query, key_cache and value_cache have to be (B, heads, seqlen, head_dim){caches}, got {shapes}"
        )
    if not paged:
        return
    check_tensor(op, "page_table", page_table)
    if page_table.dtype != torch.int32:
        raise TypeError(f"{op}: page_table has to be int32, got {page_table.dtype}")
    check_beside(op, "page_table", page_table, "query", query)
    if page_table.dim() != 2 or page_table.shape[0] != query.shape[0]:
        wanted = f"({query.shape[0]}, pages of a sequence)"
        raise ValueError(f"{op}: page_table has to be {wanted}, got {tuple(page_table.shape)}")
    if key.shape[2] == 0:
        raise ValueError(f"{op}: pages have to have a row at least, got page_size 0")


def _check_values(op, key, cache_seqlens, page_table):
    """What the compiled kernels check themselves. Not while compiling and not on a GPU, where reading would wait."""
    if key.device.type != "cpu" or torch.compiler.is_compiling():
        return
    pages, _, page_size, _ = key.shape
    capacity = page_size if page_table is None else page_table.shape[1] * page_size
    for b, seqlen in enumerate(cache_seqlens.tolist()):
        if not 0 <= seqlen <= capacity:
            raise ValueError(f"{op}: cache_seqlens has to be between 0 and {capacity}, got {seqlen}")
        if page_table is None:
            continue
        for page in page_table[b, : -(-seqlen // page_size)].tolist():
            if not 0 <= page < pages:
                raise ValueError(f"{op}: page_table names page {page} of sequence {b}, there are {pages} pages")


def _decode_facts(query, key_cache, value_cache, *args, **kwargs):
    inputs = _check_inputs("decode_attention", query, key_cache=key_cache, value_cache=value_cache)
    return _facts_of(*inputs, *_tensors(*args, *kwargs.values()))


backends.register("decode_attention", facts=_decode_facts, cpu=_cpu_reason, cuda=_cuda_reason, triton=_triton_reason)


def _decode_fake(query, key_cache, value_cache, *arguments):
    return _allocate_like(query, value_cache.shape[-1]), query.new_empty(query.shape[:3], dtype=torch.float32)


def _no_gradient(ctx, *arguments, **keywords):
    raise RuntimeError("decode_attention has no gradient")


register_fake("attention_decode", _decode_fake)
register_autograd("attention_decode", _no_gradient, _no_gradient)
