"""attention and varlen_attention in Triton: launchers and operators."""

import torch
import triton
from torch import Tensor

from fastlayers.ops.attention import _allocate_like
from fastlayers.triton import attention_tiles as tiles
from fastlayers.triton.attention_forward import forward_kernel
from fastlayers.triton.attention_inputs import Inputs, arguments, check, lse_strides, strides
from fastlayers.triton.launch import is_real, operator, wrap_triton


def _launch(kernel, kind, inputs, length, heads, **operands):
    """Launch a kernel of this kind: one program per (batch, head, block of rows or keys, `length` in all)."""
    programs = inputs.batch * heads

    def launch(tile):
        block = tile.columns if kind == "keys" else tile.rows
        wrap_triton(kernel)[(triton.cdiv(length, block) * programs,)](
            **arguments(inputs), **operands, **tiles.constants(tile)
        )

    with torch.cuda.device_of(inputs.query):  # Triton launches on the current GPU
        launch(tiles.choose(kind, inputs, length, programs, launch if is_real(inputs.query) else None))


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
        operands = {f"stride_o{axis}": step for axis, step in zip("bhs", strides(out))}
        operands |= {f"stride_l{axis}": step for axis, step in zip("bh", lse_strides(inputs))}
        _launch(forward_kernel, "forward", inputs.dense(), inputs.seqlen_q, inputs.heads, out=out, lse=lse, **operands)
    return out, lse


def _allocate_lse(inputs):
    query = inputs.query
    shape = (query.shape[1], query.shape[0]) if inputs.packed else query.shape[:3]
    return query.new_empty(shape, dtype=torch.float32)
