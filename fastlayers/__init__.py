"""Fused attention, linear+activation and Adam for PyTorch, on CPU and NVIDIA GPUs."""

from fastlayers import nn, ops, optim
from fastlayers.backends import BackendError, explain, use_backend
from fastlayers.swap import SwapReport, swap_, unswap_

__version__ = "0.1.0"

__all__ = ["BackendError", "SwapReport", "explain", "nn", "ops", "optim", "swap_", "unswap_", "use_backend"]
