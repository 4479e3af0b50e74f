"""The fused ops as functions: each validates its arguments, picks a backend, and is differentiable."""
