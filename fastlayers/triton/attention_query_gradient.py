"""The gradient of attention's queries, and what the backward's kernels share.

Scores are computed again, and there are no atomics, so that every run gives the same bits. With p = exp(s - lse),
dp = dropout(do . v) and delta = do . o - dlse, the gradient of a score is p (dp - delta). query_gradient_kernel comes
first: it leaves delta, and share, for the others. share corrects p for the rounding of lse, which shows in float32, and
where an additive mask makes lse large; None elsewhere.
"""

import triton
import triton.language as tl

from fastlayers.triton.arithmetic import dot, narrow
from fastlayers.triton.attention_rules import (
    LN2,
    LOG2E,
    described_heads,
    dropout_keep,
    edge_block,
    exponential,
    lines_from,
    load_rows,
    place_of,
    products_of,
    scores_of,
    split_keys,
    store_rows,
)


@triton.jit
def load_lse(lse, rows, seqlen_q, NATURAL: tl.constexpr):
    """In units of the scores; +inf, which makes every probability 0, where a row saw nothing or is none."""
    x = tl.load(lse + rows, mask=rows < seqlen_q, other=float("inf"))
    x = tl.where(x == float("-inf"), float("inf"), x)
    if not NATURAL:
        x *= LOG2E
    return x


@triton.jit
def probabilities(
    products,  # q . k
    dp,  # do . v
    keep,  # of the dropout, or None
    kept_scale, i, j, lse, share, place, rules,
    NATURAL: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(p, dropout(dp), slope of the softcap)."""
    x, curve = scores_of(products, i, j, place, rules, WHOLE)
    p = exponential(x - lse, NATURAL, EXACT)
    if share is not None:
        p *= share
    if keep is not None:
        dp = tl.where(keep, dp * kept_scale, 0.0)
    return p, dp, curve


@triton.jit
def row_tile(
    start, share,
    rows_of,  # (q, dout, where all their columns are as load_rows takes it, lse)
    heads,  # (key, value, descriptors of both, or nothing)
    steps,  # strides of key's and value's rows
    dropout,  # (rng, threshold, number of the head, kept_scale)
    place, rules,
    NATURAL: tl.constexpr, WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """probabilities(...) of these rows and BLOCK_N keys from `start` on, and the first INNER columns of the keys."""
    q, dout, q_lines, g_lines, lse = rows_of
    key, value, described_key, described_value = heads
    k_lines = lines_from(key, start, place[1], steps[0], BLOCK_N)
    v_lines = lines_from(value, start, place[1], steps[1], BLOCK_N)
    if WHOLE and DESCRIPTORS:
        k, v = described_key.load([start, 0]), described_value.load([start, 0])
    else:
        k = load_rows(k_lines, None, HEAD_DIM, min(BLOCK_D, INNER), WHOLE)
        v = load_rows(v_lines, None, HEAD_DIM_V, min(BLOCK_DV, INNER), WHOLE)
    products = products_of(q, k, q_lines, k_lines, HEAD_DIM, BLOCK_D, INNER, WHOLE, PRECISION)
    dp = products_of(dout, v, g_lines, v_lines, HEAD_DIM_V, BLOCK_DV, INNER, WHOLE, PRECISION)
    rows, keys = q_lines[1], start + k_lines[1]
    keep = None
    rng, threshold, bh, kept_scale = dropout
    if rng is not None:
        keep = dropout_keep(rng, threshold, bh, rows, start, BLOCK_N)
    if share is not None:
        share = share[:, None]
    EXACT: tl.constexpr = q.dtype == tl.float32
    pairs = rows[:, None], keys[None, :], lse[:, None]
    p, dp, curve = probabilities(products, dp, keep, kept_scale, *pairs, share, place, rules, NATURAL, WHOLE, EXACT)
    return p, dp, curve, k


@triton.jit
def _row_sums(
    first, last, rows_of, heads, steps, dropout, place, rules,
    NATURAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(sum of p, sum of p dropout(dp)) over the keys [first, last)."""
    mass = tl.zeros_like(rows_of[4])
    sums = tl.zeros_like(rows_of[4])
    for start in range(first, last, BLOCK_N):
        p, dp, _, _ = row_tile(
            start, None, rows_of, heads, steps, dropout, place, rules, NATURAL, False, HEAD_DIM, HEAD_DIM_V, BLOCK_N,
            BLOCK_D, BLOCK_DV, INNER, PRECISION, False,
        )  # fmt: skip
        mass += tl.sum(p, 1)
        sums += tl.sum(p * dp, 1)
    return mass, sums


@triton.jit
def _add_keys(
    total, column, start, share, delta, rows_of, heads, steps, dropout, place, rules,
    NATURAL: tl.constexpr, WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """total, and what BLOCK_N keys from `start` on add to these columns of dq / scale."""
    p, dp, curve, k = row_tile(
        start, share, rows_of, heads, steps, dropout, place, rules, NATURAL, WHOLE, HEAD_DIM, HEAD_DIM_V, BLOCK_N,
        BLOCK_D, BLOCK_DV, INNER, PRECISION, DESCRIPTORS,
    )  # fmt: skip
    COLUMNS: tl.constexpr = total.shape[1]
    if COLUMNS < BLOCK_D:
        k = load_rows(lines_from(heads[0], start, place[1], steps[0], BLOCK_N), column, HEAD_DIM, COLUMNS, WHOLE)
    return dot(narrow(p * (dp - delta[:, None]) * curve, k.dtype), k, total, PRECISION)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "begin_offset", "end_offset", "threshold"])
