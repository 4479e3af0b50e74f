"""Triton kernels as anybody would write them: after Triton's tutorials, to see what its compiler emits run."""

import triton
import triton.language as tl


@triton.jit
def vector_add(a, b, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out + at, tl.load(a + at, mask) + tl.load(b + at, mask), mask)


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + at, at < columns, -float("inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * columns + at, values / tl.sum(values, 0), at < columns)


@triton.jit
def layer_norm(x, weight, bias, out, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * columns + at, at < columns, 0.0).to(tl.float32)
    mean = tl.sum(total, 0) / columns
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * columns + at, at < columns, 0.0).to(tl.float32)
        total += tl.where(at < columns, (value - mean) * (value - mean), 0.0)
    scale = 1 / tl.sqrt(tl.sum(total, 0) / columns + eps)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < columns
        value = (tl.load(x + row * columns + at, mask, 0.0).to(tl.float32) - mean) * scale
        value = value * tl.load(weight + at, mask) + tl.load(bias + at, mask)
        tl.store(out + row * columns + at, value, mask)


@triton.jit
def matmul(
    a,
    b,
    c,
    m,
    n,
    k,
    stride_a,
    stride_b,
    stride_c,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TF32: tl.constexpr,
):
    """c = a @ b; a (m, k), b (k, n), c (m, n), rows dense; TF32: the input precision of float32."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        at = start + inner
        left = tl.load(a + rows[:, None] * stride_a + at[None, :], (rows[:, None] < m) & (at[None, :] < k), 0.0)
        right = tl.load(b + at[:, None] * stride_b + columns[None, :], (at[:, None] < k) & (columns[None, :] < n), 0.0)
        total = tl.dot(left, right, total, input_precision=TF32)
    mask = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c + rows[:, None] * stride_c + columns[None, :], total.to(c.dtype.element_ty), mask)


@triton.jit
def attention(q, k, v, out, seqlen, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr):
    """One head after the other: q, k, v, out (heads, seqlen, D), dense."""
    head = tl.program_id(1).to(tl.int64) * seqlen * D
    rows = tl.program_id(0) * M + tl.arange(0, M)
    dims = tl.arange(0, D)
    queries = tl.load(q + head + rows[:, None] * D + dims[None, :], rows[:, None] < seqlen, 0.0)
    largest = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    result = tl.zeros((M, D), tl.float32)
    end = tl.minimum(seqlen, (tl.program_id(0) + 1) * M) if CAUSAL else seqlen
    for start in range(0, end, N):
        columns = start + tl.arange(0, N)
        keys = tl.load(k + head + columns[None, :] * D + dims[:, None], columns[None, :] < seqlen, 0.0)
        scores = tl.dot(queries, keys) * (scale * 1.4426950408889634)
        visible = columns[None, :] < seqlen
        if CAUSAL:
            visible = visible & (rows[:, None] >= columns[None, :])
        scores = tl.where(visible, scores, -1.0e6)
        now = tl.maximum(largest, tl.max(scores, 1))
        scores = tl.exp2(scores - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(scores, 1)
        values = tl.load(v + head + columns[:, None] * D + dims[None, :], columns[:, None] < seqlen, 0.0)
        result = tl.dot(scores.to(values.dtype), values, result * shrink[:, None])
        largest = now
    result = result / total[:, None]
    tl.store(out + head + rows[:, None] * D + dims[None, :], result.to(out.dtype.element_ty), rows[:, None] < seqlen)


@triton.jit
def matmul_descriptor(a, b, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """c = a @ b.T through tensor descriptors made on the device; a (m, k), b (n, k), c (m, n), dense."""
    left = tl.make_tensor_descriptor(a, [m, k], [k, 1], [M, K])
    right = tl.make_tensor_descriptor(b, [n, k], [k, 1], [N, K])
    result = tl.make_tensor_descriptor(c, [m, n], [n, 1], [M, N])
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        total = tl.dot(left.load([row, start]), right.load([column, start]).T, total)
    result.store([row, column], total.to(c.dtype.element_ty))
