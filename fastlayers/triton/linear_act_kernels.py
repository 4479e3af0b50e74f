"""The kernels of linear_act and gated_linear_act: the forward, and the gradient of the activation. The rest of the
backward is the product of products.py."""

import triton
import triton.language as tl

from fastlayers.triton.activations import activate, derivative
from fastlayers.triton.arithmetic import store
from fastlayers.triton.products import described, multiply, multiply_both, positions, tile_at


@triton.jit
def _forward_tile(
    tile, input, weight, weight_up, bias, bias_up, out, gate, up,
    m, n, k,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_un, stride_uk, stride_b, stride_bu,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, A_DENSE: tl.constexpr, B_DENSE: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """Apart from its kernel as products._product_tile is."""
    row, column = tile_at(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = positions(row, BLOCK_M), positions(column, BLOCK_N)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    at, mask = rows[:, None] * n + columns[None, :], (rows[:, None] < m) & (columns[None, :] < n)
    if weight_up is None:
        strides = stride_xm, stride_xk, stride_wk, stride_wn
        z = multiply(
            z, input, weight, row, column, m, n, 0, k, *strides, BLOCK_K, PRECISION, DESCRIPTORS, A_DENSE, B_DENSE,
            SPECIALISED,
        )  # fmt: skip
    else:
        z_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        strides = stride_xm, stride_xk, stride_wk, stride_wn, stride_uk, stride_un
        operands = input, weight, weight_up
        z, z_up = multiply_both(
            z, z_up, *operands, row, column, m, n, k, *strides, BLOCK_K, PRECISION, DESCRIPTORS, A_DENSE, B_DENSE,
            SPECIALISED,
        )  # fmt: skip
        if bias_up is not None:
            z_up += tl.load(bias_up + columns * stride_bu, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        if up is not None:
            store(up + at, z_up, mask)
    if bias is not None:
        z += tl.load(bias + columns * stride_b, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        store(gate + at, z, mask)
    if out is not None:
        y = activate(z, ACTIVATION)
        if weight_up is not None:
            y *= z_up
        store(out + at, y, mask)


@triton.jit
def forward_kernel(
    input,  # (m, k)
    weight,  # (n, k)
    weight_up,  # (n, k) of the gated form, else None
    bias,  # (n,) or None
    bias_up,
    out,  # (m, n), dense; None where only the pre-activation is wanted
    gate,  # (m, n), dense: the pre-activation, where it is wanted
    up,
    m, n, k,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_un, stride_uk, stride_b, stride_bu,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, DESCRIPTORS: tl.constexpr, A_DENSE: tl.constexpr, B_DENSE: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    """out = activation(input weight' + bias), or activation(input weight' + bias) * (input weight_up' + bias_up)."""
    if DESCRIPTORS:
        input = described(input, m, k, stride_xm, stride_xk, BLOCK_M, BLOCK_K, A_DENSE)
        weight = described(weight, n, k, stride_wn, stride_wk, BLOCK_N, BLOCK_K, B_DENSE)
        if weight_up is not None:
            weight_up = described(weight_up, n, k, stride_un, stride_uk, BLOCK_N, BLOCK_K, B_DENSE)
    operands = input, weight, weight_up, bias, bias_up, out, gate, up, m, n, k
    strides = stride_xm, stride_xk, stride_wn, stride_wk, stride_un, stride_uk, stride_b, stride_bu
    if PERSISTENT:
        tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
        first, step = tl.program_id(0), tl.num_programs(0)
        for tile in tl.range(first, tiles, step, flatten=True, warp_specialize=SPECIALISED):
            _forward_tile(
                tile, *operands, *strides, ACTIVATION, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, DESCRIPTORS,
                A_DENSE, B_DENSE, False,
            )  # fmt: skip
    else:
        _forward_tile(
            tl.program_id(0), *operands, *strides, ACTIVATION, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            DESCRIPTORS, A_DENSE, B_DENSE, SPECIALISED,
        )  # fmt: skip


@triton.jit
def gradient_kernel(
    grad,  # (m, n)
    gate,  # (m, n), dense: the pre-activation; None for identity
    up,  # (m, n), dense, of the gated form; else None
    dgate,  # (m, n), dense, or None
    dup,
    sums,  # (programs along m, n) float64: column sums of each program's rows; or None
    sums_up,
    m, n,
    stride_gm, stride_gn,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dgate = grad activation'(gate) (times up); dup = grad activation(gate); and their sums over rows."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    total_up = tl.zeros((STEP, COLUMNS), tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for start in range(0, ROWS, STEP):
        rows = first + start + tl.arange(0, STEP)
        mask = (rows[:, None] < m) & (columns[None, :] < n)
        at = rows[:, None] * n + columns[None, :]
        place = rows[:, None] * stride_gm + columns[None, :].to(tl.int64) * stride_gn
        slope = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        if gate is not None:
            z = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
            if up is not None:
                slope_up = slope * activate(z, ACTIVATION)
                slope *= tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
                total_up += slope_up
                if dup is not None:
                    store(dup + at, slope_up, mask)
            slope *= derivative(z, ACTIVATION)
        total += slope
        if dgate is not None:
            store(dgate + at, slope, mask)
    at = tl.program_id(1).to(tl.int64) * n + columns
    if sums is not None:
        tl.store(sums + at, tl.sum(total.to(tl.float64), 0), mask=columns < n)
    if sums_up is not None:
        tl.store(sums_up + at, tl.sum(total_up.to(tl.float64), 0), mask=columns < n)
