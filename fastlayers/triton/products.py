"""Products of matrices: what lies between a tile's number and a kernel's epilogue, and a product by itself."""

import triton
import triton.language as tl

from fastlayers.triton.arithmetic import dot, store


@triton.jit
def tile_at(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Where a tile of an (m, n) matrix begins: (row, column). GROUP rows of tiles are walked column by column, so that
    the programs that run together read few different rows and columns, which stay in the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def positions(first, BLOCK: tl.constexpr):
    return tl.full((), first, tl.int64) + tl.arange(0, BLOCK)


@triton.jit
def described(x, rows, k, stride_row, stride_k, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, K_DENSE: tl.constexpr):
    """A tensor descriptor of a (rows, k) matrix, dense along k or along its rows; load_block reads through it."""
    if K_DENSE:
        return tl.make_tensor_descriptor(x, [rows, k], [stride_row, 1], [BLOCK_ROWS, BLOCK_K])
    else:
        return tl.make_tensor_descriptor(x, [k, rows], [stride_k, 1], [BLOCK_K, BLOCK_ROWS])


@triton.jit
def load_block(x, row, k, K_DENSE: tl.constexpr):
    """(BLOCK_ROWS, BLOCK_K) from there on; 0 behind the matrix's edges."""
    if K_DENSE:
        return x.load([row, k])
    else:
        return tl.trans(x.load([k, row]))


@triton.jit
def multiply(
    total,
    a,  # a pointer; with DESCRIPTORS, a descriptor of a, and of b'; A_DENSE: along k
    b, row, column,
    m, n, first, last,
    stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, A_DENSE: tl.constexpr, B_DENSE: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """total + a[rows, first:last] @ b[first:last, columns] of the tile at (row, column); a has m rows, b n columns."""
    if DESCRIPTORS:
        for start in tl.range(first, last, BLOCK_K, warp_specialize=SPECIALISED):
            x = load_block(a, row, start, A_DENSE)
            y = load_block(b, column, start, B_DENSE)
            total = dot(x, tl.trans(y), total, PRECISION)
    else:
        rows, columns = positions(row, total.shape[0]), positions(column, total.shape[1])
        inner = tl.arange(0, BLOCK_K).to(tl.int64)
        step = tl.full((), BLOCK_K, tl.int64)
        left = a + rows[:, None] * stride_am + (first + inner[None, :]) * stride_ak
        right = b + (first + inner[:, None]) * stride_bk + columns[None, :] * stride_bn
        for start in range(first, last, BLOCK_K):
            within = inner < last - start
            x = tl.load(left, mask=(rows[:, None] < m) & within[None, :], other=0.0)
            y = tl.load(right, mask=within[:, None] & (columns[None, :] < n), other=0.0)
            total = dot(x, y, total, PRECISION)
            left += step * stride_ak
            right += step * stride_bk
    return total


@triton.jit
def multiply_both(
    total, total_up, a, b, b_up, row, column,
    m, n, k,
    stride_am, stride_ak, stride_bk, stride_bn, stride_uk, stride_un,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, A_DENSE: tl.constexpr, B_DENSE: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """(total + a[rows] @ b[:, columns], total_up + a[rows] @ b_up[:, columns]), with one read of a."""
    if DESCRIPTORS:
        for start in tl.range(0, k, BLOCK_K, warp_specialize=SPECIALISED):
            x = load_block(a, row, start, A_DENSE)
            total = dot(x, tl.trans(load_block(b, column, start, B_DENSE)), total, PRECISION)
            total_up = dot(x, tl.trans(load_block(b_up, column, start, B_DENSE)), total_up, PRECISION)
    else:
        rows, columns = positions(row, total.shape[0]), positions(column, total.shape[1])
        inner = tl.arange(0, BLOCK_K).to(tl.int64)
        step = tl.full((), BLOCK_K, tl.int64)
        left = a + rows[:, None] * stride_am + inner[None, :] * stride_ak
        right = b + inner[:, None] * stride_bk + columns[None, :] * stride_bn
        right_up = b_up + inner[:, None] * stride_uk + columns[None, :] * stride_un
        for start in range(0, k, BLOCK_K):
            within = inner < k - start
            mask = within[:, None] & (columns[None, :] < n)
            x = tl.load(left, mask=(rows[:, None] < m) & within[None, :], other=0.0)
            total = dot(x, tl.load(right, mask=mask, other=0.0), total, PRECISION)
            total_up = dot(x, tl.load(right_up, mask=mask, other=0.0), total_up, PRECISION)
            left += step * stride_ak
            right += step * stride_bk
            right_up += step * stride_uk
    return total, total_up


@triton.jit
def _product_tile(
    tile, a, b, a_up, b_up, out,
    m, n, k, k_part,
    stride_am, stride_ak, stride_bk, stride_bn, stride_uk, stride_un,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, A_DENSE: tl.constexpr, B_DENSE: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """Apart from its kernel: one loop for both, PERSISTENT or not, takes registers, and tiles of older GPUs spill."""
    part = tl.program_id(1)
    first = part * k_part
    last = tl.minimum(first + k_part, k)
    row, column = tile_at(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
    place = row, column, m, n, first, last
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    strides = stride_am, stride_ak, stride_bk, stride_bn
    total = multiply(total, a, b, *place, *strides, BLOCK_K, PRECISION, DESCRIPTORS, A_DENSE, B_DENSE, SPECIALISED)
    if a_up is not None:
        strides_up = stride_am, stride_ak, stride_uk, stride_un
        total = multiply(
            total, a_up, b_up, *place, *strides_up, BLOCK_K, PRECISION, DESCRIPTORS, A_DENSE, B_DENSE, SPECIALISED
        )
    rows, columns = positions(row, BLOCK_M), positions(column, BLOCK_N)
    at = (part.to(tl.int64) * m + rows[:, None]) * n + columns[None, :]
    store(out + at, total, (rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def product_kernel(
    a,  # (m, k)
    b,  # (k, n)
    a_up,  # (m, k), strides of a; or None
    b_up,  # (k, n)
    out,  # (parts, m, n), dense
    m, n, k,
    k_part,  # how much of k each part, grid axis 1, adds up
    stride_am, stride_ak, stride_bk, stride_bn, stride_uk, stride_un,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, DESCRIPTORS: tl.constexpr, A_DENSE: tl.constexpr, B_DENSE: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    """out = a b + a_up b_up, in parts of k."""
    if DESCRIPTORS:
        a = described(a, m, k, stride_am, stride_ak, BLOCK_M, BLOCK_K, A_DENSE)
        b = described(b, n, k, stride_bn, stride_bk, BLOCK_N, BLOCK_K, B_DENSE)
        if a_up is not None:
            a_up = described(a_up, m, k, stride_am, stride_ak, BLOCK_M, BLOCK_K, A_DENSE)
            b_up = described(b_up, n, k, stride_un, stride_uk, BLOCK_N, BLOCK_K, B_DENSE)
    operands = a, b, a_up, b_up, out, m, n, k, k_part
    strides = stride_am, stride_ak, stride_bk, stride_bn, stride_uk, stride_un
    if PERSISTENT:
        tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
        first, step = tl.program_id(0), tl.num_programs(0)
        for tile in tl.range(first, tiles, step, flatten=True, warp_specialize=SPECIALISED):
            _product_tile(
                tile, *operands, *strides, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, DESCRIPTORS, A_DENSE, B_DENSE,
                False,
            )  # fmt: skip
    else:
        _product_tile(
            tl.program_id(0), *operands, *strides, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, DESCRIPTORS, A_DENSE,
            B_DENSE, SPECIALISED,
        )  # fmt: skip
