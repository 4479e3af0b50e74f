"""Fused optimizers: each owns its state and calls one op."""

from fastlayers.optim.adam import FusedAdam, FusedAdamW

__all__ = ["FusedAdam", "FusedAdamW"]
