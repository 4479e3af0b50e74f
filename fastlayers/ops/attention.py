"""Scaled dot-product attention: dense, and over packed sequences."""

import itertools
import math

import torch

from fastlayers import backends, reference
from fastlayers.ops._autocast import autocast
from fastlayers.ops._autograd import register_autograd, register_fake
from fastlayers.ops._checks import check_beside, check_floating, check_number, check_same_dtype, check_tensor

MAX_HEAD_DIM = 256  # of the compiled kernels
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INFINITY = float("inf")


def attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    *,
    window=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    causal_alignment="top_left",
    return_lse=False,
    deterministic=None,
    dropout_rng=None,
    backend=None,
):
    """softmax(scale * query @ key.T + bias) @ value; torch's scaled_dot_product_attention, with more options.

    query:  (..., Hq, Sq, D), key: (..., Hk, Sk, D), value: (..., Hk, Sk, Dv), float32, float16 or bfloat16 (float64
            through the reference backend); any strides, copied only where the last dimension is not dense. Leading
            dimensions of size 1 broadcast. Query head h reads key head h // (Hq / Hk); Hk < Hq needs enable_gqa=True
    attn_mask: bool (True attends) or floating (added to the scores; -inf hides), broadcastable to (..., Hq, Sq, Sk);
            combines with is_causal and window
    dropout_p: probability, in steps of 1/65536, of dropping an entry of the softmax
    scale:  1 / sqrt(D) by default
    window: (left, right): query i sees keys i - left ... i + right (shifted like the causal diagonal); None on a side
            is unlimited
    softcap: c > 0 replaces scores s by c * tanh(s / c) (Gemma 2, arXiv:2408.00118)
    alibi_slopes: (Hq,) or (B, Hq): slope * |i - j| is taken off the scores (Press et al. 2021, arXiv:2108.12409)
    sinks:  (Hq,): one more logit per head in the softmax's denominator, with no value (gpt-oss, arXiv:2508.10925)
    causal_alignment: the diagonal starts at the "top_left" or ends at the "bottom_right" of the scores
    deterministic: bitwise reproducible gradients; None follows torch.are_deterministic_algorithms_enabled()
    dropout_rng: (2,) int64 (seed, offset) that fixes the dropout mask; drawn from torch's generator by default
    returns (..., Hq, Sq, Dv), in memory order of the query; with return_lse also the log of each row's softmax
            denominator, (..., Hq, Sq), float32. A row that sees no key is 0 with lse -inf. Both differentiable, once,
            in query, key, value, floating attn_mask and sinks
    raises  ValueError, TypeError for arguments that do not fit; BackendError where `backend` cannot serve the call
    source  Dao 2023, "FlashAttention-2", arXiv:2307.08691
    """
    query, key, value = _check_inputs("attention", query, key=key, value=value)
    if not query.dim() == key.dim() == value.dim() or query.dim() < 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"attention: query, key and value have to be (..., heads, seqlen, head_dim), got {shapes}")
    shape = query.shape
    if query.dim() != 4 or not query.shape[0] == key.shape[0] == value.shape[0]:
        (query, key, value), shape, attn_mask = _as_four_dimensional(query, key, value, attn_mask)
    _check_heads("attention", query, key, value, enable_gqa)
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"attention: key has seqlen {key.shape[2]}, value has {value.shape[2]}")
    options = _check_options("attention", query, is_causal, scale, window, softcap)
    tensors = _check_tensors("attention", query, query.shape[0], alibi_slopes, sinks)
    mask = _check_mask("attention", attn_mask, query, key)
    rng = _dropout_rng("attention", query, dropout_p, dropout_rng)
    bottom_right = _is_bottom_right("attention", causal_alignment)
    out, lse = _call(
        *("attention", backend, query, key, value, mask, *tensors, rng, None, None, 0, 0),
        *(dropout_p, is_causal, bottom_right, *options, _deterministic(deterministic)),
    )
    if len(shape) != 4:
        out, lse = out.reshape(*shape[:-1], value.shape[-1]), lse.reshape(shape[:-1])
    return (out, lse) if return_lse else out


