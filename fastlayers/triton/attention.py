"""attention and varlen_attention in Triton: launchers and operators."""

import math

import torch
import triton
from torch import Tensor

from fastlayers.ops.attention import _allocate_like
from fastlayers.triton import attention_tiles as tiles
from fastlayers.triton.attention_forward import forward_kernel
from fastlayers.triton.attention_inputs import (
    Inputs,
    arguments,
    check,
    check_results,
    dense,
    lse_strides,
    require,
    strides,
)
from fastlayers.triton.attention_key_gradient import key_gradient_kernel
from fastlayers.triton.attention_mask_gradient import mask_gradient_kernel
from fastlayers.triton.attention_query_gradient import query_gradient_kernel
from fastlayers.triton.launch import describable, is_real, operator, with_scratch, wrap_triton


def _launch(kernel, kind, inputs, programs, columns=0, streamed=(), **operands):
    """Launch a kernel.

    kind: what its tile is for; programs: function(tile); columns: of the output, as many as tile.inner per program
    streamed: the tensors that its loop reads, through tensor descriptors where they, and the kernel, are fit for these
    """
    fits = bool(streamed) and describable(*streamed)

    def grid(tile):
        return programs(tile), max(triton.cdiv(columns, tile.inner), 1)

    def launch(tile):
        form = {"DESCRIPTORS": tile.descriptors} if streamed else {}
        wrap_triton(kernel)[grid(tile)](**arguments(inputs), **operands, **form, **tiles.constants(tile))

    def run(tile):
        with_scratch(launch, tile)

    with torch.cuda.device_of(inputs.query):  # Triton launches on the current GPU
        measure = run if is_real(inputs.query) else None
        run(tiles.choose(kind, inputs, fits, lambda tile: math.prod(grid(tile)), measure))


def _row_blocks(inputs):
    return lambda tile: inputs.batch * inputs.heads * triton.cdiv(inputs.seqlen_q, tile.rows)


def _key_blocks(inputs):
    return lambda tile: inputs.batch * inputs.heads_k * triton.cdiv(inputs.seqlen_k, tile.columns)


def _named(letter, steps):
    """Strides as the kernels call them."""
    return {f"stride_{letter}{axis}": step for axis, step in zip("bhs", steps)}


@operator("fastlayers_triton::attention_forward", mutates_args=())
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_rng: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """The native operator of this name: its arguments, its results. Every call is deterministic."""
    tensors = (query, key, value, attn_mask, alibi_slopes, sinks, dropout_rng, cu_seqlens_q, cu_seqlens_k)
    options = (dropout_p, is_causal, bottom_right, scale, window_left, window_right, softcap)
    inputs = Inputs(*tensors, max_seqlen_q, max_seqlen_k, *options)
    check(inputs)
    out, lse = _allocate_like(query, value.shape[-1]), _allocate_lse(inputs)
    if inputs.packed:  # rows behind the last sequence, which no program visits
        out.zero_()
        lse.fill_(float("-inf"))
    if out.numel():
        operands = {"out": out, "lse": lse, **_named("o", strides(out)), **_named("l", lse_strides(inputs))}
        inputs = inputs.dense()
        streamed = inputs.key, inputs.value
        _launch(forward_kernel, "forward", inputs, _row_blocks(inputs), value.shape[-1], streamed, **operands)
    return out, lse


def _allocate_lse(inputs):
    query = inputs.query
    shape = (query.shape[1], query.shape[0]) if inputs.packed else query.shape[:3]
    return query.new_empty(shape, dtype=torch.float32)


