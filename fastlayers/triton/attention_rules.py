"""What the kernels of attention share: which keys a row sees, what is done to a score, dropout, and exponentials.

The meaning is that of csrc/attention/params.h. Positions are 32-bit: sequences are shorter than 2^29. i and j are the
positions of queries and keys, of shapes that broadcast to that of the scores: one way round or the other.
"""

import triton
import triton.language as tl

from fastlayers.triton.activations import tanh
from fastlayers.triton.arithmetic import dot, narrow
from fastlayers.triton.products import described

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def place_of(b, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, begin_offset, end_offset, BOTTOM_RIGHT: tl.constexpr):
    """(rows before sequence b in q, in k, place): place is what scores_of wants to know of it."""
    first_q = tl.full((), 0, tl.int64)
    first_k = tl.full((), 0, tl.int64)
    if cu_seqlens_q is not None:
        begin_q, begin_k = tl.load(cu_seqlens_q + b), tl.load(cu_seqlens_k + b)
        seqlen_q, seqlen_k = tl.load(cu_seqlens_q + b + 1) - begin_q, tl.load(cu_seqlens_k + b + 1) - begin_k
        first_q, first_k = begin_q.to(tl.int64), begin_k.to(tl.int64)
    diagonal = seqlen_q * 0
    if BOTTOM_RIGHT:
        diagonal = seqlen_k - seqlen_q
    return first_q, first_k, (seqlen_q, seqlen_k, diagonal, diagonal + begin_offset, diagonal + end_offset)


@triton.jit
def lines_from(x, start, count, stride, BLOCK: tl.constexpr):
    """BLOCK rows of a head with `count`, from `start` on, as load_rows takes them: (where the first one lies, numbers
    from there, how many there are, stride). The numbers are the same in every turn of a loop."""
    return x + (tl.full((), 0, tl.int64) + start) * stride, tl.arange(0, BLOCK), count - start, stride


