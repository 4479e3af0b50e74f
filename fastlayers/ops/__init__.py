"""The fused ops as functions: each validates its arguments, picks a backend, and is differentiable."""

from fastlayers.ops.linear_act import gated_linear_act, linear_act

__all__ = ["gated_linear_act", "linear_act"]