@operator("fastlayers_triton::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_rng: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    mask_gradient: bool,
    sinks_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The native operator of this name."""
    tensors = (query, key, value, attn_mask, alibi_slopes, sinks, dropout_rng, cu_seqlens_q, cu_seqlens_k)
    options = (dropout_p, is_causal, bottom_right, scale, window_left, window_right, softcap)
    inputs = Inputs(*tensors, max_seqlen_q, max_seqlen_k, *options)
    check(inputs)
    check_results(inputs, grad_out, grad_lse, out, lse)
    require(not mask_gradient or inputs.additive, "only an additive attn_mask has a gradient")
    require(not sinks_gradient or sinks is not None, "no sinks to give a gradient")
    dmask = query.new_zeros(attn_mask.shape if mask_gradient else 0, dtype=torch.float32)
    dsinks = query.new_zeros(sinks.shape if sinks_gradient else 0, dtype=torch.float32)
    gradients = [_allocate_like(tensor, tensor.shape[-1]) for tensor in (query, key, value)]
    if inputs.packed or not out.numel():  # rows behind the last sequence, which no program visits
        for gradient in gradients:
            gradient.zero_()
    if not out.numel():
        return *gradients, dmask, dsinks
    upstream = dense(grad_out), None if grad_lse is None else grad_lse.contiguous()
    rows = _differentiate(inputs.dense(), *upstream, dense(out), lse.contiguous(), gradients, dmask)
    return *gradients, dmask, _sinks_gradient(sinks, *rows) if sinks_gradient else dsinks


def _differentiate(inputs, grad_out, grad_lse, out, lse, gradients, dmask):
    """Launch the kernels of the backward; returns (lse, delta, share) of the rows."""
    dquery, dkey, dvalue = gradients
    coarse = inputs.additive or inputs.query.dtype == torch.float32
    zero = torch.zeros_like if inputs.packed else torch.empty_like
    rows = {"lse": lse, "delta": zero(lse), "share": zero(lse) if coarse else None}
    shared = {"grad_out": grad_out, **rows, **_named("g", strides(grad_out)), **_named("l", lse_strides(inputs))}
    operands = {"out": out, "grad_lse": grad_lse, "dquery": dquery, **shared}
    operands |= {**_named("o", strides(out)), **_named("d", strides(dquery))}
    programs, columns, streamed = _row_blocks(inputs), inputs.head_dims[0], (inputs.key, inputs.value)
    _launch(query_gradient_kernel, "query_gradient", inputs, programs, columns, streamed, **operands)
    if inputs.seqlen_k:
        operands = {"dkey": dkey, "dvalue": dvalue, **shared}
        operands |= {**_named("x", strides(dkey)), **_named("y", strides(dvalue))}
        programs, columns, streamed = _key_blocks(inputs), max(inputs.head_dims), (inputs.query, grad_out)
        _launch(key_gradient_kernel, "key_gradient", inputs, programs, columns, streamed, **operands)
    if dmask.numel() and inputs.seqlen_k:
        full = (*inputs.query.shape[:3], inputs.seqlen_k)
        has = [size == wanted for size, wanted in zip(dmask.shape, full)]
        operands = {"dmask": dmask, "batch": inputs.batch}
        operands |= dict(zip(("MASK_BATCH", "MASK_HEADS", "MASK_ROWS", "MASK_KEYS"), has))
        _launch(mask_gradient_kernel, "query_gradient", inputs, _mask_blocks(inputs, has), **shared, **operands)
    return tuple(rows.values())


def _mask_blocks(inputs, has):
    """Programs of the mask's gradient; has: in which dimensions the mask is not broadcast."""

    def blocks(tile):
        rows, keys = triton.cdiv(inputs.seqlen_q, tile.rows), triton.cdiv(inputs.seqlen_k, tile.columns)
        return math.prod(n for n, own in zip((inputs.batch, inputs.heads, rows, keys), has) if own)

    return blocks


def _sinks_gradient(sinks, lse, delta, share):
    """A sink has the probability exp(sink - lse) and no value: its gradient is that times -delta, over all rows."""
    packed = lse.dim() == 2
    heads = sinks.view(-1, 1)
    terms = torch.exp(heads - lse).where(lse > float("-inf"), 0.0) * -delta
    if share is not None:
        terms = terms * share
    # In float64: few sums of many terms, in which float32 would lose more than the terms did.
    return terms.sum(1 if packed else (0, 2), dtype=torch.float64).to(sinks.dtype)
