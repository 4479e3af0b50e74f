"""The gradient of an additive mask: that of the scores, summed up over what the mask is broadcast along."""

import triton
import triton.language as tl

from fastlayers.triton.attention_query_gradient import load_lse, row_tile
from fastlayers.triton.attention_rules import load_rows, place_of


@triton.jit
def _tile(
    b,
    h,
    i_begin,
    j_begin,
    query,
    key,
    value,
    grad_out,
    lse,
    delta,
    share,
    heads_q,
    heads_k,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_lb,
    stride_lh,
    stride_ab,
    stride_mb,
    stride_mh,
    rng,
    threshold,
    kept_scale,
    scale,
    softcap,
    alibi_slopes,
    mask,
    stride_mq,
    stride_mk,
    seqlen_q,
    seqlen_k,
    diagonal,
    begin_offset,
    end_offset,
    NATURAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of BLOCK_M x BLOCK_N scores of a head."""
    h_k = h // (heads_q // heads_k)
    query += b * stride_qb + h * stride_qh
    grad_out += b * stride_gb + h * stride_gh
    key += b * stride_kb + h_k * stride_kh
    value += b * stride_vb + h_k * stride_vh
    slope, mask = alibi_slopes, mask + b * stride_mb + h * stride_mh
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * stride_ab + h)
    rows = i_begin + tl.arange(0, BLOCK_M)
    statistics = b * stride_lb + h * stride_lh
    row_lse = load_lse(lse + statistics, rows, seqlen_q, NATURAL)
    row_delta = tl.load(delta + statistics + rows, mask=rows < seqlen_q, other=0.0)
    row_share = tl.load(share + statistics + rows, mask=rows < seqlen_q, other=0.0)
    q = load_rows(query, rows, seqlen_q, stride_qs, None, HEAD_DIM, min(BLOCK_D, INNER), False)
    dout = load_rows(grad_out, rows, seqlen_q, stride_gs, None, HEAD_DIM_V, min(BLOCK_DV, INNER), False)
    operands = row_share, j_begin, q, dout, query, grad_out, key, value, rows, row_lse, kept_scale
    rest = stride_qs, stride_gs, stride_ks, stride_vs, rng, threshold, b * heads_q + h
    place = seqlen_q, seqlen_k, diagonal, begin_offset, end_offset
    rules = scale, softcap, slope, mask, stride_mq, stride_mk
    sizes: tl.constexpr = (HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, INNER, PRECISION)
    p, dp, _, _ = row_tile(*operands, *rest, *place, *rules, NATURAL, False, *sizes)
    return p * (dp - row_delta[:, None])


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "begin_offset", "end_offset", "threshold", "batch"])
def mask_gradient_kernel(
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
    dmask,  # (1 or B, 1 or Hq, 1 or Sq, 1 or Sk) float32, dense
    batch,
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
    MASK_BATCH: tl.constexpr,  # whether the mask has this dimension, or is broadcast along it
    MASK_HEADS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
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
    """One program per BLOCK_M x BLOCK_N of the mask, in which it adds up in order."""
    blocks_m, blocks_n = tl.cdiv(seqlen_q, BLOCK_M), tl.cdiv(seqlen_k, BLOCK_N)
    place_in_mask = tl.program_id(0)
    n_begin, n_end = tl.full((), 0, tl.int32), blocks_n
    if MASK_KEYS:
        n_begin = place_in_mask % blocks_n
        n_end = n_begin + 1
        place_in_mask = place_in_mask // blocks_n
    m_begin, m_end = tl.full((), 0, tl.int32), blocks_m
    if MASK_ROWS:
        m_begin = place_in_mask % blocks_m
        m_end = m_begin + 1
        place_in_mask = place_in_mask // blocks_m
    h_begin, h_end = tl.full((), 0, tl.int32), heads_q
    if MASK_HEADS:
        h_begin = place_in_mask % heads_q
        h_end = h_begin + 1
        place_in_mask = place_in_mask // heads_q
    b_begin, b_end = tl.full((), 0, tl.int32), batch
    if MASK_BATCH:
        b_begin = place_in_mask
        b_end = b_begin + 1

    lengths = seqlen_q, seqlen_k, begin_offset, end_offset
    _, _, place = place_of(0, cu_seqlens_q, cu_seqlens_k, *lengths, BOTTOM_RIGHT)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    zero = tl.full((), 0, tl.int64)
    heads = query, key, value, grad_out, lse, delta, share, heads_q, heads_k
    steps = stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs
    more_steps = stride_gb, stride_gh, stride_gs, stride_lb, stride_lh, stride_ab, stride_mb, stride_mh
    rest = rng, threshold, kept_scale, scale, softcap, alibi_slopes, mask, stride_mq, stride_mk
    sizes: tl.constexpr = (HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, INNER, PRECISION)
    seen = n_begin * BLOCK_N < m_end * BLOCK_M - 1 + place[4]
    seen = seen & (n_end * BLOCK_N > m_begin * BLOCK_M + place[3])
    count_m, count_n, count_h = m_end - m_begin, n_end - n_begin, h_end - h_begin
    tiles = tl.where(seen, (b_end - b_begin) * count_h * count_m * count_n, 0)
    for tile in range(tiles):
        n, m = n_begin + tile % count_n, m_begin + tile // count_n % count_m
        head = tile // count_n // count_m
        where = zero + b_begin + head // count_h, zero + h_begin + head % count_h, m * BLOCK_M, n * BLOCK_N
        total += _tile(*where, *heads, *steps, *more_steps, *rest, *place, NATURAL, *sizes)

    matrix = zero
    if MASK_BATCH:
        matrix += b_begin
    if MASK_HEADS:
        matrix = matrix * heads_q + h_begin
    rows = m_begin * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = n_begin * BLOCK_N + tl.arange(0, BLOCK_N)
    if MASK_ROWS and MASK_KEYS:
        at = (matrix * seqlen_q + rows[:, None]) * seqlen_k + keys[None, :]
        tl.store(dmask + at, total, mask=(rows[:, None] < seqlen_q) & (keys[None, :] < seqlen_k))
    elif MASK_ROWS:
        tl.store(dmask + matrix * seqlen_q + rows, tl.sum(total, 1), mask=rows < seqlen_q)
    elif MASK_KEYS:
        tl.store(dmask + matrix * seqlen_k + keys, tl.sum(total, 0), mask=keys < seqlen_k)
    else:
        tl.store(dmask + matrix, tl.sum(tl.sum(total, 1), 0))
