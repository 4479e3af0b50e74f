"""Fused optimizers: each owns its state and calls one op."""
