"""Attention in plain torch: scores, what is hidden, softmax, dropout, weighted sum of the values."""

import contextlib

import torch

from fastlayers.reference.philox import dropout_keep, dropout_scale


def attention(
    query,
    key,
    value,
    attn_mask=None,
    alibi_slopes=None,
    sinks=None,
    dropout_rng=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=0,
    max_seqlen_k=0,
    dropout_p=0.0,
    is_causal=False,
    bottom_right=False,
    scale=1.0,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    deterministic=False,
):
    """(out, lse) as csrc/attention/params.h defines them; the argument list that every backend takes.

    query, key, value: (B, Hq, Sq, D), (B, Hk, Sk, D), (B, Hk, Sk, Dv); with cu_seqlens (T, H, D) each
    attn_mask: bool or floating, four dimensions, each 1 or that of (B, Hq, Sq, Sk)
    max_seqlen_q, max_seqlen_k: read with cu_seqlens only; window_left, window_right: -1 is unlimited
    The products are in the dtype of the query, the softmax in float32 (float64 for a float64 query).
    """
    options = (attn_mask, alibi_slopes, sinks, dropout_rng, dropout_p, is_causal, bottom_right, scale)
    options += (window_left, window_right, softcap)
    with _without_autocast(query.device.type):
        if cu_seqlens_q is None:
            return _attend(query, key, value, None, None, *options)
        padded_query = _pad(query, cu_seqlens_q, max_seqlen_q)
        padded_key, padded_value = (_pad(tensor, cu_seqlens_k, max_seqlen_k) for tensor in (key, value))
        lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        out, lse = _attend(padded_query, padded_key, padded_value, lengths_q, lengths_k, *options)
        total = query.shape[0]
        out = _unpad(out, cu_seqlens_q, total, 0.0)
        return out, _unpad(lse.unsqueeze(-1), cu_seqlens_q, total, float("-inf")).squeeze(-1).t()


def attention_decode(
    query,
    key_cache,
    value_cache,
    cache_seqlens,
    page_table=None,
    alibi_slopes=None,
    sinks=None,
    is_causal=True,
    scale=1.0,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
):
    """(out, lse) of the newest tokens over the filled part of a cache, aligned bottom right.

    query: (B, Hq, Sq, D); key_cache, value_cache: (B, Hk, Smax, D or Dv); cache_seqlens: (B,), keys in use
    page_table: (B, pages of a sequence): the caches are (pages, Hk, page_size, D or Dv), and key j of sequence b is
            row j % page_size of page page_table[b, j // page_size]
    """
    if page_table is not None:
        used = torch.arange(page_table.shape[1], device=query.device) * key_cache.shape[2] < cache_seqlens.unsqueeze(1)
        page_table = page_table.masked_fill(~used, 0)  # behind the end it may hold anything
        key_cache, value_cache = (_gather_pages(cache, page_table) for cache in (key_cache, value_cache))
    with _without_autocast(query.device.type):
        options = (None, alibi_slopes, sinks, None, 0.0, is_causal, True, scale, window_left, window_right, softcap)
        return _attend(query, key_cache, value_cache, None, cache_seqlens, *options)


def _gather_pages(cache, page_table):
    """(pages, H, page_size, D) to (B, H, pages of a sequence * page_size, D)."""
    if cache.shape[0] == 0:  # there is no page 0 for sequences without keys
        cache = cache.new_zeros(1, *cache.shape[1:])
    return cache[page_table].transpose(1, 2).flatten(2, 3)


