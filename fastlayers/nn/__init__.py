"""Drop-in modules: each owns its parameters and calls one op."""

from fastlayers.nn.attention import FusedMultiheadAttention
from fastlayers.nn.linear import FusedLinear, FusedMLP, GatedMLP
from fastlayers.nn.transformer import FusedTransformerEncoderLayer

__all__ = ["FusedLinear", "FusedMLP", "FusedMultiheadAttention", "FusedTransformerEncoderLayer", "GatedMLP"]
