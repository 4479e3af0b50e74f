"""The fused ops as functions: each validates its arguments, picks a backend, and is differentiable."""

from fastlayers.ops.adam import adam_step, grad_norm
from fastlayers.ops.attention import attention, varlen_attention
from fastlayers.ops.decode_attention import decode_attention
from fastlayers.ops.linear_act import gated_linear_act, linear_act

__all__ = [
    "adam_step",
    "attention",
    "decode_attention",
    "gated_linear_act",
    "grad_norm",
    "linear_act",
    "varlen_attention",
]
