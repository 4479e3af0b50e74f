"""Attention beside torch's scaled_dot_product_attention and other packages."""

from dataclasses import dataclass, replace

import torch

from fastlayers import backends
from fastlayers.benchmarks import attention_calls as calls
from fastlayers.benchmarks import others
from fastlayers.benchmarks.attention_calls import Call
from fastlayers.benchmarks.runner import Case, Place
from fastlayers.benchmarks.work import BACKWARD, BOTH, FORWARD, Work, gather, our_makers

SUITE = "attention"

# Floating-point operations of the products alone, per (query, key) pair and head-dimension element: q k and p v in the
# forward; those of the recomputed scores, dv, dp, dq and dk in the backward.
FLOPS = {FORWARD: 4, BACKWARD: 10, BOTH: 14}

SDPA = {  # candidate -> torch's name of the kernel
    "cpu": {"sdpa": None, "sdpa (math)": "MATH"},
    "cuda": {
        "sdpa (flash)": "FLASH_ATTENTION",
        "sdpa (efficient)": "EFFICIENT_ATTENTION",
        "sdpa (cudnn)": "CUDNN_ATTENTION",
        "sdpa (math)": "MATH",
    },
}


@dataclass(frozen=True)
class Sizes:
    """Of the sweeps, per device: on a GPU those of the FlashAttention papers, on a CPU what takes minutes."""

    hidden: int
    tokens: int
    seqlens: tuple
    head_dims: tuple
    windows: tuple  # at the longest of the sequences
    caches: tuple
    cache_batch: int
    padded: tuple
    dropout: tuple


SIZES = {
    "cpu": Sizes(
        hidden=256,
        tokens=4096,
        seqlens=(256, 1024, 4096),
        head_dims=(64, 128),
        windows=(128, 512, 2048),
        caches=(512, 2048, 8192),
        cache_batch=4,
        padded=(128, 512),
        dropout=(512, 2048),
    ),
    "cuda": Sizes(
        hidden=2048,
        tokens=16384,
        seqlens=(512, 1024, 2048, 4096, 8192, 16384),
        head_dims=(64, 128, 256),
        windows=(256, 1024, 4096),
        caches=(1024, 4096, 16384, 65536),
        cache_batch=8,
        padded=(512, 2048, 8192),
        dropout=(512, 2048, 8192),
    ),
}

TARGETS = [  # on CPU: what, and how many times as fast as sdpa it has to be
    (Call("cpu", "float32", 1, 12, 2048, 64), 1.2),
    (Call("cpu", "float32", 1, 12, 2048, 64, is_causal=True), 1.2),
    (Call("cpu", "bfloat16", 1, 12, 2048, 64, BOTH), 1.5),
    (Call("cpu", "bfloat16", 1, 12, 2048, 64, BOTH, is_causal=True), 1.5),
    (Call("cpu", "float32", 8, 12, 512, 32, BOTH, dropout_p=0.1), 4.0),
]


def cases(setting):
    if setting.device == "cpu":
        for call, wanted in TARGETS:
            if call.dtype in setting.dtypes:
                yield _case(setting, call, Place(), targets={"sdpa": wanted})
    for dtype in setting.dtypes:
        sizes, base = SIZES[setting.device], Call(setting.device, dtype, 1, 1, 1, 64)
        for sweep in (_flash_attention, _windows, _decoding, _padding, _dropout):
            for line, panel, axis, size, call in sweep(sizes, base):
                yield _case(setting, call, Place(f"{line}, {dtype}", f"{panel}, {dtype}", axis, size))


# The sweeps: each yields line and panel of the pictures, name of the size, size and Call.


