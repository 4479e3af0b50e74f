"""The arguments of the attention operators, checked and laid out as the kernels read them."""

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from fastlayers.reference.philox import dropout_scale, dropout_threshold
from fastlayers.triton import attention_tiles, tiles
from fastlayers.triton.launch import precision

FAR = 1 << 29  # further than any two positions of a sequence
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOG2E = math.log2(math.e)


@dataclass
class Inputs:
    """The arguments of attention_forward, in order; attention_decode's cache_seqlens and page_table behind them."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_rng: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    dropout_p: float
    is_causal: bool
    bottom_right: bool
    scale: float
    window_left: int
    window_right: int
    softcap: float
    cache_seqlens: Tensor | None = None
    page_table: Tensor | None = None

    @property
    def packed(self):
        return self.cu_seqlens_q is not None

    @property
    def batch(self):
        return self.cu_seqlens_q.shape[0] - 1 if self.packed else self.query.shape[0]

    @property
    def heads(self):
        return self.query.shape[1]

    @property
    def heads_k(self):
        return self.key.shape[1]

    @property
    def seqlen_q(self):
        return self.max_seqlen_q if self.packed else self.query.shape[2]

    @property
    def seqlen_k(self):
        """Packed: the longest; in pages: what a sequence has room for."""
        if self.page_table is not None:
            return self.page_table.shape[1] * self.key.shape[2]
        return self.max_seqlen_k if self.packed else self.key.shape[2]

    @property
    def head_dims(self):
        return self.query.shape[-1], self.value.shape[-1]

    @property
    def additive(self):
        return self.attn_mask is not None and self.attn_mask.dtype != torch.bool

    @property
    def natural(self):
        """Scores are in natural units: powers of 2, whose factor goes into the scale, would bend what is added."""
        shaped = self.additive or self.alibi_slopes is not None or self.softcap > 0
        return shaped or self.query.dtype == torch.float32

    def dense(self):
        """With the last dimension of everything dense, by copies where it is not: the kernels take no strides there."""
        tables = ("alibi_slopes", "sinks", "dropout_rng", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "page_table")
        small = {name: getattr(self, name) for name in tables}
        changes = {name: tensor.contiguous() for name, tensor in small.items() if tensor is not None}
        changes |= {name: dense(getattr(self, name)) for name in ("query", "key", "value")}
        return replace(self, **changes)


def dense(tensor):
    """Its last dimension, by a copy where it is not."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def strides(tensor):
    """(batch, head, row)."""
    return (0, tensor.stride(1), tensor.stride(0)) if tensor.dim() == 3 else tensor.stride()[:3]


def lse_strides(inputs):
    """(batch, head) of (B, Hq, Sq), or of (Hq, Tq)."""
    if inputs.packed:
        return 0, inputs.query.shape[0]
    return inputs.heads * inputs.seqlen_q, inputs.seqlen_q


def mask_strides(mask):
    """Of the scores that it broadcasts to."""
    return (0,) * 4 if mask is None else [0 if n == 1 else step for n, step in zip(mask.shape, mask.stride())]


def padded(dim):
    """Columns of a tile that holds head_dim columns."""
    return max(triton.next_power_of_2(dim), 16)


def arguments(inputs):
    """What every kernel takes, by name."""
    mask, slopes = inputs.attn_mask, inputs.alibi_slopes
    threshold = dropout_threshold(inputs.dropout_p)
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    steps = {
        f"stride_{name[0]}{axis}": step
        for name, tensor in tensors.items()
        for axis, step in zip("bhs", strides(tensor))
    }
    steps |= {f"stride_m{axis}": step for axis, step in zip("bhqk", mask_strides(mask))}
    begin, end = _offsets(inputs)
    return {
        **tensors,
        "mask": mask.view(torch.uint8) if mask is not None and not inputs.additive else mask,
        "alibi_slopes": slopes,
        "sinks": inputs.sinks,
        "rng": inputs.dropout_rng if threshold else None,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "heads_q": inputs.heads,
        "heads_k": inputs.heads_k,
        "seqlen_q": inputs.seqlen_q,
        "seqlen_k": inputs.seqlen_k,
        "begin_offset": begin,
        "end_offset": end,
        "threshold": threshold,
        "scale": inputs.scale if inputs.natural else inputs.scale * _LOG2E,
        "softcap": inputs.softcap if inputs.softcap > 0 else None,
        "kept_scale": dropout_scale(inputs.dropout_p),
        **steps,
        "stride_ab": inputs.heads if slopes is not None and slopes.dim() == 2 else 0,
        "BOTTOM_RIGHT": inputs.bottom_right,
        "NATURAL": inputs.natural,
        "PRECISION": _precision(inputs.query.dtype),
        "HEAD_DIM": inputs.head_dims[0],
        "HEAD_DIM_V": inputs.head_dims[1],
        "BLOCK_D": padded(inputs.head_dims[0]),
        "BLOCK_DV": padded(inputs.head_dims[1]),
    }


def _precision(dtype):
    usual = precision(dtype)
    return attention_tiles.parts(tiles.current_gpu().arch) if usual == "tf32x3" else usual


def _offsets(inputs):
    """(begin, end): row i sees keys [i + diagonal + begin, i + diagonal + end)."""
    begin, end = -FAR, 1 if inputs.is_causal else FAR
    if inputs.window_left >= 0:
        begin = -min(inputs.window_left, FAR)
    if inputs.window_right >= 0:
        end = min(end, inputs.window_right + 1)
    return begin, end


