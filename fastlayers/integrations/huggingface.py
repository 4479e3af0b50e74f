"""Hugging Face transformers: attention through AttentionInterface, padding masks that stay small.

Importing this module registers the attention implementation "fastlayers" with transformers, so that
`from_pretrained(..., attn_implementation="fastlayers")` works too.
"""

import inspect
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fastlayers import ops
from fastlayers.nn.attention import attention_with_weights

NAME = "fastlayers"


class CausalParts(NamedTuple):
    """A causal mask (B, 1, Sq, Sk) as options of ops.attention, so that the kernel skips what is hidden.

    Kept beside the mask, as its attribute `fastlayers_parts`: whatever a model does to the mask gives a new tensor
    without it, and then the mask itself counts.
    """

    padding: torch.Tensor | None  # (B, 1, 1, Sk), True for tokens
    window: tuple | None
    alignment: str


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    softcap=None,
    sliding_window=None,
    s_aux=None,
    position_bias=None,
    cache=None,
    **kwargs,
):
    """transformers' attention function: query (B, Hq, Sq, D), key, value (B, Hk, Sk, D) -> (B, Sq, Hq, D), weights.

    attention_mask is None (then the module's is_causal counts, as with sdpa), bool (True attends) or additive, and
    complete: it already holds causality and window. s_aux are gpt-oss' sinks (Hq,). weights is None unless
    output_attentions is asked for, which takes plain torch.
    """
    if cache is not None or "_fastlayers_left" in module.__dict__:
        given = {"position_bias": position_bias, "cache": cache}  # not every release of transformers takes both
        kwargs.update((name, value) for name, value in given.items() if value is not None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        attention_mask, is_causal = _add_bias(attention_mask, position_bias, is_causal, query, key), False
    if kwargs.get("output_attentions") and softcap is None and s_aux is None and not is_causal:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        output, weights = attention_with_weights(query, key, value, attention_mask, dropout, scaling)
        return output.transpose(1, 2).contiguous(), weights
    parts = getattr(attention_mask, "fastlayers_parts", None)
    if parts is None:
        parts = CausalParts(attention_mask, None, "top_left")
    else:
        is_causal = True
    output = ops.attention(
        query,
        key,
        value,
        parts.padding,
        dropout,
        is_causal,
        scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        window=parts.window,
        softcap=softcap or 0.0,
        sinks=s_aux,
        causal_alignment=parts.alignment,
    )
    return output.transpose(1, 2).contiguous(), None


def _add_bias(attention_mask, position_bias, is_causal, query, key):
    """One additive mask from a mask and T5's position bias (B or 1, H, Sq, Sk)."""
    if attention_mask is None and is_causal:
        attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return position_bias.masked_fill(~attention_mask, float("-inf"))
    return position_bias + attention_mask


def attention_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    use_vmap=False,
    **kwargs,
):
    """transformers' mask function: padding alone stays (B, 1, 1, Sk), or None where nothing is padded.

    attention_mask: the 2-D padding mask (B, Sk), True for tokens, or None. Every other mask is sdpa's, a causal one
    with its CausalParts beside it.
    """
    if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip and not use_vmap:
        return _padding(attention_mask, kv_length, kv_offset)
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        allow_is_causal_skip,
        allow_is_bidirectional_skip,
        use_vmap,
        **kwargs,
    )
    if mask is not None and allow_is_causal_skip and q_length > 1 and not torch.compiler.is_compiling():
        window = _window(mask_function, local_size, kwargs.get("config"))
        alignment = _alignment(q_length, kv_length, q_offset, kv_offset)
        if window is not None and alignment is not None:
            padding = _padding(attention_mask, kv_length, kv_offset)
            mask.fastlayers_parts = CausalParts(padding, window, alignment)
    return mask


def _padding(attention_mask, kv_length, kv_offset):
    """The 2-D padding mask as (B, 1, 1, Sk), or None where nothing is padded."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    if not torch.compiler.is_compiling() and padding.all():
        return None
    return padding[:, None, None, :]


def _window(mask_function, local_size, config):
    """The window of a causal mask that transformers allows to skip; None where it is something else (chunks)."""
    if local_size is None:
        return (None, None) if mask_function is causal_mask_function else None
    is_window = getattr(config, "sliding_window", None) == local_size
    is_chunk = getattr(config, "attention_chunk_size", None) is not None
    return (local_size - 1, None) if is_window and not is_chunk else None


def _alignment(q_length, kv_length, q_offset, kv_offset):
    """Where the causal diagonal lies; None where it is at neither corner, or known only when the model runs."""
    if isinstance(q_offset, torch.Tensor):
        return None
    if q_offset == kv_offset:
        return "top_left"
    return "bottom_right" if q_offset + q_length == kv_offset + kv_length else None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)


class PreviousAttention:
    """Marks a swapped attention module with the implementation it had.

    Unpickling one imports this module, which registers "fastlayers" with transformers.
    """

    def __init__(self, name):
        self.name = name


def uses_interface(module):
    """Whether a module's forward asks transformers' AttentionInterface which function to call."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def plan_attention(plan, model):
    recorded = {id(m.config): m._fastlayers_previous.name for m in model.modules() if _is_switched(m)}
    for name, module in model.named_modules():
        if _is_switched(module):
            plan.skip()
        elif uses_interface(module):
            _plan_module(plan, name, module, recorded)
        elif _is_old_attention(module):
            plan.leave(name, module, "its forward does not go through transformers' AttentionInterface")


def _plan_module(plan, name, module, recorded):
    """recorded: by the id of a config that an earlier swap switched, the implementation it had."""
    config = module.config
    previous = recorded.get(id(config), config._attn_implementation)
    if previous == NAME:
        plan.skip()
    elif getattr(config, "output_attentions", False):
        plan.leave(name, module, "config.output_attentions asks for the weights, which only 'eager' returns")
    elif not plan.swap(name, module, "ops.attention", lambda: _switch(module, previous)):
        plan.actions.append(lambda: setattr(module, "_fastlayers_left", True))


def _is_switched(module):
    return "_fastlayers_previous" in module.__dict__


def _switch(module, previous):
    module._fastlayers_previous = PreviousAttention(previous)
    module.__dict__.pop("_fastlayers_left", None)
    module.config._attn_implementation_internal = NAME


def _is_old_attention(module):
    kind = type(module)
    if not kind.__module__.startswith("transformers.") or "Attention" not in kind.__name__:
        return False
    has_linear = any(isinstance(child, torch.nn.Linear) for child in module.children())
    return has_linear and not any(map(uses_interface, module.modules()))


def restore_attention(model):
    for module in model.modules():
        module.__dict__.pop("_fastlayers_left", None)
        previous = module.__dict__.pop("_fastlayers_previous", None)
        if previous is not None:
            module.config._attn_implementation_internal = previous.name