def query_gradient_kernel(
    query, key, value, mask, alibi_slopes, sinks, rng, cu_seqlens_q, cu_seqlens_k,
    out, grad_out,
    lse,
    grad_lse,  # laid out as lse, or None
    delta,  # laid out as lse: written
    share,  # the same, or None
    dquery,
    heads_q, heads_k, seqlen_q, seqlen_k, begin_offset, end_offset,
    threshold, scale, softcap, kept_scale,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ab,
    stride_lb, stride_lh,
    stride_gb, stride_gh, stride_gs,
    stride_ob, stride_oh, stride_os,
    stride_db, stride_dh, stride_ds,
    BOTTOM_RIGHT: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    INNER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dq[i] = scale sum_j ds[i, j] k[j]; one program per (batch, query head, BLOCK_M rows) and INNER columns of dq."""
    COLUMNS: tl.constexpr = min(BLOCK_D, INNER)
    column = tl.program_id(1) * INNER
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest rows of a causal head begin
    bh = tl.program_id(0) // blocks
    b, h = (bh // heads_q).to(tl.int64), (bh % heads_q).to(tl.int64)
    lengths = seqlen_q, seqlen_k, begin_offset, end_offset
    first_q, first_k, place = place_of(b, cu_seqlens_q, cu_seqlens_k, *lengths, BOTTOM_RIGHT)
    seqlen_q, seqlen_k = place[0], place[1]
    i_begin = block * BLOCK_M
    if i_begin >= seqlen_q:
        return
    h_k = h // (heads_q // heads_k)
    key += b * stride_kb + h_k * stride_kh + first_k * stride_ks
    value += b * stride_vb + h_k * stride_vh + first_k * stride_vs
    heads = key, value, None, None
    if DESCRIPTORS:
        sides = key, value, seqlen_k, stride_ks, stride_vs
        heads = described_heads(*sides, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV)
    slope, head_mask = alibi_slopes, mask
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * stride_ab + h)
    if mask is not None:
        head_mask = mask + b * stride_mb + h * stride_mh
    rules = scale, softcap, slope, head_mask, stride_mq, stride_mk
    rows = i_begin + tl.arange(0, BLOCK_M)
    q_lines = query + b * stride_qb + h * stride_qh + first_q * stride_qs, rows, seqlen_q, stride_qs
    g_lines = grad_out + b * stride_gb + h * stride_gh + first_q * stride_gs, rows, seqlen_q, stride_gs
    q = load_rows(q_lines, None, HEAD_DIM, min(BLOCK_D, INNER), False)
    dout = load_rows(g_lines, None, HEAD_DIM_V, min(BLOCK_DV, INNER), False)
    statistics = b * stride_lb + h * stride_lh + first_q
    row_lse = load_lse(lse + statistics, rows, seqlen_q, NATURAL)
    rows_of = q, dout, q_lines, g_lines, row_lse
    rest = rows_of, heads, (stride_ks, stride_vs), (rng, threshold, bh, kept_scale), place, rules
    i_end = tl.minimum(i_begin + BLOCK_M, seqlen_q)
    first, full_begin, full_end, edges = split_keys(i_begin, i_end, place[3], place[4], seqlen_k, BLOCK_N)

    row_share = share
    if share is None:
        o_lines = out + b * stride_ob + h * stride_oh + first_q * stride_os, rows, seqlen_q, stride_os
        o = load_rows(o_lines, None, HEAD_DIM_V, BLOCK_DV, False).to(tl.float32)
        row_delta = tl.sum(load_rows(g_lines, None, HEAD_DIM_V, BLOCK_DV, False).to(tl.float32) * o, 1)
    else:
        last = full_end + (edges - (full_begin - first) // BLOCK_N) * BLOCK_N
        mass, sums = _row_sums(
            first, last, *rest, NATURAL, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, INNER, PRECISION
        )
        if sinks is not None:
            mass += exponential(tl.load(sinks + h) - row_lse, NATURAL, True)
        row_share = 1.0 / tl.where(mass == 0.0, 1.0, mass)
        row_delta = sums * row_share
        if column == 0:
            tl.store(share + statistics + rows, row_share, mask=rows < seqlen_q)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + statistics + rows, mask=rows < seqlen_q, other=0.0)
    if column == 0:
        tl.store(delta + statistics + rows, row_delta, mask=rows < seqlen_q)

    total = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    if mask is not None:
        edges += (full_end - full_begin) // BLOCK_N
        full_end = full_begin
    else:
        for start in range(full_begin, full_end, BLOCK_N):
            total = _add_keys(
                total, column, start, row_share, row_delta, *rest, NATURAL, True, HEAD_DIM, HEAD_DIM_V, BLOCK_N,
                BLOCK_D, BLOCK_DV, INNER, PRECISION, DESCRIPTORS,
            )  # fmt: skip
    for index in range(edges):
        start = edge_block(index, first, full_begin, full_end, BLOCK_N)
        total = _add_keys(
            total, column, start, row_share, row_delta, *rest, NATURAL, False, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D,
            BLOCK_DV, INNER, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    total *= scale if NATURAL else scale * LN2
    dquery += b * stride_db + h * stride_dh + first_q * stride_ds
    store_rows((dquery, rows, seqlen_q, stride_ds), total, column, HEAD_DIM, COLUMNS)
