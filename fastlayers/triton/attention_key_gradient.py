"""The gradients of attention's keys and values, behind that of the queries (attention_query_gradient.py)."""

import triton
import triton.language as tl

from fastlayers.triton.arithmetic import dot, narrow
from fastlayers.triton.attention_query_gradient import load_lse, probabilities
from fastlayers.triton.attention_rules import (
    LN2,
    dropout_keep,
    edge_block,
    load_rows,
    place_of,
    products_of,
    row_at,
    split_queries,
    store_rows,
)


@triton.jit
def _add_queries(
    dk,
    dv,
    share,  # at the first query head of the key head's; so are query, grad_out, lse, delta, alibi_slopes and mask
    member,  # which of these heads
    start,
    k,
    v,
    key,
    value,
    column,
    stride_ks,
    stride_vs,
    query,
    grad_out,
    lse,
    delta,
    stride_qh,
    stride_gh,
    stride_lh,
    stride_mh,
    stride_qs,
    stride_gs,
    keys,
    first_key,
    kept_scale,
    rng,
    threshold,
    bh,
    seqlen_q,
    seqlen_k,
    diagonal,
    begin_offset,
    end_offset,
    scale,
    softcap,
    alibi_slopes,
    mask,
    stride_mq,
    stride_mk,
    NATURAL: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(dk, dv) with BLOCK_M rows from `start` on. Scores are turned, (keys, rows): as operands of both sums."""
    behind = tl.arange(0, BLOCK_M)
    rows, left = start + behind, seqlen_q - start
    inside = rows < seqlen_q
    member += tl.full((), 0, tl.int64)
    query = row_at(query + member * stride_qh, start, stride_qs)
    grad_out = row_at(grad_out + member * stride_gh, start, stride_gs)
    statistics = member * stride_lh
    slope, head_mask = alibi_slopes, mask
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + member)
    if mask is not None:
        head_mask = mask + member * stride_mh
    row_lse = load_lse(lse + statistics, rows, seqlen_q, NATURAL)
    row_delta = tl.load(delta + statistics + rows, mask=inside, other=0.0)
    row_share = share
    if share is not None:
        row_share = tl.load(share + statistics + rows, mask=inside, other=0.0)[None, :]
    keep = None
    if rng is not None:
        keep = tl.trans(dropout_keep(rng, threshold, bh + member, rows, first_key, keys.shape[0]))
    q = load_rows(query, behind, left, stride_qs, None, HEAD_DIM, min(BLOCK_D, INNER), WHOLE)
    dout = load_rows(grad_out, behind, left, stride_gs, None, HEAD_DIM_V, min(BLOCK_DV, INNER), WHOLE)
    operands = k, q, key, keys, seqlen_k, stride_ks, query, behind, left, stride_qs
    products = products_of(*operands, HEAD_DIM, BLOCK_D, INNER, WHOLE, PRECISION)
    operands = v, dout, value, keys, seqlen_k, stride_vs, grad_out, behind, left, stride_gs
    dp = products_of(*operands, HEAD_DIM_V, BLOCK_DV, INNER, WHOLE, PRECISION)
    rest = products, dp, rows[None, :], keys[:, None], row_lse[None, :], kept_scale
    place = seqlen_q, seqlen_k, diagonal, begin_offset, end_offset
    rules = scale, softcap, slope, head_mask, stride_mq, stride_mk
    EXACT: tl.constexpr = k.dtype == tl.float32
    p, dp, curve = probabilities(keep, row_share, *rest, *place, *rules, NATURAL, WHOLE, EXACT)
    ds = p * (dp - row_delta[None, :]) * curve
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    if max(BLOCK_D, BLOCK_DV) > INNER:
        dout = load_rows(grad_out, behind, left, stride_gs, column, HEAD_DIM_V, dv.shape[1], WHOLE)
        q = load_rows(query, behind, left, stride_qs, column, HEAD_DIM, dk.shape[1], WHOLE)
    dv = dot(narrow(p, v.dtype), dout, dv, PRECISION)
    dk = dot(narrow(ds, k.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "begin_offset", "end_offset", "threshold"])
def key_gradient_kernel(
    query,
    key,
    value,
    mask,
    alibi_slopes,
    sinks,
    rng,
    cu_seqlens_q,
    cu_seqlens_k,
    grad_out,
    lse,
    delta,
    share,
    dkey,
    dvalue,
    heads_q,
    heads_k,
    seqlen_q,
    seqlen_k,
    begin_offset,
    end_offset,
    threshold,
    scale,
    softcap,
    kept_scale,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_ab,
    stride_lb,
    stride_lh,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_xb,
    stride_xh,
    stride_xs,
    stride_yb,
    stride_yh,
    stride_ys,
    BOTTOM_RIGHT: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    INNER: tl.constexpr,
):
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
    key += b * stride_kb + h_k * stride_kh + first_k * stride_ks
    value += b * stride_vb + h_k * stride_vh + first_k * stride_vs
    k = load_rows(key, keys, seqlen_k, stride_ks, None, HEAD_DIM, COLUMNS, False)
    v = load_rows(value, keys, seqlen_k, stride_vs, None, HEAD_DIM_V, COLUMNS_V, False)
    dk = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    dv = tl.zeros((BLOCK_N, COLUMNS_V), tl.float32)
    j_end = tl.minimum(j_begin + BLOCK_N, seqlen_k)
    first, full_begin, full_end, edges = split_queries(j_begin, j_end, place[3], place[4], seqlen_q, BLOCK_M)
    if mask is not None:
        edges += (full_end - full_begin) // BLOCK_M
        full_end = full_begin
    group = heads_q // heads_k
    h = h_k * group  # the first of its query heads
    query += b * stride_qb + h * stride_qh + first_q * stride_qs
    grad_out += b * stride_gb + h * stride_gh + first_q * stride_gs
    statistics = b * stride_lb + h * stride_lh + first_q
    lse += statistics
    delta += statistics
    if share is not None:
        share += statistics
    if alibi_slopes is not None:
        alibi_slopes += b * stride_ab + h
    if mask is not None:
        mask += b * stride_mb + h * stride_mh
    tiles = k, v, key, value, column, stride_ks, stride_vs
    heads = query, grad_out, lse, delta, stride_qh, stride_gh, stride_lh, stride_mh, stride_qs, stride_gs
    rest = keys, j_begin, kept_scale, rng, threshold, b * heads_q + h
    rules = scale, softcap, alibi_slopes, mask, stride_mq, stride_mk
    sizes: tl.constexpr = (HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_D, BLOCK_DV, INNER, PRECISION)
    if mask is None:
        blocks_m = (full_end - full_begin) // BLOCK_M
        for index in range(blocks_m * group):  # one loop for all heads: two, nested, take too many registers
            member, start = index // blocks_m, full_begin + index % blocks_m * BLOCK_M
            dk, dv = _add_queries(
                dk, dv, share, member, start, *tiles, *heads, *rest, *place, *rules, NATURAL, True, *sizes
            )
    for index in range(edges * group):
        member, start = index // edges, edge_block(index % edges, first, full_begin, full_end, BLOCK_M)
        dk, dv = _add_queries(
            dk, dv, share, member, start, *tiles, *heads, *rest, *place, *rules, NATURAL, False, *sizes
        )
    dk *= scale if NATURAL else scale * LN2
    dkey += b * stride_xb + h_k * stride_xh + first_k * stride_xs
    store_rows(dkey, dk, keys, seqlen_k, stride_xs, column, HEAD_DIM, COLUMNS)
    dvalue += b * stride_yb + h_k * stride_yh + first_k * stride_ys
    store_rows(dvalue, dv * kept_scale, keys, seqlen_k, stride_ys, column, HEAD_DIM_V, COLUMNS_V)
