"""The gradient of an additive mask: that of the scores, summed up over what the mask is broadcast along."""

import triton
import triton.language as tl

from fastlayers.triton.attention_query_gradient import load_lse, row_tile
from fastlayers.triton.attention_rules import load_rows, place_of


@triton.jit
def _tile(
    b, h, i_begin, j_begin,
    tensors,  # (query, grad_out, key, value)
    steps,  # strides of their batches, heads and rows
    statistics,  # (lse, delta, share, strides of batches and heads)
    heads,  # (of query, of key)
    dropout,  # (rng, threshold, kept_scale)
    place,
    rules,  # (scale, softcap, alibi_slopes, stride of their batches, mask, its strides)
    NATURAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M x BLOCK_N scores of a head."""
    query, grad_out, key, value = tensors
    steps_q, steps_g, steps_k, steps_v = steps
    h_k = h // (heads[0] // heads[1])
    rows, seqlen_q = i_begin + tl.arange(0, BLOCK_M), place[0]
    q_lines = query + b * steps_q[0] + h * steps_q[1], rows, seqlen_q, steps_q[2]
    g_lines = grad_out + b * steps_g[0] + h * steps_g[1], rows, seqlen_q, steps_g[2]
    q = load_rows(q_lines, None, HEAD_DIM, min(BLOCK_D, INNER), False)
    dout = load_rows(g_lines, None, HEAD_DIM_V, min(BLOCK_DV, INNER), False)
    lse, delta, share, stride_lb, stride_lh = statistics
    first = b * stride_lb + h * stride_lh
    row_lse = load_lse(lse + first, rows, seqlen_q, NATURAL)
    row_delta = tl.load(delta + first + rows, mask=rows < seqlen_q, other=0.0)
    row_share = tl.load(share + first + rows, mask=rows < seqlen_q, other=0.0)
    scale, softcap, alibi_slopes, stride_ab, mask, stride_mb, stride_mh, stride_mq, stride_mk = rules
    slope, head_mask = alibi_slopes, mask + b * stride_mb + h * stride_mh
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * stride_ab + h)
    rules_here = scale, softcap, slope, head_mask, stride_mq, stride_mk
    rng, threshold, kept_scale = dropout
    keys_of = key + b * steps_k[0] + h_k * steps_k[1], value + b * steps_v[0] + h_k * steps_v[1], None, None
    operands = j_begin, row_share, (q, dout, q_lines, g_lines, row_lse), keys_of, (steps_k[2], steps_v[2])
    rest = (rng, threshold, b * heads[0] + h, kept_scale), place, rules_here
    p, dp, _, _ = row_tile(
        *operands, *rest, NATURAL, False, HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, INNER, PRECISION, False
    )
    return p * (dp - row_delta[:, None])


@triton.jit
def _span(owns: tl.constexpr, place, count):
    """Of `count` positions along a dimension of the scores, [first, last) that a program adds up, and the rest of its
    place: one position where the mask owns this dimension, else all, because the mask is broadcast along it."""
    first, last = tl.full((), 0, tl.int32), count
    if owns:
        first = place % count
        last = first + 1
        place = place // count
    return first, last, place


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "begin_offset", "end_offset", "threshold", "batch"])
def mask_gradient_kernel(
    query, key, value, mask, alibi_slopes, sinks, rng, cu_seqlens_q, cu_seqlens_k,
    grad_out, lse, delta, share,
    dmask,  # (1 or B, 1 or Hq, 1 or Sq, 1 or Sk) float32, dense
    batch, heads_q, heads_k, seqlen_q, seqlen_k, begin_offset, end_offset,
    threshold, scale, softcap, kept_scale,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_ab,
    stride_lb, stride_lh,
    stride_gb, stride_gh, stride_gs,
    MASK_BATCH: tl.constexpr,  # whether the mask has this dimension, or is broadcast along it
    MASK_HEADS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M x BLOCK_N of the mask, in which it adds up in order."""
    n_begin, n_end, rest = _span(MASK_KEYS, tl.program_id(0), tl.cdiv(seqlen_k, BLOCK_N))
    m_begin, m_end, rest = _span(MASK_ROWS, rest, tl.cdiv(seqlen_q, BLOCK_M))
    h_begin, h_end, rest = _span(MASK_HEADS, rest, heads_q)
    b_begin, b_end, _ = _span(MASK_BATCH, rest, batch)

    lengths = seqlen_q, seqlen_k, begin_offset, end_offset
    _, _, place = place_of(0, cu_seqlens_q, cu_seqlens_k, *lengths, BOTTOM_RIGHT)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    zero = tl.full((), 0, tl.int64)
    steps_q, steps_g = (stride_qb, stride_qh, stride_qs), (stride_gb, stride_gh, stride_gs)
    steps_k, steps_v = (stride_kb, stride_kh, stride_ks), (stride_vb, stride_vh, stride_vs)
    tensors, steps = (query, grad_out, key, value), (steps_q, steps_g, steps_k, steps_v)
    statistics = lse, delta, share, stride_lb, stride_lh
    rules = scale, softcap, alibi_slopes, stride_ab, mask, stride_mb, stride_mh, stride_mq, stride_mk
    operands = tensors, steps, statistics, (heads_q, heads_k), (rng, threshold, kept_scale), place, rules
    seen = n_begin * BLOCK_N < m_end * BLOCK_M - 1 + place[4]
    seen = seen & (n_end * BLOCK_N > m_begin * BLOCK_M + place[3])
    count_m, count_n, count_h = m_end - m_begin, n_end - n_begin, h_end - h_begin
    tiles = tl.where(seen, (b_end - b_begin) * count_h * count_m * count_n, 0)
    for tile in range(tiles):
        n, m = n_begin + tile % count_n, m_begin + tile // count_n % count_m
        head = tile // count_n // count_m
        where = zero + b_begin + head // count_h, zero + h_begin + head % count_h, m * BLOCK_M, n * BLOCK_N
        total += _tile(
            *where, *operands, NATURAL, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, INNER, PRECISION
        )

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
