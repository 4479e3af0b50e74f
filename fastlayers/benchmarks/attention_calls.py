"""The functions that benchmarks/attention.py compares: each made for a Call, as function(query, key, value)."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlayers import ops
from fastlayers.benchmarks.runner import Skip
from fastlayers.benchmarks.work import FORWARD, compiled

SMALL_SEQLEN = 512  # of the check
SCORES_LIMIT = {"cpu": 1 << 26, "cuda": 1 << 33}  # bytes of S x S scores, of which math keeps several


@dataclass(frozen=True)
class Call:
    """Self-attention over `seqlen` tokens, or one new token of each sequence over a cache of `seqlen`.

    lengths: tokens of each sequence where they are padded to seqlen; packed: as varlen_attention takes them
    group:   query heads that share a head of keys and values
    window:  how many earlier tokens each sees, with is_causal
    """

    device: str
    dtype: str
    batch: int
    heads: int
    seqlen: int
    head_dim: int
    passes: str = FORWARD
    group: int = 1
    is_causal: bool = False
    dropout_p: float = 0.0
    window: int | None = None
    lengths: tuple | None = None
    packed: bool = False
    decodes: bool = False

    @property
    def heads_k(self):
        return self.heads // self.group

    @property
    def small(self):
        """One that float64 can compute quickly: fewer sequences, heads and tokens, the options the same."""
        batch = min(self.batch, 2)
        seqlen = max(min(self.seqlen, SMALL_SEQLEN), *(self.lengths or (0,))[:batch])
        lengths = self.lengths and self.lengths[:batch]
        return replace(self, batch=batch, heads=2 * self.group, seqlen=seqlen, lengths=lengths)

    @property
    def shape(self):
        grouped = f"/{self.heads_k}" if self.group > 1 else ""
        return f"B{self.batch} H{self.heads}{grouped} S{self.seqlen} D{self.head_dim}"

    @property
    def pairs(self):
        """(query, key) pairs that are seen, of all sequences and heads."""
        if self.decodes:
            return self.batch * self.heads * self.seqlen
        lengths = self.lengths or (self.seqlen,) * self.batch
        return self.heads * sum(self._seen(length) for length in lengths)

    def _seen(self, length):
        if not self.is_causal:
            return length * length
        width = length if self.window is None else min(self.window + 1, length)
        return width * (width + 1) // 2 + (length - width) * width

    @property
    def elements(self):
        """Of query and output, key and value."""
        queries = 1 if self.decodes else self.seqlen
        tokens = 2 * self.batch * (self.heads * queries + self.heads_k * self.seqlen)
        return tokens * self.head_dim


def inputs(call):
    """(query, key, value), and the gradient of the output, which is 0 where a query is padding."""
    queries, dtype = 1 if call.decodes else call.seqlen, getattr(torch, call.dtype)
    shapes = [(call.batch, heads, length, call.head_dim) for heads, length in _sides(call, queries)]
    if call.packed:
        shapes = [(sum(call.lengths), heads, call.head_dim) for heads, _ in _sides(call, queries)]
    tensors = [torch.randn(shape, device=call.device).to(dtype) for shape in shapes]
    dout = torch.randn_like(tensors[0])
    if call.lengths and not call.packed:
        dout = dout * key_mask(call).transpose(-1, -2).to(dtype)
    return tensors, dout


def _sides(call, queries):
    return (call.heads, queries), (call.heads_k, call.seqlen), (call.heads_k, call.seqlen)


def key_mask(call):
    """(B, 1, 1, S), True for tokens."""
    places = torch.arange(call.seqlen, device=call.device)
    return (places < torch.tensor(call.lengths, device=call.device)[:, None])[:, None, None]


def ours(call, backend=None, **options):
    """fastlayers' op for this call."""
    grouped = call.group > 1
    if call.decodes:
        lengths = torch.full((call.batch,), call.seqlen, dtype=torch.int32, device=call.device)
        return lambda *tensors: ops.decode_attention(*tensors, lengths, enable_gqa=grouped, backend=backend)
    options |= {"is_causal": call.is_causal, "dropout_p": call.dropout_p, "enable_gqa": grouped, "backend": backend}
    options["window"] = None if call.window is None else (call.window, 0)
    if call.packed:
        offsets = torch.tensor([0, *call.lengths], device=call.device).cumsum(0).to(torch.int32)
        positions = (offsets, offsets, max(call.lengths), max(call.lengths))
        return lambda *tensors: ops.varlen_attention(*tensors, *positions, **options)
    mask = key_mask(call) if call.lengths else None
    return lambda *tensors: ops.attention(*tensors, mask, **options)


def fixed_dropout(call, backend=None):
    """The same under one dropout mask, which the check needs; the same function where there is no dropout."""
    rng = {"dropout_rng": torch.tensor([7, 0], device=call.device)} if call.dropout_p else {}
    return ours(call, backend, **rng)


def reference(call):
    return fixed_dropout(call, "reference")


def sdpa(call, kernel=None):
    """torch's scaled_dot_product_attention, with one of its kernels by name or as it chooses."""
    if kernel == "MATH":
        _check_scores(call)
    mask, is_causal = None, call.is_causal
    if call.window is not None:
        places = torch.arange(call.seqlen, device=call.device)
        distance = places[:, None] - places
        mask, is_causal = (distance >= 0) & (distance <= call.window), False
    if call.lengths:
        mask = key_mask(call)
    options = {"is_causal": is_causal, "dropout_p": call.dropout_p, "enable_gqa": call.group > 1}

    def attend(*tensors):
        if kernel is None:
            return F.scaled_dot_product_attention(*tensors, mask, **options)
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return F.scaled_dot_product_attention(*tensors, mask, **options)

    return attend


def _check_scores(call):
    queries = 1 if call.decodes else call.seqlen
    scores = call.batch * call.heads * queries * call.seqlen * getattr(torch, call.dtype).itemsize
    if scores > SCORES_LIMIT[call.device]:
        raise Skip(f"its scores alone would take more than {SCORES_LIMIT[call.device] / 2**20:.0f} MiB")


def flex(call):
    """torch.compile's own attention for masks that are given as code."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if call.device == "cpu" and call.passes != FORWARD:
        raise Skip("has no backward on a CPU")
    window = math.inf if call.window is None else call.window

    def visible(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx <= window)

    blocks = create_block_mask(visible, None, None, call.seqlen, call.seqlen, device=call.device)
    attend = compiled(flex_attention, call.device)
    return lambda *tensors: attend(*tensors, block_mask=blocks)
