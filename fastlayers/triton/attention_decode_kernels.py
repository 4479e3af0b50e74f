"""Decoding: a part of the keys per program, for all query heads of a key head at once; then the parts are put together.

A row is a pair of query head and token, the tokens of a head side by side, as (B, Hq, Sq) lies in memory.
"""

import triton
import triton.language as tl

from fastlayers.triton.arithmetic import dot, narrow
from fastlayers.triton.attention_forward import absorb, finish
from fastlayers.triton.attention_rules import exponential, scores_of


@triton.jit
def _load(x, places, used, first_column, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows that begin at these places; 0 where not used, since what lies there may be NaN."""
    columns = first_column + tl.arange(0, COLUMNS)
    return tl.load(x + places[:, None] + columns[None, :], mask=used[:, None] & (columns[None, :] < DIM), other=0.0)


@triton.jit
def _products(
    q,  # the first INNER columns
    query, q_places, inside, key, k_places, used,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k', as attention_rules.products_of."""
    total = tl.zeros((q_places.shape[0], k_places.shape[0]), tl.float32)
    if INNER >= COLUMNS:
        return dot(q, tl.trans(_load(key, k_places, used, 0, DIM, COLUMNS)), total, PRECISION)
    for column in range(0, DIM, INNER):
        x = _load(query, q_places, inside, column, DIM, INNER)
        total = dot(x, tl.trans(_load(key, k_places, used, column, DIM, INNER)), total, PRECISION)
    return total


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "begin_offset", "end_offset", "splits"])
def decode_kernel(
    query,  # (B, Hq, Sq, D)
    key, value,  # (B, Hk, Smax, D) or, with page_table, (pages, Hk, page_size, D)
    mask, alibi_slopes,
    cache_seqlens,  # (B,)
    page_table,  # (B, pages of a sequence) or None
    outs,  # (splits, B * Hq * Sq, Dv) float32, each part divided by its own sum
    lses,  # (splits, B * Hq * Sq) float32
    batch, heads_q, heads_k, seqlen_q, seqlen_k, begin_offset, end_offset,
    splits, page_size,
    scale, softcap,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ab, stride_pb,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """One program per (batch, key head, BLOCK_M rows of its query heads), split of their keys, and INNER columns."""
    group_rows = heads_q // heads_k * seqlen_q
    blocks = tl.cdiv(group_rows, BLOCK_M)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < group_rows
    bh_k = tl.program_id(0) // blocks
    b, h_k = (bh_k // heads_k).to(tl.int64), (bh_k % heads_k).to(tl.int64)
    heads, tokens = h_k * (heads_q // heads_k) + rows // seqlen_q, rows % seqlen_q
    used_keys = tl.load(cache_seqlens + b)
    diagonal = used_keys - seqlen_q
    place = seqlen_q, used_keys, diagonal, diagonal + begin_offset, diagonal + end_offset
    rules = scale, softcap, alibi_slopes, mask, 0, 0
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + b * stride_ab + heads, mask=inside, other=0.0)
        rules = scale, softcap, slopes[:, None], mask, 0, 0

    first = tl.maximum(place[3], 0) // BLOCK_N * BLOCK_N
    last = tl.minimum(seqlen_q - 1 + place[4], used_keys)
    part = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), splits), BLOCK_N) * BLOCK_N
    split = tl.program_id(1)
    begin = first + split * part
    column = tl.program_id(2) * INNER
    q_places = b * stride_qb + heads * stride_qh + tokens.to(tl.int64) * stride_qs
    q = _load(query, q_places, inside, 0, HEAD_DIM, min(BLOCK_D, INNER))
    key += h_k * stride_kh
    value += h_k * stride_vh
    COLUMNS: tl.constexpr = min(BLOCK_DV, INNER)
    total = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, tl.minimum(begin + part, last), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        used = keys < used_keys
        outer, inner = b, keys
        if page_table is not None:
            pages = tl.load(page_table + b * stride_pb + keys // page_size, mask=used, other=0)
            outer, inner = pages.to(tl.int64), keys % page_size
        inner = inner.to(tl.int64)
        k_places, v_places = outer * stride_kb + inner * stride_ks, outer * stride_vb + inner * stride_vs
        operands = q, query, q_places, inside, key, k_places, used
        products = _products(*operands, HEAD_DIM, BLOCK_D, INNER, PRECISION)
        v = _load(value, v_places, used, column, HEAD_DIM_V, COLUMNS)
        x, _ = scores_of(products, tokens[:, None], keys[None, :], place, rules, False)
        total, top, mass = absorb(total, top, mass, x, v, None, NATURAL, False, PRECISION)
    total, lse = finish(total, top, mass, None, 1.0, NATURAL)
    all_rows = (tl.full((), 0, tl.int64) + batch) * heads_q * seqlen_q
    row = split * all_rows + bh_k.to(tl.int64) * group_rows + rows
    if column == 0:
        tl.store(lses + row, lse, mask=inside)
    columns = column + tl.arange(0, COLUMNS)
    out_mask = inside[:, None] & (columns[None, :] < HEAD_DIM_V)
    tl.store(outs + row[:, None] * HEAD_DIM_V + columns[None, :], total, mask=out_mask)


@triton.jit(do_not_specialize=["rows", "seqlen_q", "splits"])
def combine_kernel(
    outs, lses, sinks,
    out,  # (B, Hq, Sq, Dv)
    lse,  # (B, Hq, Sq)
    rows,  # B * Hq * Sq
    heads_q, seqlen_q, splits,
    stride_ob, stride_oh, stride_os,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Each part weighted by its share of the softmax's denominator, the sink being one more; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, BLOCK_SPLITS)
    parts = tl.load(lses + numbers * rows.to(tl.int64) + row, mask=numbers < splits, other=float("-inf"))
    b, h, i = row // seqlen_q // heads_q, row // seqlen_q % heads_q, row % seqlen_q
    peak = tl.max(parts, 0)
    if sinks is not None:
        sink = tl.load(sinks + h)
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum(exponential(parts - peak, True, True), 0)
    if sinks is not None:
        mass += exponential(sink - peak, True, True)
    columns = tl.arange(0, BLOCK_DV)
    total = tl.zeros((BLOCK_DV,), tl.float32)
    for split in range(splits):
        at = split * rows.to(tl.int64) + row
        weight = exponential(tl.load(lses + at) - peak, True, True)
        total += weight * tl.load(outs + at * HEAD_DIM_V + columns, mask=columns < HEAD_DIM_V, other=0.0)
    tl.store(lse + row, tl.where(mass == 0.0, float("-inf"), peak + tl.log(mass)))
    out += b * stride_ob + h * stride_oh + i * stride_os
    total = total / tl.where(mass == 0.0, 1.0, mass)
    tl.store(out + columns, narrow(total, out.dtype.element_ty), mask=columns < HEAD_DIM_V)
