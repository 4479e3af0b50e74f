"""decode_attention in Triton: launcher and operator."""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from fastlayers.ops.attention import _allocate_like
from fastlayers.triton import attention_tiles, tiles
from fastlayers.triton.attention_decode_kernels import combine_kernel, decode_kernel
from fastlayers.triton.attention_inputs import Inputs, arguments, check, padded, strides
from fastlayers.triton.launch import is_real, operator, wrap_triton

_LEAST_KEYS, _MOST_SPLITS = 256, 64  # per split: a part costs a float32 copy of the output


def _splits(inputs, programs):
    """Into how many parts the keys are split: enough for two programs per multiprocessor."""
    most = min(triton.cdiv(inputs.seqlen_k, _LEAST_KEYS), _MOST_SPLITS)
    return max(min(2 * tiles.multiprocessors() // programs, most), 1)


def _decode(inputs, out, lse):
    """Launch both kernels."""
    rows = inputs.batch * inputs.heads * inputs.seqlen_q
    group_rows = inputs.heads // inputs.heads_k * inputs.seqlen_q

    def programs(tile):
        return inputs.batch * inputs.heads_k * triton.cdiv(group_rows, tile.rows)

    def launch(tile):
        tile = replace(tile, rows=min(max(triton.next_power_of_2(group_rows), 16), tile.rows))
        splits = _splits(inputs, programs(tile))
        outs = torch.empty(splits, rows, inputs.head_dims[1], dtype=torch.float32, device=out.device)
        lses = torch.empty(splits, rows, dtype=torch.float32, device=out.device)
        taken = {name: x for name, x in arguments(inputs).items() if name in decode_kernel.arg_names}
        table = inputs.page_table
        columns = triton.cdiv(inputs.head_dims[1], tile.inner)
        wrap_triton(decode_kernel)[(programs(tile), splits, columns)](
            **taken,
            cache_seqlens=inputs.cache_seqlens,
            page_table=table,
            outs=outs,
            lses=lses,
            batch=inputs.batch,
            splits=splits,
            page_size=inputs.key.shape[2],
            stride_pb=0 if table is None else table.stride(0),
            **attention_tiles.constants(tile),
        )
        wrap_triton(combine_kernel)[(rows,)](
            outs,
            lses,
            inputs.sinks,
            out,
            lse,
            rows,
            inputs.heads,
            inputs.seqlen_q,
            splits,
            *strides(out),
            HEAD_DIM_V=inputs.head_dims[1],
            BLOCK_DV=padded(inputs.head_dims[1]),
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            num_warps=1,
        )

    with torch.cuda.device_of(inputs.query):
        measure = launch if is_real(inputs.query) else None
        launch(attention_tiles.choose("decode", inputs, False, programs, measure))


@operator("fastlayers_triton::attention_decode", mutates_args=())
def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The native operator of this name."""
    tensors = (query, key_cache, value_cache, None, alibi_slopes, sinks, None, None, None)
    options = (0.0, is_causal, True, scale, window_left, window_right, softcap)
    inputs = Inputs(*tensors, 0, 0, *options, cache_seqlens, page_table)
    check(inputs)
    out = _allocate_like(query, value_cache.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel():
        _decode(inputs.dense(), out, lse)
    return out, lse