def check(inputs):
    """ValueError for what no kernel could read safely; fastlayers/ops/attention.py explains a wrong call better."""
    query, key, value = inputs.query, inputs.key, inputs.value
    dims = 3 if inputs.packed else 4
    for name in ("query", "key", "value"):
        tensor = getattr(inputs, name)
        require(tensor.dim() == dims, f"{name} needs {dims} dimensions, got {tensor.dim()}")
        require(tensor.dtype == query.dtype and tensor.dtype in _DTYPES, f"{name} has dtype {tensor.dtype}")
        require(tensor.device == query.device, f"{name} has to be on the query's device")
        require(1 <= tensor.shape[-1] <= 256, f"head_dim has to be 1 to 256, {name} has {tensor.shape[-1]}")
    rows, paged = 0 if inputs.packed else 2, inputs.page_table is not None
    require(key.shape[-1] == query.shape[-1], f"key has head_dim {key.shape[-1]}, query has {query.shape[-1]}")
    heads = inputs.heads, inputs.heads_k
    fits = heads[0] % heads[1] == 0 if heads[1] else heads[0] == 0
    require(fits, f"the query's {heads[0]} heads are not a multiple of the key's {heads[1]}")
    require(value.shape[1] == heads[1], f"value has {value.shape[1]} heads, key has {heads[1]}")
    require(value.shape[rows] == key.shape[rows], f"value has seqlen {value.shape[rows]}, key has {key.shape[rows]}")
    if not inputs.packed:
        require(value.shape[0] == key.shape[0], "key and value need one batch size")
        require(paged or key.shape[0] == query.shape[0], "query and key need one batch size")
    _check_lengths(inputs)
    _check_options(inputs)


def check_results(inputs, grad_out, grad_lse, out, lse):
    """out, lse and their gradients as they belong to these inputs."""
    query = inputs.query
    shape = (*query.shape[:-1], inputs.head_dims[1])
    for tensor in (grad_out, out):
        fits = tuple(tensor.shape) == shape and tensor.dtype == query.dtype and tensor.device == query.device
        require(fits, f"out and its gradient have to be {shape}, {query.dtype}")
    shape = (query.shape[1], query.shape[0]) if inputs.packed else tuple(query.shape[:3])
    for tensor in (lse,) if grad_lse is None else (lse, grad_lse):
        fits = tuple(tensor.shape) == shape and tensor.dtype == torch.float32 and tensor.device == query.device
        require(fits, f"lse and its gradient have to be {shape}, float32")


def _check_lengths(inputs):
    """The values are read by the kernels alone."""
    cu_seqlens_q, cu_seqlens_k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    require((cu_seqlens_q is None) == (cu_seqlens_k is None), "cu_seqlens_q and cu_seqlens_k come together")
    if inputs.packed:
        size = cu_seqlens_q.shape[:1]
        require(len(size) == 1 and size[0] >= 1, "cu_seqlens_q has to be (B + 1,)")
        _check_tensor(inputs, "cu_seqlens_q", torch.int32, size)
        _check_tensor(inputs, "cu_seqlens_k", torch.int32, size)
        require(min(inputs.max_seqlen_q, inputs.max_seqlen_k) >= 0, "a negative max_seqlen")
        require(inputs.attn_mask is None, "packed sequences take no attn_mask")
    if inputs.page_table is not None:
        _check_tensor(inputs, "page_table", torch.int32, (inputs.batch, *inputs.page_table.shape[1:2]))
        require(inputs.page_table.dim() == 2 and inputs.key.shape[2] >= 1, "pages need a row at least")
    if inputs.cache_seqlens is not None:
        _check_tensor(inputs, "cache_seqlens", torch.int32, (inputs.batch,))
    longest = max(inputs.seqlen_q, inputs.seqlen_k)
    require(longest < FAR, f"a sequence of {longest} is longer than the {FAR - 1} that the kernels count")


def _check_options(inputs):
    query, heads, dropout_p = inputs.query, inputs.heads, inputs.dropout_p
    if inputs.alibi_slopes is not None:
        batched = (inputs.batch, heads) if inputs.alibi_slopes.dim() == 2 else (heads,)
        _check_tensor(inputs, "alibi_slopes", torch.float32, batched)
    if inputs.sinks is not None:
        _check_tensor(inputs, "sinks", torch.float32, (heads,))
    require(0 <= dropout_p <= 1, f"dropout_p = {dropout_p}")
    require(dropout_p == 0 or inputs.dropout_rng is not None, "dropout needs dropout_rng")
    if inputs.dropout_rng is not None:
        _check_tensor(inputs, "dropout_rng", torch.int64, (2,))
    mask = inputs.attn_mask
    if mask is not None:
        require(mask.dim() == 4 and mask.device == query.device, "attn_mask needs four dimensions, beside the query")
        require(mask.dtype in (torch.bool, *_DTYPES), f"attn_mask has dtype {mask.dtype}")
        full = (*query.shape[:3], inputs.seqlen_k)
        require(all(n in (1, size) for n, size in zip(mask.shape, full)), f"attn_mask {tuple(mask.shape)} for {full}")


def _check_tensor(inputs, name, dtype, shape):
    tensor = getattr(inputs, name)
    fits = tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype and tensor.device == inputs.query.device
    require(fits, f"{name} has to be {tuple(shape)}, {dtype}, got {tuple(tensor.shape)}, {tensor.dtype}")


def require(condition, message):
    if not condition:
        raise ValueError(f"attention: {message}")