def varlen_attention(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    *,
    window=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    causal_alignment="top_left",
    return_lse=False,
    deterministic=None,
    dropout_rng=None,
    backend=None,
):
    """Attention within each of B sequences that are packed one behind the other, without padding.

    query:  (Tq, Hq, D), key: (Tk, Hk, D), value: (Tk, Hk, Dv)
    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, contiguous: sequence b is rows [cu_seqlens[b], cu_seqlens[b + 1]);
            starts with 0, never decreases; rows behind the last sequence give 0, lse -inf and gradient 0; on a GPU
            what they hold is not looked at, since that would wait for it
    max_seqlen_q, max_seqlen_k: at least the longest sequence
    returns (Tq, Hq, Dv); with return_lse also (Hq, Tq), float32. The other arguments as in attention, positions
            counting inside each sequence
    """
    op = "varlen_attention"
    query, key, value = _check_inputs(op, query, key=key, value=value)
    if not query.dim() == key.dim() == value.dim() == 3:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"{op}: query, key and value have to be (tokens, heads, head_dim), got {shapes}")
    _check_heads(op, query, key, value, enable_gqa)
    if key.shape[0] != value.shape[0]:
        raise ValueError(f"{op}: key has {key.shape[0]} tokens, value has {value.shape[0]}")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_lengths(op, name, cu_seqlens, query, None)
        if cu_seqlens.shape != cu_seqlens_q.shape or cu_seqlens.shape[0] < 1:
            sizes = f"{cu_seqlens_q.shape[0]} and {cu_seqlens.shape[0]}"
            raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k have to have one size, at least 1, got {sizes}")
    _check_max_seqlen(op, "max_seqlen_q", max_seqlen_q)
    _check_max_seqlen(op, "max_seqlen_k", max_seqlen_k)
    options = _check_options(op, query, is_causal, scale, window, softcap)
    tensors = _check_tensors(op, query, cu_seqlens_q.shape[0] - 1, alibi_slopes, sinks)
    rng = _dropout_rng(op, query, dropout_p, dropout_rng)
    bottom_right = _is_bottom_right(op, causal_alignment)
    out, lse = _call(
        *(op, backend, query, key, value, None, *tensors, rng, cu_seqlens_q, cu_seqlens_k),
        *(max_seqlen_q, max_seqlen_k, dropout_p, is_causal, bottom_right, *options, _deterministic(deterministic)),
    )
    return (out, lse) if return_lse else out


# Argument checks.


def _check_inputs(op, query, **others):
    """query, key, value after autocast: tensors of one floating dtype on one device."""
    check_tensor(op, "query", query)
    check_floating(op, "query", query)
    tensors = {"query": query, **others}
    for name, tensor in others.items():
        check_tensor(op, name, tensor)
        check_beside(op, name, tensor, "query", query)
    tensors = dict(zip(tensors, autocast(*tensors.values())))
    query = tensors["query"]
    for name, tensor in tensors.items():
        check_same_dtype(op, name, tensor, "query", query)
    if query.dtype not in _KERNEL_DTYPES and query.dtype != torch.float64:
        raise TypeError(f"{op}: query has to be float32, float16, bfloat16 or float64, got {query.dtype}")
    return tensors.values()


def _as_four_dimensional(query, key, value, attn_mask):
    """(query, key, value) as (B, H, S, D), the query's broadcast shape, and the mask for it."""
    tensors = (query, key, value)
    leads = [tensor.shape[:-3] for tensor in tensors]
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        raise ValueError(
            f"attention: batch dimensions do not broadcast: {', '.join(map(str, map(tuple, leads)))}"
        ) from None
    shape = (*lead, *query.shape[-3:])
    if query.dim() <= 3:
        unsqueezed = (1,) * (4 - query.dim())
        return [t.reshape(*unsqueezed, *t.shape) for t in tensors], shape, attn_mask
    tensors = [tensor.expand(*lead, *tensor.shape[-3:]).flatten(0, -4) for tensor in tensors]
    if isinstance(attn_mask, torch.Tensor) and len(lead) > 1 and attn_mask.dim() > 3:
        try:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
        except RuntimeError:
            raise ValueError(
                f"attention: attn_mask {tuple(attn_mask.shape)} does not broadcast to the batch {tuple(lead)}"
            ) from None
    return tensors, shape, attn_mask