@triton.jit
def load_rows(lines, first_column, DIM: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """(rows, COLUMNS), from first_column on (None: the first): 0 behind column DIM and behind the last row, unless all
    are before it (WHOLE)."""
    x, rows, count, stride = lines
    columns = tl.arange(0, COLUMNS)
    if first_column is not None:
        columns += first_column
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    ALL: tl.constexpr = DIM == COLUMNS and first_column is None
    if WHOLE and ALL:
        return tl.load(at)
    if WHOLE:
        return tl.load(at, mask=columns[None, :] < DIM, other=0.0)
    if ALL:
        return tl.load(at, mask=rows[:, None] < count, other=0.0)
    return tl.load(at, mask=(rows[:, None] < count) & (columns[None, :] < DIM), other=0.0)


@triton.jit
def store_rows(lines, x, first_column, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Narrowed x to where load_rows reads."""
    out, rows, count, stride = lines
    columns = first_column + tl.arange(0, COLUMNS)
    at = out + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, narrow(x, out.dtype.element_ty), mask=(rows[:, None] < count) & (columns[None, :] < DIM))


@triton.jit
def products_of(
    a,  # the first INNER columns of a's rows
    b, a_lines, b_lines,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b' of rows with DIM columns. Where registers hold no more than INNER columns, both are read piece by piece."""
    total = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    if INNER >= COLUMNS:
        total = dot(a, tl.trans(b), total, PRECISION)
    else:
        for column in range(0, DIM, INNER):
            x = load_rows(a_lines, column, DIM, INNER, False)
            y = load_rows(b_lines, column, DIM, INNER, WHOLE)
            total = dot(x, tl.trans(y), total, PRECISION)
    return total


@triton.jit
def described_heads(
    key, value, seqlen_k, stride_ks, stride_vs,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """(key, value, tensor descriptors of BLOCK_N rows of both)."""
    described_key = described(key, seqlen_k, HEAD_DIM, stride_ks, 1, BLOCK_N, BLOCK_D, True)
    described_value = described(value, seqlen_k, HEAD_DIM_V, stride_vs, 1, BLOCK_N, BLOCK_DV, True)
    return key, value, described_key, described_value


@triton.jit
def split_blocks(some_begin, some_end, all_begin, all_end, length, BLOCK: tl.constexpr):
    """Blocks of positions: (first, full_begin, full_end, edges). Nothing is hidden in those of [full_begin, full_end);
    `edges` other blocks of [some_begin, some_end) lie before and behind it, from `first` on."""
    first = tl.maximum(some_begin, 0) // BLOCK * BLOCK
    last = tl.maximum(tl.minimum(some_end, length), first)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(all_begin, 0), BLOCK), tl.cdiv(last, BLOCK)) * BLOCK
    full_end = tl.maximum(tl.maximum(tl.minimum(all_end, length), 0) // BLOCK * BLOCK, full_begin)
    edges = (full_begin - first) // BLOCK + tl.cdiv(tl.maximum(last - full_end, 0), BLOCK)
    return first, full_begin, full_end, edges


@triton.jit
def edge_block(index, first, full_begin, full_end, BLOCK: tl.constexpr):
    """Where the index-th of these other blocks begins."""
    start = first + index * BLOCK
    return tl.where(start < full_begin, start, start + full_end - full_begin)


@triton.jit
def split_keys(i_begin, i_end, begin_offset, end_offset, seqlen_k, BLOCK: tl.constexpr):
    """split_blocks of the keys that rows [i_begin, i_end) see; row i sees [i + begin_offset, i + end_offset)."""
    last = i_end - 1
    some = i_begin + begin_offset, last + end_offset
    return split_blocks(*some, last + begin_offset, i_begin + end_offset, seqlen_k, BLOCK)


@triton.jit
def split_queries(j_begin, j_end, begin_offset, end_offset, seqlen_q, BLOCK: tl.constexpr):
    """split_blocks of the rows that see keys [j_begin, j_end)."""
    some = j_begin - end_offset + 1, j_end - begin_offset
    return split_blocks(*some, j_end - end_offset, j_begin - begin_offset + 1, seqlen_q, BLOCK)


@triton.jit
def scores_of(products, i, j, place, rules, WHOLE: tl.constexpr):
    """(scores, -inf where hidden; the softcap's slope there).

    products: q . k
    place: of place_of
    rules: (scale, softcap, ALiBi's slope for the head, the mask at the head, its strides of rows and keys), None where
        there is none; a mask of uint8 hides where it is 0, a floating one is added
    WHOLE: nothing is hidden, and there is no mask
    """
    seqlen_q, seqlen_k, diagonal, begin_offset, end_offset = place
    scale, softcap, slope, mask, stride_mq, stride_mk = rules
    x = products * scale
    curve = 1.0
    if softcap is not None:
        bent = tanh(x / softcap)
        x = softcap * bent
        curve = 1.0 - bent * bent
    if slope is not None:
        x -= slope * tl.abs(i + diagonal - j).to(tl.float32)
    if not WHOLE:
        seen = (j >= i + begin_offset) & (j < i + end_offset) & (j < seqlen_k) & (i < seqlen_q)
        if mask is not None:
            at = mask + i.to(tl.int64) * stride_mq + j.to(tl.int64) * stride_mk
            if mask.dtype.element_ty == tl.uint8:
                seen = seen & (tl.load(at, mask=seen, other=0) != 0)
            else:
                x += tl.load(at, mask=seen, other=0.0).to(tl.float32)
        x = tl.where(seen, x, float("-inf"))
    return x, curve


@triton.jit
def exponential(x, NATURAL: tl.constexpr, EXACT: tl.constexpr):
    """2^x, or e^x where NATURAL; x is below 1 or NaN. EXACT: to float32's last bits, which x log2(e) would lose."""
    if EXACT:
        tl.static_assert(NATURAL)
        x = tl.where(x < -128.0, -128.0, x)  # whose e^x is 0
        whole = tl.floor(x * LOG2E + 0.5)
        x = (x - whole * 0.693145751953125) - whole * 1.42860677e-06  # ln(2) in two parts, the first of few bits
        return tl.exp2(whole) * tl.exp2(x * LOG2E)
    return tl.exp2(x * LOG2E if NATURAL else x)


@triton.jit
def dropout_keep(rng, threshold, bh, rows, first_key, KEYS: tl.constexpr):
    """(rows, KEYS), True where an entry is kept: the decisions of csrc/common/philox.h from key `first_key` on, which
    is a multiple of KEYS. Eight neighbouring counters decide over 64 keys."""
    tl.static_assert(KEYS % 64 == 0 or KEYS == 32 or KEYS == 16)
    GROUPS: tl.constexpr = max(KEYS // 64, 1)
    ROWS: tl.constexpr = rows.shape[0]
    seed, offset = tl.load(rng), tl.load(rng + 1)
    zero = tl.zeros((ROWS, GROUPS * 8), tl.uint32)
    counter = first_key // 64 * 8 + tl.arange(0, GROUPS * 8)
    c0, c1 = zero + counter.to(tl.uint32)[None, :], zero + rows.to(tl.uint32)[:, None]
    c2, c3 = zero + bh.to(tl.uint32), zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    if KEYS >= 64:
        words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # (..., low bit of the word's number, high bit)
        halves = tl.join(words & 0xFFFF, words >> 16)
        halves = tl.permute(tl.reshape(halves, (ROWS, GROUPS, 8, 2, 2, 2)), (0, 1, 4, 3, 5, 2))
    elif KEYS == 32:
        behind = first_key % 64 != 0
        words = tl.join(tl.where(behind, w2, w0), tl.where(behind, w3, w1))
        halves = tl.permute(tl.join(words & 0xFFFF, words >> 16), (0, 2, 3, 1))
    else:
        word = first_key % 64 // 16
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        halves = tl.permute(tl.join(words & 0xFFFF, words >> 16), (0, 2, 1))
    return tl.reshape(halves, (ROWS, KEYS)).to(tl.int32) >= threshold
