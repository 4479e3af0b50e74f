"""The gradients of attention's keys and values, behind that of the queries (attention_query_gradient.py)."""

import triton
import triton.language as tl

from fastlayers.triton.arithmetic import dot, narrow
from fastlayers.triton.attention_query_gradient import load_lse, probabilities
from fastlayers.triton.attention_rules import (
    LN2,
    dropout_keep,
    edge_block,
    lines_from,
    load_rows,
    place_of,
    products_of,
    split_queries,
    store_rows,
)


@triton.jit
def _described_heads(x, heads, rows, stride_h, stride_s, DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """A tensor descriptor of BLOCK rows of one of these heads."""
    return tl.make_tensor_descriptor(x, [heads, rows, DIM], [stride_h, stride_s, 1], [1, BLOCK, COLUMNS])


@triton.jit
def _add_queries(
    sums,  # (dk, dv)
    member,  # which of the key head's query heads
    start,
    keys_of,  # (k, v, where all their columns are as load_rows takes it)
    heads,  # (query, grad_out at the first of the query heads, descriptors of both, or nothing)
    steps,  # (strides of query's and grad_out's heads, of their rows)
    statistics,  # (lse, delta, share at the first of the query heads, stride of heads)
    dropout,  # (rng, threshold, number of the first query head)
    kept_scale, column, first_key, place,
    rules,  # of the first query head: ALiBi's slope in memory, the stride of the mask's heads before its others
    NATURAL: tl.constexpr, WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(dk, dv) with BLOCK_M rows from `start` on. Scores are turned, (keys, rows): as operands of both sums."""
    dk, dv = sums
    k, v, k_lines, v_lines = keys_of
    query, grad_out, described_query, described_grad = heads
    step_qh, step_gh, step_qs, step_gs = steps
    seqlen_q, head = place[0], member + tl.full((), 0, tl.int64)
    q_lines = lines_from(query + head * step_qh, start, seqlen_q, step_qs, BLOCK_M)
    g_lines = lines_from(grad_out + head * step_gh, start, seqlen_q, step_gs, BLOCK_M)
    rows = start + q_lines[1]
    lse, delta, share, stride_lh = statistics
    at = head * stride_lh + rows
    row_lse = load_lse(lse + head * stride_lh, rows, seqlen_q, NATURAL)
    row_delta = tl.load(delta + at, mask=rows < seqlen_q, other=0.0)
    if share is not None:
        share = tl.load(share + at, mask=rows < seqlen_q, other=0.0)[None, :]
    keep = None
    rng, threshold, bh = dropout
    if rng is not None:
        keep = tl.trans(dropout_keep(rng, threshold, bh + member, rows, first_key, k.shape[0]))
    if WHOLE and DESCRIPTORS:
        q = tl.reshape(described_query.load([member, start, 0]), (BLOCK_M, BLOCK_D))
        dout = tl.reshape(described_grad.load([member, start, 0]), (BLOCK_M, BLOCK_DV))
    else:
        q = load_rows(q_lines, None, HEAD_DIM, min(BLOCK_D, INNER), WHOLE)
        dout = load_rows(g_lines, None, HEAD_DIM_V, min(BLOCK_DV, INNER), WHOLE)
    products = products_of(k, q, k_lines, q_lines, HEAD_DIM, BLOCK_D, INNER, WHOLE, PRECISION)
    dp = products_of(v, dout, v_lines, g_lines, HEAD_DIM_V, BLOCK_DV, INNER, WHOLE, PRECISION)
    EXACT: tl.constexpr = k.dtype == tl.float32
    scale, softcap, slope, mask, stride_mh, stride_mq, stride_mk = rules
    if slope is not None:
        slope = tl.load(slope + head)
    if mask is not None:
        mask += head * stride_mh
    rules_here = scale, softcap, slope, mask, stride_mq, stride_mk
    pairs = rows[None, :], k_lines[1][:, None], row_lse[None, :]
    p, dp, curve = probabilities(
        products, dp, keep, kept_scale, *pairs, share, place, rules_here, NATURAL, WHOLE, EXACT
    )
    ds = p * (dp - row_delta[None, :]) * curve
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    if max(BLOCK_D, BLOCK_DV) > INNER:
        dout = load_rows(g_lines, column, HEAD_DIM_V, dv.shape[1], WHOLE)
        q = load_rows(q_lines, column, HEAD_DIM, dk.shape[1], WHOLE)
    dv = dot(narrow(p, v.dtype), dout, dv, PRECISION)
    dk = dot(narrow(ds, k.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "begin_offset", "end_offset", "threshold"])
def key_gradient_kernel(
    query, key, value, mask, alibi_slopes, sinks, rng, cu_seqlens_q, cu_seqlens_k,
    grad_out, lse, delta, share,
    dkey, dvalue,
    heads_q, heads_k, seqlen_q, seqlen_k, begin_offset, end_offset,
    threshold, scale, softcap, kept_scale,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ab,
    stride_lb, stride_lh,
    stride_gb, stride_gh, stride_gs,
    stride_xb, stride_xh, stride_xs,
    stride_yb, stride_yh, stride_ys,
    BOTTOM_RIGHT: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    INNER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dk[j] = scale sum_i ds[i, j] q[i], dv[j] = sum_i dropout(p[i, j]) do[i] over all query heads of the key's;
    one program per (batch, key head, BLOCK_N keys) and INNER columns of both."""
    column = tl.program_id(1) * INNER
    COLUMNS: tl.constexpr = min(BLOCK_D, INNER)
    COLUMNS_V: tl.constexpr = min(BLOCK_DV, INNER)
    blocks = tl.cdiv(seqlen_k, BLOCK_N)
    block = tl.program_id(0) % blocks
    bh_k = tl.program_id(0) // blocks
    b, h_k = (bh_k // heads_k).to(tl.int64), (bh_k % heads_k).to(tl.int64)
    lengths = seqlen_q, seqlen_k, begin_offset, end_offset
    first_q, first_k, place = place_of(b, cu_seqlens_q, cu_seqlens_k, *lengths, BOTTOM_RIGHT)
    seqlen_q, seqlen_k = place[0], place[1]
    j_begin = block * BLOCK_N
    if j_begin >= seqlen_k:
        return
    keys = j_begin + tl.arange(0, BLOCK_N)
    k_lines = key + b * stride_kb + h_k * stride_kh + first_k * stride_ks, keys, seqlen_k, stride_ks
    v_lines = value + b * stride_vb + h_k * stride_vh + first_k * stride_vs, keys, seqlen_k, stride_vs
    k = load_rows(k_lines, None, HEAD_DIM, COLUMNS, False)
    v = load_rows(v_lines, None, HEAD_DIM_V, COLUMNS_V, False)
    group = heads_q // heads_k
    h = h_k * group  # the first of its query heads
    query += b * stride_qb + h * stride_qh + first_q * stride_qs
    grad_out += b * stride_gb + h * stride_gh + first_q * stride_gs
    heads = query, grad_out, None, None
    if DESCRIPTORS:
        operands = group, seqlen_q, stride_qh, stride_qs
        described_query = _described_heads(query, *operands, HEAD_DIM, BLOCK_M, BLOCK_D)
        operands = group, seqlen_q, stride_gh, stride_gs
        described_grad = _described_heads(grad_out, *operands, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
        heads = query, grad_out, described_query, described_grad
    first_row = b * stride_lb + h * stride_lh + first_q
    if share is not None:
        share += first_row
    if alibi_slopes is not None:
        alibi_slopes += b * stride_ab + h
    if mask is not None:
        mask += b * stride_mb + h * stride_mh
    steps = stride_qh, stride_gh, stride_qs, stride_gs
    statistics = lse + first_row, delta + first_row, share, stride_lh
    dropout = rng, threshold, b * heads_q + h
    rules = scale, softcap, alibi_slopes, mask, stride_mh, stride_mq, stride_mk
    rest = (k, v, k_lines, v_lines), heads, steps, statistics, dropout, kept_scale, column, j_begin, place, rules

    sums = tl.zeros((BLOCK_N, COLUMNS), tl.float32), tl.zeros((BLOCK_N, COLUMNS_V), tl.float32)
    j_end = tl.minimum(j_begin + BLOCK_N, seqlen_k)
    first, full_begin, full_end, edges = split_queries(j_begin, j_end, place[3], place[4], seqlen_q, BLOCK_M)
    if mask is not None:
        edges += (full_end - full_begin) // BLOCK_M
        full_end = full_begin
    else:
        blocks_m = (full_end - full_begin) // BLOCK_M
        for index in range(blocks_m * group):  # one loop for all heads: two, nested, take too many registers
            member, start = index // blocks_m, full_begin + index % blocks_m * BLOCK_M
            sums = _add_queries(
                sums, member, start, *rest, NATURAL, True, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_D, BLOCK_DV, INNER,
                PRECISION, DESCRIPTORS,
            )  # fmt: skip
    for index in range(edges * group):
        member, start = index // edges, edge_block(index % edges, first, full_begin, full_end, BLOCK_M)
        sums = _add_queries(
            sums, member, start, *rest, NATURAL, False, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_D, BLOCK_DV, INNER,
            PRECISION, DESCRIPTORS,
        )  # fmt: skip
    dk, dv = sums
    dk *= scale if NATURAL else scale * LN2
    dkey += b * stride_xb + h_k * stride_xh + first_k * stride_xs
    store_rows((dkey, keys, seqlen_k, stride_xs), dk, column, HEAD_DIM, COLUMNS)
    dvalue += b * stride_yb + h_k * stride_yh + first_k * stride_ys
    store_rows((dvalue, keys, seqlen_k, stride_ys), dv * kept_scale, column, HEAD_DIM_V, COLUMNS_V)
