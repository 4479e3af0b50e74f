"""linear_act and gated_linear_act in Triton: bias and activation in the epilogue of the product."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from fastlayers.triton import tiles
from fastlayers.triton.activations import activate, derivative
from fastlayers.triton.arithmetic import store
from fastlayers.triton.products import multiply, multiply_both, tile_at

if knobs.runtime.interpret:  # whose kernels torch cannot look into
    operator = torch.library.custom_op

    def wrap_triton(kernel):
        return kernel

else:
    from torch.library import triton_op as operator
    from torch.library import wrap_triton

_GROUP = 8  # rows of tiles that are walked together
_GRADIENT_ROWS, _GRADIENT_COLUMNS, _GRADIENT_STEP = 128, 64, 64  # per program of _gradient_kernel, and at a time


@triton.jit
def _forward_tile(
    tile,
    input,
    weight,
    weight_up,
    bias,
    bias_up,
    out,
    gate,
    up,
    m,
    n,
    k,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_un,
    stride_uk,
    stride_b,
    stride_bu,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    rows, columns = tile_at(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    at, mask = rows[:, None] * n + columns[None, :], (rows[:, None] < m) & (columns[None, :] < n)
    if weight_up is None:
        strides = stride_xm, stride_xk, stride_wk, stride_wn
        z = multiply(z, input, weight, rows, columns, m, n, 0, k, *strides, BLOCK_K, PRECISION)
    else:
        z_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        strides = stride_xm, stride_xk, stride_wk, stride_wn, stride_uk, stride_un
        operands = input, weight, weight_up
        z, z_up = multiply_both(z, z_up, *operands, rows, columns, m, n, k, *strides, BLOCK_K, PRECISION)
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
def _forward_kernel(
    input,  # (m, k)
    weight,  # (n, k)
    weight_up,  # (n, k) of the gated form, else None
    bias,  # (n,) or None
    bias_up,
    out,  # (m, n), dense; None where only the pre-activation is wanted
    gate,  # (m, n), dense: the pre-activation, where it is wanted
    up,
    m,
    n,
    k,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_un,
    stride_uk,
    stride_b,
    stride_bu,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """out = activation(input weight' + bias), or activation(input weight' + bias) * (input weight_up' + bias_up)."""
    operands = input, weight, weight_up, bias, bias_up, out, gate, up, m, n, k
    strides = stride_xm, stride_xk, stride_wn, stride_wk, stride_un, stride_uk, stride_b, stride_bu
    if PERSISTENT:
        tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _forward_tile(tile, *operands, *strides, ACTIVATION, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP)
    else:
        tile = tl.program_id(0)
        _forward_tile(tile, *operands, *strides, ACTIVATION, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP)


@triton.jit
def _product_tile(
    tile,
    a,
    b,
    a_up,
    b_up,
    out,
    m,
    n,
    k,
    k_part,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_uk,
    stride_un,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    part = tl.program_id(1)
    first = part * k_part
    last = tl.minimum(first + k_part, k)
    rows, columns = tile_at(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
    place = rows, columns, m, n, first, last
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    strides = stride_am, stride_ak, stride_bk, stride_bn
    total = multiply(total, a, b, *place, *strides, BLOCK_K, PRECISION)
    if a_up is not None:
        strides_up = stride_am, stride_ak, stride_uk, stride_un
        total = multiply(total, a_up, b_up, *place, *strides_up, BLOCK_K, PRECISION)
    at = (part.to(tl.int64) * m + rows[:, None]) * n + columns[None, :]
    store(out + at, total, (rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def _product_kernel(
    a,  # (m, k)
    b,  # (k, n)
    a_up,  # (m, k), strides of a; or None
    b_up,  # (k, n)
    out,  # (parts, m, n), dense
    m,
    n,
    k,
    k_part,  # how much of k each part, grid axis 1, adds up
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_uk,
    stride_un,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """out = a b + a_up b_up, in parts of k."""
    operands = a, b, a_up, b_up, out, m, n, k, k_part
    strides = stride_am, stride_ak, stride_bk, stride_bn, stride_uk, stride_un
    if PERSISTENT:
        tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _product_tile(tile, *operands, *strides, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP)
    else:
        _product_tile(tl.program_id(0), *operands, *strides, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP)


@triton.jit
def _gradient_kernel(
    grad,  # (m, n)
    gate,  # (m, n), dense: the pre-activation; None for identity
    up,  # (m, n), dense, of the gated form; else None
    dgate,  # (m, n), dense, or None
    dup,
    sums,  # (programs along m, n) float64: column sums of each program's rows; or None
    sums_up,
    m,
    n,
    stride_gm,
    stride_gn,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
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


def _precision(dtype, allow_tf32):
    """How float32 is multiplied: as accurately as float32 arithmetic, by tensor cores where they have TF32."""
    if dtype != torch.float32 or knobs.runtime.interpret or tiles.current_gpu().arch < 80:
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


def _constants(tile, dtype, allow_tf32):
    return {
        "PRECISION": _precision(dtype, allow_tf32),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.inner,
        "GROUP": _GROUP,
        "PERSISTENT": tile.persistent,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def _programs(tile, m, n):
    blocks = tile.blocks(m, n)
    return min(blocks, tiles.multiprocessors()) if tile.persistent else blocks


def _matrix(tensor):
    """(..., columns) as (rows, columns): a view where its strides allow one."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _forward(input, weights, biases, outputs, activation, allow_tf32):
    """Launch the forward. outputs: (out, gate, up), each (..., n) or None; weights, biases: two, or one and None."""
    x, (weight, weight_up), (bias, bias_up) = _matrix(input), weights, biases
    (m, k), n = x.shape, weight.shape[0]
    for tensor, wanted in ((weight, (n, k)), (weight_up, (n, k)), (bias, (n,)), (bias_up, (n,))):
        _require(tensor is None or (tensor.shape == wanted and tensor.dtype == input.dtype), "operands do not fit")
    if m == 0 or n == 0:
        return

    def launch(tile):
        wrap_triton(_forward_kernel)[(_programs(tile, m, n),)](
            x,
            weight,
            weight_up,
            bias,
            bias_up,
            *outputs,
            m,
            n,
            k,
            *x.stride(),
            *weight.stride(),
            *(weight if weight_up is None else weight_up).stride(),
            1 if bias is None else bias.stride(0),
            1 if bias_up is None else bias_up.stride(0),
            ACTIVATION=activation,
            **_constants(tile, x.dtype, allow_tf32),
        )

    products = 1 if weight_up is None else 2
    launch(tiles.choose(m, n, k, x.dtype, products, launch if _is_real(weight) else None))


def _product(a, b, a_up, b_up, allow_tf32):
    """a @ b (+ a_up @ b_up) in the dtype of a; a_up has the strides of a."""
    (m, k), n = a.shape, b.shape[1]
    _require(b.shape[0] == k and b.dtype == a.dtype, "operands do not fit")
    if m == 0 or n == 0:
        return a.new_empty(m, n)

    def launch(tile):
        k_part, parts = _parts(tile, m, n, k)
        out = torch.empty(parts, m, n, dtype=a.dtype if parts == 1 else torch.float32, device=a.device)
        wrap_triton(_product_kernel)[(_programs(tile, m, n), parts)](
            a,
            b,
            a_up,
            b_up,
            out,
            m,
            n,
            k,
            k_part,
            *a.stride(),
            *b.stride(),
            *(b if b_up is None else b_up).stride(),
            **_constants(tile, a.dtype, allow_tf32),
        )
        return out[0] if parts == 1 else out.sum(0).to(a.dtype)

    return launch(tiles.choose(m, n, k, a.dtype, 1, launch if _is_real(a) else None))


def _parts(tile, m, n, k):
    """(k of each part, parts): a long sum over few tiles is shared out, and its parts are added in order."""
    parts = max(min(tiles.multiprocessors() // tile.blocks(m, n), k // 512), 1)
    k_part = triton.cdiv(triton.cdiv(k, parts), tile.inner) * tile.inner
    return k_part, max(triton.cdiv(k, max(k_part, 1)), 1)


def _gradients(grad, gate, up, activation, needs_dz, needs_bias, needs_bias_up):
    """(dgate, dup, dbias, dbias_up), None where not needed; needs_dz: (dgate, dup). gate None: identity."""
    m, n = grad.shape
    wanted = grad.dtype
    dgate, dup = (torch.empty(m, n, dtype=wanted, device=grad.device) if need else None for need in needs_dz)
    parts = triton.cdiv(m, _GRADIENT_ROWS)
    sums, sums_up = (
        torch.empty(parts, n, dtype=torch.float64, device=grad.device) if need else None
        for need in (needs_bias, needs_bias_up)
    )
    if m > 0 and n > 0:
        wrap_triton(_gradient_kernel)[(triton.cdiv(n, _GRADIENT_COLUMNS), parts)](
            grad,
            gate,
            up,
            dgate,
            dup,
            sums,
            sums_up,
            m,
            n,
            *grad.stride(),
            ACTIVATION=activation,
            ROWS=_GRADIENT_ROWS,
            COLUMNS=_GRADIENT_COLUMNS,
            STEP=_GRADIENT_STEP,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return dgate, dup, *(None if part is None else part.sum(0).to(wanted) for part in (sums, sums_up))


def _is_real(tensor):
    """Whether there is memory behind it, and not a compiler that traces or a CUDA graph that is captured."""
    known = type(tensor) in (Tensor, torch.nn.Parameter)
    return known and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _require(condition, message):
    if not condition:
        raise ValueError(f"linear_act: {message}")


@operator("fastlayers_triton::linear_act_forward", mutates_args=())
def linear_act_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_preactivation: bool, allow_tf32: bool
) -> tuple[Tensor, Tensor]:
    """The native operator of this name: its arguments, its results."""
    shape = (*input.shape[:-1], weight.shape[0])
    out = input.new_empty(shape)
    preactivation = input.new_empty(shape if save_preactivation else 0)
    saved = preactivation if save_preactivation else None
    _forward(input, (weight, None), (bias, None), (out, saved, None), activation, allow_tf32)
    return out, preactivation


@operator("fastlayers_triton::linear_act_backward", mutates_args=())
def linear_act_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    preactivation: Tensor | None,
    activation: str,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The native operator of this name: what is not needed comes back empty."""
    slope = _matrix(grad)
    curved, needs_product = activation != "identity", needs_input or needs_weight
    if curved and preactivation is None:
        preactivation = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _forward(input, (weight, None), (bias, None), (None, preactivation, None), "identity", allow_tf32)
    dbias = None
    if curved or needs_bias:
        gate = _matrix(preactivation) if curved else None
        needs_dz = (curved and needs_product, False)
        dz, _, dbias, _ = _gradients(slope, gate, None, activation, needs_dz, needs_bias, False)
        slope = slope if dz is None else dz
    dinput, dweight = grad.new_empty(0), grad.new_empty(0)
    if needs_input:
        dinput = _product(slope, weight, None, None, allow_tf32).view(*grad.shape[:-1], weight.shape[1])
    if needs_weight:
        dweight = _product(slope.t(), _matrix(input), None, None, allow_tf32)
    return dinput, dweight, grad.new_empty(0) if dbias is None else dbias


@operator("fastlayers_triton::gated_linear_act_forward", mutates_args=())
def gated_linear_act_forward(
    input: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    activation: str,
    save_preactivation: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The native operator of this name."""
    shape = (*input.shape[:-1], weight_gate.shape[0])
    out = input.new_empty(shape)
    gate, up = (input.new_empty(shape if save_preactivation else 0) for _ in range(2))
    saved = (gate, up) if save_preactivation else (None, None)
    _forward(input, (weight_gate, weight_up), (bias_gate, bias_up), (out, *saved), activation, allow_tf32)
    return out, gate, up


@operator("fastlayers_triton::gated_linear_act_backward", mutates_args=())
def gated_linear_act_backward(
    grad: Tensor,
    input: Tensor | None,
    weight_gate: Tensor | None,
    weight_up: Tensor | None,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    activation: str,
    needs_input: bool,
    needs_weight_gate: bool,
    needs_weight_up: bool,
    needs_bias_gate: bool,
    needs_bias_up: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The native operator of this name."""
    if gate is None:
        gate, up = (torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) for _ in range(2))
        outputs = (None, gate, up)
        _forward(input, (weight_gate, weight_up), (bias_gate, bias_up), outputs, "identity", allow_tf32)
    needs_dz = (needs_input or needs_weight_gate, needs_input or needs_weight_up)
    products = _matrix(gate), _matrix(up)
    found = _gradients(_matrix(grad), *products, activation, needs_dz, needs_bias_gate, needs_bias_up)
    dgate, dup, dbias_gate, dbias_up = found
    dinput, dweight_gate, dweight_up = (grad.new_empty(0) for _ in range(3))
    if needs_input:
        dinput = _product(dgate, weight_gate, dup, weight_up, allow_tf32)
        dinput = dinput.view(*grad.shape[:-1], weight_gate.shape[1])
    if needs_weight_gate:
        dweight_gate = _product(dgate.t(), _matrix(input), None, None, allow_tf32)
    if needs_weight_up:
        dweight_up = _product(dup.t(), _matrix(input), None, None, allow_tf32)
    biases = (grad.new_empty(0) if dbias is None else dbias for dbias in (dbias_gate, dbias_up))
    return dinput, dweight_gate, dweight_up, *biases
