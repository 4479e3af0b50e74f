"""The forward of attention: o[i] = sum_j softmax_j(scale q[i] . k[j]) v[j], without the scores ever being in memory."""

import triton
import triton.language as tl

from fastlayers.triton.arithmetic import dot, narrow
from fastlayers.triton.attention_rules import (
    LN2,
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
def absorb(
    total,  # (rows, columns of v): the output so far, before its division
    top,  # (rows,): the largest score so far
    mass,  # (rows,): sum of exponentials
    x,  # (rows, keys): scores
    v,
    keep,  # of the dropout, or None
    NATURAL: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(total, top, mass) after these scores as well: the running softmax."""
    EXACT: tl.constexpr = v.dtype == tl.float32
    now = tl.maximum(top, tl.max(x, 1))
    shift = now
    if not WHOLE:
        shift = tl.where(now == float("-inf"), 0.0, now)  # a row that sees nothing yet
    p = exponential(x - shift[:, None], NATURAL, EXACT)
    shrink = exponential(top - shift, NATURAL, EXACT)
    mass = mass * shrink + tl.sum(p, 1)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    total = dot(narrow(p, v.dtype), v, total * shrink[:, None], PRECISION)
    return total, now, mass


@triton.jit
def finish(total, top, mass, sink, factor, NATURAL: tl.constexpr):
    """(output, lse): divided by the sums, one more term of which is the sink; times factor."""
    if not NATURAL:
        top *= LN2
    peak = top
    if sink is not None:
        peak = tl.maximum(top, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    shrink = exponential(top - peak, True, True)
    mass = mass * shrink
    if sink is not None:
        mass += exponential(sink - peak, True, True)
    lse = tl.where(mass == 0.0, float("-inf"), peak + tl.log(mass))
    share = shrink * factor / tl.where(mass == 0.0, 1.0, mass)
    return total * share[:, None], lse


@triton.jit
def _attend_block(
    state,  # (total, top, mass)
    q, q_lines,
    heads,  # (key, value, descriptors of both, or nothing)
    start,
    steps,  # strides of key's and value's rows
    column,
    dropout,  # (rng, threshold, number of the head)
    place, rules,
    NATURAL: tl.constexpr, WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    INNER: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(total, top, mass) after BLOCK_N keys from `start` on."""
    total, top, mass = state
    key, value, described_key, described_value = heads
    k_lines = lines_from(key, start, place[1], steps[0], BLOCK_N)
    if WHOLE and DESCRIPTORS:
        k = described_key.load([start, 0])
    else:
        k = load_rows(k_lines, None, HEAD_DIM, min(BLOCK_D, INNER), WHOLE)
    products = products_of(q, k, q_lines, k_lines, HEAD_DIM, BLOCK_D, INNER, WHOLE, PRECISION)
    rows, keys = q_lines[1], start + k_lines[1]
    x, _ = scores_of(products, rows[:, None], keys[None, :], place, rules, WHOLE)
    keep = None
    rng, threshold, bh = dropout
    if rng is not None:
        keep = dropout_keep(rng, threshold, bh, rows, start, BLOCK_N)
    if WHOLE and DESCRIPTORS:
        v = described_value.load([start, 0])
    else:
        v = load_rows(lines_from(value, start, place[1], steps[1], BLOCK_N), column, HEAD_DIM_V, total.shape[1], WHOLE)
    return absorb(total, top, mass, x, v, keep, NATURAL, WHOLE, PRECISION)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "begin_offset", "end_offset", "threshold"])
def forward_kernel(
    query,  # (B, Hq, Sq, D); packed, with cu_seqlens: rows of all sequences, and stride_b 0. The last dimension dense
    key, value,
    mask,  # broadcast to (B, Hq, Sq, Sk) by strides, or None
    alibi_slopes, sinks, rng, cu_seqlens_q, cu_seqlens_k,
    out,
    lse,  # (B, Hq, Sq) or (Hq, Tq)
    heads_q, heads_k,
    seqlen_q, seqlen_k,  # packed: the longest
    begin_offset, end_offset,  # row i sees keys [i + diagonal + begin_offset, i + diagonal + end_offset)
    threshold,
    scale,  # times log2(e) unless NATURAL
    softcap, kept_scale,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ab,
    stride_ob, stride_oh, stride_os,
    stride_lb, stride_lh,
    BOTTOM_RIGHT: tl.constexpr,
    NATURAL: tl.constexpr,  # scores are in natural units, not in powers of 2
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    INNER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program per (batch, query head, BLOCK_M rows) and INNER columns of values; keys stream past once."""
    COLUMNS: tl.constexpr = min(BLOCK_DV, INNER)
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
    query += b * stride_qb + h * stride_qh + first_q * stride_qs
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
    rest = (stride_ks, stride_vs), column, (rng, threshold, bh), place, rules

    rows = i_begin + tl.arange(0, BLOCK_M)
    q_lines = query, rows, seqlen_q, stride_qs
    q = load_rows(q_lines, None, HEAD_DIM, min(BLOCK_D, INNER), False)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    state = tl.zeros((BLOCK_M, COLUMNS), tl.float32), top, tl.zeros((BLOCK_M,), tl.float32)
    i_end = tl.minimum(i_begin + BLOCK_M, seqlen_q)
    first, full_begin, full_end, edges = split_keys(i_begin, i_end, place[3], place[4], seqlen_k, BLOCK_N)
    if mask is not None:
        edges += (full_end - full_begin) // BLOCK_N
        full_end = full_begin
    else:
        for start in range(full_begin, full_end, BLOCK_N):
            state = _attend_block(
                state, q, q_lines, heads, start, *rest, NATURAL, True, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, INNER,
                PRECISION, DESCRIPTORS,
            )  # fmt: skip
    for index in range(edges):
        start = edge_block(index, first, full_begin, full_end, BLOCK_N)
        state = _attend_block(
            state, q, q_lines, heads, start, *rest, NATURAL, False, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, INNER,
            PRECISION, DESCRIPTORS,
        )  # fmt: skip

    sink = None
    if sinks is not None:
        sink = tl.load(sinks + h)
    total, logarithm = finish(*state, sink, kept_scale, NATURAL)
    if column == 0:
        tl.store(lse + b * stride_lb + h * stride_lh + first_q + rows, logarithm, mask=rows < seqlen_q)
    out += b * stride_ob + h * stride_oh + first_q * stride_os
    store_rows((out, rows, seqlen_q, stride_os), total, column, HEAD_DIM_V, COLUMNS)