def _check_heads(op, query, key, value, enable_gqa):
    """Head dimensions and head counts; the layout is (..., heads, seqlen, dim) or (tokens, heads, dim)."""
    heads_axis = 1
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{op}: key has head_dim {key.shape[-1]}, query has {query.shape[-1]}")
    heads_q, heads_k = query.shape[heads_axis], key.shape[heads_axis]
    if value.shape[heads_axis] != heads_k:
        raise ValueError(f"{op}: value has {value.shape[heads_axis]} heads, key has {heads_k}")
    if heads_q != heads_k:
        if not enable_gqa:
            raise ValueError(f"{op}: key has {heads_k} heads, query has {heads_q}; grouped heads need enable_gqa=True")
        if heads_k == 0 or heads_q % heads_k != 0:
            raise ValueError(f"{op}: the query's {heads_q} heads are not a multiple of the key's {heads_k}")


def _check_options(op, query, is_causal, scale, window, softcap):
    """(scale, window_left, window_right, softcap) as the kernels take them."""
    if not isinstance(is_causal, bool):
        raise TypeError(f"{op}: is_causal has to be a bool, got {type(is_causal).__name__}")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    else:
        check_number(op, "scale", scale, -_INFINITY, _INFINITY)
    check_number(op, "softcap", softcap, 0.0, _INFINITY)
    left, right = _check_window(op, window)
    return float(scale), left, right, float(softcap)


def _check_window(op, window):
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: window has to be a pair (left, right), got {window!r}")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"{op}: window takes integers and None (unlimited), got {window!r}")
        if side is not None and side < 0:
            raise ValueError(f"{op}: window sizes have to be >= 0 (None is unlimited), got {tuple(window)}")
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


def _check_tensors(op, query, batch, alibi_slopes, sinks):
    """(alibi_slopes, sinks) in the dtype of the softmax."""
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads = query.shape[1]
    if alibi_slopes is not None:
        check_tensor(op, "alibi_slopes", alibi_slopes)
        check_floating(op, "alibi_slopes", alibi_slopes)
        check_beside(op, "alibi_slopes", alibi_slopes, "query", query)
        if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            shape = tuple(alibi_slopes.shape)
            raise ValueError(f"{op}: alibi_slopes has to be ({heads},) or ({batch}, {heads}), got {shape}")
        if torch.is_grad_enabled() and alibi_slopes.requires_grad:
            raise ValueError(f"{op}: alibi_slopes has no gradient; pass alibi_slopes.detach()")
        alibi_slopes = alibi_slopes.to(statistics)
    if sinks is not None:
        check_tensor(op, "sinks", sinks)
        check_floating(op, "sinks", sinks)
        check_beside(op, "sinks", sinks, "query", query)
        if tuple(sinks.shape) != (heads,):
            raise ValueError(f"{op}: sinks has to be ({heads},), got {tuple(sinks.shape)}")
        sinks = sinks.to(statistics)
    return alibi_slopes, sinks


def _check_mask(op, mask, query, key):
    """The mask with four dimensions, each 1 or that of the scores."""
    if mask is None:
        return None
    check_tensor(op, "attn_mask", mask)
    check_beside(op, "attn_mask", mask, "query", query)
    if mask.dtype not in (torch.bool, *_KERNEL_DTYPES, query.dtype):
        raise TypeError(
            f"{op}: attn_mask has to be bool, float32, float16, bfloat16 or {query.dtype}, got {mask.dtype}"
        )
    scores = (*query.shape[:3], key.shape[2])
    sizes = mask.shape
    if len(sizes) > 4 or any(size not in (1, full) for size, full in zip(reversed(sizes), reversed(scores))):
        raise ValueError(f"{op}: attn_mask {tuple(sizes)} does not broadcast to the scores {tuple(scores)}")
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask


def _check_lengths(op, name, lengths, query, size):
    """A contiguous int32 vector beside the query; the values are checked where they are read."""
    check_tensor(op, name, lengths)
    if lengths.dtype != torch.int32:
        raise TypeError(f"{op}: {name} has to be int32, got {lengths.dtype}")
    check_beside(op, name, lengths, "query", query)
    if lengths.dim() != 1 or (size is not None and lengths.shape[0] != size):
        wanted = "one-dimensional" if size is None else f"({size},)"
        raise ValueError(f"{op}: {name} has to be {wanted}, got {tuple(lengths.shape)}")


def _check_max_seqlen(op, name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} has to be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: {name} has to be >= 0, got {value}")


def _is_bottom_right(op, causal_alignment):
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"{op}: causal_alignment has to be 'top_left' or 'bottom_right', got {causal_alignment!r}")
    return causal_alignment == "bottom_right"


def _dropout_rng(op, query, dropout_p, dropout_rng):
    """(seed, offset) where there is dropout, else None."""
    check_number(op, "dropout_p", dropout_p, 0.0, 1.0)
    if dropout_rng is not None:
        check_tensor(op, "dropout_rng", dropout_rng)
        check_beside(op, "dropout_rng", dropout_rng, "query", query)
        if dropout_rng.dtype != torch.int64 or tuple(dropout_rng.shape) != (2,):
            got = f"{dropout_rng.dtype} {tuple(dropout_rng.shape)}"
            raise ValueError(f"{op}: dropout_rng has to be int64 of shape (2,), got {got}")
    if dropout_p == 0:
        return None
    return torch.randint(1 << 62, (2,), device=query.device) if dropout_rng is None else dropout_rng


def _deterministic(wanted):
    return torch.are_deterministic_algorithms_enabled() if wanted is None else bool(wanted)


# Backends.


def _call(op, backend, query, key, value, *arguments):
    """Every backend takes the arguments of reference.attention, in its order, and returns (out, lse)."""
    chosen = backends.choose(op, _facts_of(query, key, value, *arguments[:3]), backend)
    if chosen == "reference":
        _check_length_values(op, query, key, *arguments[4:8])
        return reference.attention(query, key, value, *arguments)
    return backends.operators(chosen).attention_forward(query, key, value, *arguments)