def _flash_attention(sizes, base):
    """hidden / head_dim heads, tokens / seqlen sequences: the same products per token at each length."""
    for head_dim in sizes.head_dims:
        for is_causal in (False, True):
            for passes in (FORWARD, BACKWARD, BOTH) if head_dim == 64 else (FORWARD, BOTH):
                for seqlen in sizes.seqlens:
                    shape = {"batch": sizes.tokens // seqlen, "heads": sizes.hidden // head_dim, "seqlen": seqlen}
                    call = replace(base, head_dim=head_dim, is_causal=is_causal, passes=passes, **shape)
                    panel = f"{passes}{', causal' if is_causal else ''}, head dim {head_dim}"
                    yield f"attention {passes}", panel, "sequence length", seqlen, call


def _windows(sizes, base):
    seqlen = sizes.seqlens[-1]
    for passes in (FORWARD, BOTH):
        for window in sizes.windows:
            call = replace(base, heads=sizes.hidden // 64, seqlen=seqlen, is_causal=True, window=window, passes=passes)
            yield "attention, windows", f"window, {passes}, {seqlen} tokens", "window", window, call


def _decoding(sizes, base):
    """One new token of each sequence, against its cache."""
    for heads, group in (("32/8 heads", 4), ("32 heads", 1)):
        for seqlen in sizes.caches:
            shape = {"batch": sizes.cache_batch, "heads": 32, "group": group, "head_dim": 128}
            call = replace(base, seqlen=seqlen, decodes=True, **shape)
            yield f"decoding, {heads}", f"decoding, {heads}", "tokens in the cache", seqlen, call


def _padding(sizes, base):
    """Eight sequences of an eighth to the whole of the length."""
    for passes in (FORWARD, BOTH):
        for seqlen in sizes.padded:
            lengths = tuple(seqlen * (place + 1) // 8 for place in range(8))
            call = replace(base, batch=8, heads=12, seqlen=seqlen, lengths=lengths, passes=passes)
            yield "attention, padded", f"padded sequences, {passes}", "longest sequence", seqlen, call


def _dropout(sizes, base):
    for seqlen in sizes.dropout:
        shape = {"batch": max(1, sizes.tokens // seqlen), "heads": sizes.hidden // 64, "seqlen": seqlen}
        call = replace(base, dropout_p=0.1, passes=BOTH, **shape)
        yield "attention, dropout", f"dropout 0.1, {BOTH}", "sequence length", seqlen, call


def _case(setting, call, place, targets=None):
    options = [
        *(["causal"] if call.is_causal else []),
        *([f"window {call.window}"] if call.window is not None else []),
        *([f"dropout {call.dropout_p}"] if call.dropout_p else []),
        *(["padded"] if call.lengths else []),
        *(["decoding"] if call.decodes else []),
    ]
    itemsize = getattr(torch, call.dtype).itemsize
    return Case(
        suite=SUITE,
        name=", ".join([call.passes, call.dtype, call.shape, *options]),
        candidates=lambda: _candidates(setting, call),
        targets=targets or {},
        flops=call.pairs * call.head_dim * FLOPS[call.passes],
        bytes=call.elements * itemsize * (1 if call.passes == FORWARD else 2),
        place=place,
        dtype=call.dtype,
        setting=setting,
    )


def _work(setting, call):
    size = call.elements * getattr(torch, call.dtype).itemsize
    return Work(setting, call.passes, call, call.small, calls.inputs, calls.reference, size)


def _candidates(setting, call):
    work = _work(setting, call)
    op = "decode_attention" if call.decodes else "attention"
    tensors, _ = calls.inputs(call.small)
    extra = [torch.ones(call.small.batch, dtype=torch.int32, device=call.device)] if call.decodes else []
    facts = backends.facts(op, *tensors, *extra, enable_gqa=True)

    def of_ours(backend):
        made = work.candidate(lambda one: calls.fixed_dropout(one, backend))
        if not call.dropout_p:
            return made
        drawn = work.candidate(lambda one: calls.ours(one, backend))  # timed with masks that are drawn anew
        return replace(drawn, check=made.check)

    makers = our_makers(op, facts, of_ours)
    if call.lengths:
        packed = _work(setting, replace(call, packed=True))
        makers["fastlayers (varlen)"] = lambda: packed.candidate(calls.ours)
    kernels = SDPA[setting.device].items()
    makers |= {name: lambda k=kernel: _sdpa(work, call, k) for name, kernel in kernels}
    if call.window is not None:
        makers["flex_attention (torch.compile)"] = lambda: work.candidate(calls.flex)
    makers |= others.makers(others.ATTENTION, lambda adapter: work.candidate(adapter, checked=not call.dropout_p))
    return gather(makers)


def _sdpa(work, call, kernel):
    """With dropout it draws a mask of its own, which nothing can be compared with."""
    return work.candidate(lambda one: calls.sdpa(one, kernel), checked=not call.dropout_p)
