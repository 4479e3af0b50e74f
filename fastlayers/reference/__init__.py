"""Each op in a few lines of plain torch: the specification, the oracle of the tests, and the fallback."""

from fastlayers.reference.activations import ACTIVATIONS
from fastlayers.reference.adam import adam_step, grad_norm
from fastlayers.reference.attention import attention, attention_decode
from fastlayers.reference.linear_act import gated_linear_act, linear_act

__all__ = ["ACTIVATIONS", "adam_step", "attention", "attention_decode", "gated_linear_act", "grad_norm", "linear_act"]