def _check_length_values(op, query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """What the compiled kernels check themselves. Not while compiling and not on a GPU, where reading would wait."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens_q is not None:
        _check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q.tolist(), query.shape[0], max_seqlen_q)
        _check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k.tolist(), key.shape[0], max_seqlen_k)


def _check_cu_seqlens(op, name, rows, total, max_seqlen):
    if rows[0] != 0 or rows[-1] > total:
        raise ValueError(f"{op}: {name} has to start with 0 and end at {total} at most, got {rows[0]} ... {rows[-1]}")
    for begin, end in itertools.pairwise(rows):
        if not 0 <= end - begin <= max_seqlen:
            raise ValueError(f"{op}: {name} goes from {begin} to {end}; a sequence has 0 to {max_seqlen} rows")


def _tensors(*values):
    return [value for value in values if isinstance(value, torch.Tensor)]


def _facts_of(query, key, value, *others):
    tensors = _tensors(query, key, value, *others)
    return {
        "needs_gradient": torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        "device": query.device.type,
        "index": query.device.index,
        "dtype": query.dtype,
        "head_dim": query.shape[-1],
        "head_dim_v": value.shape[-1],
        "sizes": _sizes(query, key),
    }


def _sizes(query, key):
    """(batch * heads, seqlen_q, seqlen_k, head_dim), what the choice among GPU kernels goes by; packed: all tokens."""
    if query.dim() == 3:
        return (query.shape[1], query.shape[0], key.shape[0], query.shape[2])
    return (query.shape[0] * query.shape[1], query.shape[2], key.shape[2], query.shape[3])


def _attention_facts(query, key, value, *args, **kwargs):
    return _facts_of(*_check_inputs("attention", query, key=key, value=value), *_tensors(*args, *kwargs.values()))


def _cpu_reason(facts):
    if facts["dtype"] not in _KERNEL_DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {facts['dtype']}"
    return _head_dim_reason(facts) or backends.native_reason(facts)


def _head_dim_reason(facts):
    for name in ("head_dim", "head_dim_v"):
        if not 1 <= facts[name] <= MAX_HEAD_DIM:
            return f"{name} has to be 1 to {MAX_HEAD_DIM}, got {facts[name]}"
    return None


def _cuda_reason(facts):
    if facts["dtype"] not in _KERNEL_DTYPES:
        return f"the CUDA kernels take float32, float16 and bfloat16, not {facts['dtype']}"
    reason = _head_dim_reason(facts) or backends.cuda_reason(facts)
    if reason is not None:
        return reason
    what = None
    if facts["dtype"] == torch.bfloat16:
        what = "bfloat16 needs"
    elif (
        facts["dtype"] == torch.float32
        and facts["needs_gradient"]
        and max(facts["head_dim"], facts["head_dim_v"]) > 128
    ):
        what = "gradients in float32 with a head_dim above 128 need"
    if what is not None and backends.cuda_capability() < (8, 0):
        return "{} compute capability 8.0, this GPU has {}.{}".format(what, *backends.cuda_capability())
    return None


def _triton_reason(facts):
    if facts["dtype"] not in _KERNEL_DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {facts['dtype']}"
    reason = _head_dim_reason(facts) or backends.triton_reason(facts)
    if reason is not None or facts["dtype"] != torch.bfloat16 or backends.triton_interpreted():
        return reason
    return None if backends.cuda_capability() >= (8, 0) else "bfloat16 needs a GPU of compute capability 8.0 or newer"


for _op in ("attention", "varlen_attention"):
    backends.register(_op, facts=_attention_facts, cpu=_cpu_reason, cuda=_cuda_reason, triton=_triton_reason)


# The compiled kernels: shapes without values, and gradients.


def _allocate_like(tensor, last):
    """The layout rule of csrc/bindings/attention.cpp: heads inside the sequence where `tensor` has them so."""
    if tensor.dim() == 3 or tensor.stride(1) >= tensor.stride(2):
        return tensor.new_empty((*tensor.shape[:-1], last))
    batch, heads, seqlen, _ = tensor.shape
    return tensor.new_empty((batch, seqlen, heads, last)).transpose(1, 2)


def _forward_fake(query, key, value, *arguments):
    shape = (query.shape[1], query.shape[0]) if query.dim() == 3 else query.shape[:3]
    return _allocate_like(query, value.shape[-1]), query.new_empty(shape, dtype=torch.float32)


def _backward_fake(grad_out, grad_lse, out, lse, query, key, value, attn_mask, alibi_slopes, sinks, *arguments):
    *_, mask_gradient, sinks_gradient = arguments
    dmask = query.new_empty(attn_mask.shape if mask_gradient else (0,), dtype=torch.float32)
    dsinks = query.new_empty(sinks.shape if sinks_gradient else (0,), dtype=torch.float32)
    return *(_allocate_like(tensor, tensor.shape[-1]) for tensor in (query, key, value)), dmask, dsinks


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.options = inputs[9:]
    ctx.set_materialize_grads(False)


def _backward(operators, ctx, grad_out, grad_lse):
    out, lse, query, key, value, attn_mask, alibi_slopes, sinks, *others = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    mask_gradient, sinks_gradient = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    dquery, dkey, dvalue, dmask, dsinks = operators.attention_backward(
        *(grad_out, grad_lse, out, lse, query, key, value, attn_mask, alibi_slopes, sinks, *others),
        *(*ctx.options, mask_gradient, sinks_gradient),
    )
    dmask = dmask.to(attn_mask.dtype) if mask_gradient else None
    return dquery, dkey, dvalue, dmask, None, dsinks if sinks_gradient else None, *(None,) * 13


def _double_backward(operators, ctx, *grads):
    raise RuntimeError("attention is differentiable once: the gradient of its gradient is not implemented")


register_fake("attention_forward", _forward_fake)
register_autograd("attention_forward", _backward, _setup_context)
register_fake("attention_backward", _backward_fake)
register_autograd("attention_backward", _double_backward)