def _without_autocast(device_type):
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _attend(
    query,
    key,
    value,
    lengths_q,  # (B,) rows in use of each sequence, or None: all of them
    lengths_k,
    attn_mask,
    alibi_slopes,
    sinks,
    dropout_rng,
    dropout_p,
    is_causal,
    bottom_right,
    scale,
    window_left,
    window_right,
    softcap,
):
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    if key.shape[1] != heads:
        key, value = (tensor.repeat_interleave(heads // key.shape[1], 1) for tensor in (key, value))
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32

    scores = (query @ key.transpose(-2, -1)).to(statistics) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = _distance(seqlen_q, seqlen_k, lengths_q, lengths_k, bottom_right, query.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(statistics)[..., None, None] * distance.abs()
    hidden = _hidden(distance, is_causal, window_left, window_right)
    if lengths_q is not None:
        hidden = hidden | _behind(lengths_q, seqlen_q)
    if lengths_k is not None:
        behind = _behind(lengths_k, seqlen_k)
        hidden = hidden | behind.mT
        value = value.masked_fill(behind, 0.0)  # whatever the cache holds there, NaN included, is not used
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = hidden | ~attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.to(statistics)

    probabilities, lse = _softmax(scores.masked_fill(hidden, float("-inf")), sinks)
    if dropout_rng is not None:
        keep = dropout_keep(dropout_rng, dropout_p, batch, heads, seqlen_q, seqlen_k)
        probabilities = probabilities.masked_fill(~keep, 0.0) * dropout_scale(dropout_p)
    return probabilities.to(value.dtype) @ value, lse


def _distance(seqlen_q, seqlen_k, lengths_q, lengths_k, bottom_right, device):
    """i + diagonal - j, (Sq, Sk), or (B, 1, Sq, Sk) where the sequences differ in length."""
    i = torch.arange(seqlen_q, device=device).view(-1, 1)
    j = torch.arange(seqlen_k, device=device)
    if not bottom_right:
        return i - j
    length_q = seqlen_q if lengths_q is None else lengths_q.view(-1, 1, 1, 1)
    length_k = seqlen_k if lengths_k is None else lengths_k.view(-1, 1, 1, 1)
    return i - j + (length_k - length_q)


def _hidden(distance, is_causal, window_left, window_right):
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if is_causal:
        hidden = hidden | (distance < 0)
    if window_left >= 0:
        hidden = hidden | (distance > window_left)
    if window_right >= 0:
        hidden = hidden | (distance < -window_right)
    return hidden


def _behind(lengths, seqlen):
    """Which rows lie behind the end of their sequence, (B, 1, seqlen, 1)."""
    return (torch.arange(seqlen, device=lengths.device) >= lengths.unsqueeze(1))[:, None, :, None]


def _softmax(scores, sinks):
    """Probabilities over the last dimension, and lse; 0 and -inf (or the sink) for a row of -inf alone."""
    sink = None if sinks is None else sinks.to(scores.dtype).view(1, -1, 1, 1)
    rows = (*scores.shape[:-1], 1)
    floor = scores.new_full(rows, float("-inf")) if sink is None else sink.expand(rows)
    top = torch.cat([scores, floor], -1).detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return weights / total, (top + torch.log(total)).masked_fill(empty, float("-inf")).squeeze(-1)


def _positions(cu_seqlens, total):
    """Of each packed row: its sequence and its place in it; rows behind the last sequence get sequence B."""
    row = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True)
    return sequence, row - cu_seqlens[sequence]


def _pad(tensor, cu_seqlens, max_seqlen):
    """(T, H, D) to (B, H, max_seqlen, D), zeros behind the end of each sequence."""
    place = torch.arange(max_seqlen, device=tensor.device)
    used = place < cu_seqlens.diff().unsqueeze(1)
    row = torch.where(used, cu_seqlens[:-1].unsqueeze(1) + place, tensor.shape[0])
    return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])[row].transpose(1, 2)


def _unpad(tensor, cu_seqlens, total, fill):
    """(B, H, max_seqlen, D) to (T, H, D), `fill` behind the last sequence."""
    batch, _, max_seqlen, _ = tensor.shape
    sequence, place = _positions(cu_seqlens, total)
    row = torch.where(sequence < batch, sequence * max_seqlen + place, batch * max_seqlen)
    rows = tensor.transpose(1, 2).flatten(0, 1)
    return torch.cat([rows, rows.new_full((1, *rows.shape[1:]), fill)])[row]
