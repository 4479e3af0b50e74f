"""linear_act and gated_linear_act in Triton: bias and activation in the epilogue of the product."""

import torch
import triton
from torch import Tensor

from fastlayers.triton import tiles
from fastlayers.triton.launch import describable, is_real, operator, precision, with_scratch, wrap_triton
from fastlayers.triton.linear_act_kernels import forward_kernel, gradient_kernel
from fastlayers.triton.products import product_kernel

_GROUP = 8  # rows of tiles that are walked together
_GRADIENT_ROWS, _GRADIENT_COLUMNS, _GRADIENT_STEP = 128, 64, 64  # per program of gradient_kernel, and at a time


def _constants(tile, dtype, allow_tf32, k, stride_ak, stride_bk):
    """stride_ak, stride_bk: of the factors along k."""
    return {
        "PRECISION": precision(dtype, allow_tf32, k),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.inner,
        "GROUP": _GROUP,
        "PERSISTENT": tile.persistent,
        "DESCRIPTORS": tile.descriptors,
        "A_DENSE": tile.descriptors and stride_ak == 1,
        "B_DENSE": tile.descriptors and stride_bk == 1,
        "SPECIALISED": tile.specialised,
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
        if tensor is not None:
            _check("weight or bias", tensor, wanted, input.dtype)
    if m == 0 or n == 0:
        return

    def launch(tile):
        wrap_triton(forward_kernel)[(_programs(tile, m, n),)](
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
            **_constants(tile, x.dtype, allow_tf32, k, x.stride(1), weight.stride(1)),
        )

    weights = [weight] if weight_up is None else [weight, weight_up]
    _launch(launch, (m, n, k), [x], weights, len(weights))


def _launch(launch, sizes, left, right, weights):
    """launch(tile) with the tile for a product of these sizes; what it returns. left, right: its factors, first and
    second; weights: products at once."""
    factors = *left, *right

    def run(tile):
        return with_scratch(launch, tile)

    loads = tiles.POINTERS
    if describable(*factors) and len({factor.stride(1) == 1 for factor in right}) == 1:
        loads = tiles.SPECIALISED if len(right) == 1 else tiles.DESCRIPTORS
    measure = run if all(map(is_real, factors)) else None
    with torch.cuda.device_of(left[0]):  # Triton launches on the current GPU
        return run(tiles.choose(*sizes, left[0].dtype, weights, loads, measure))


def _product(a, b, a_up, b_up, allow_tf32):
    """a @ b (+ a_up @ b_up) in the dtype of a; a_up has the strides of a."""
    (m, k), n = a.shape, b.shape[1]
    _check("factor", b, (k, n), a.dtype)
    if m == 0 or n == 0:
        return a.new_empty(m, n)

    def launch(tile):
        k_part, parts = _parts(tile, m, n, k)
        out = torch.empty(parts, m, n, dtype=a.dtype if parts == 1 else torch.float32, device=a.device)
        wrap_triton(product_kernel)[(_programs(tile, m, n), parts)](
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
            **_constants(tile, a.dtype, allow_tf32, k, a.stride(1), b.stride(0)),
        )
        return out[0] if parts == 1 else out.sum(0).to(a.dtype)

    left, right = ([a], [b]) if a_up is None else ([a, a_up], [b, b_up])
    return _launch(launch, (m, n, k), left, right, 1)


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
        with torch.cuda.device_of(grad):
            wrap_triton(gradient_kernel)[(triton.cdiv(n, _GRADIENT_COLUMNS), parts)](
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


def _check(what, tensor, shape, dtype):
    """The sizes go to the kernel, which would read whatever lies there."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"linear_act: {what} has to be {shape}, {dtype}; got {tuple(tensor.shape)}, {tensor.dtype}")


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
