"""Argument checks shared by the ops: each raises one sentence that says what was wanted and what came."""

import torch


def check_tensor(op, name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} has to be a torch.Tensor, got {type(value).__name__}")


def check_beside(op, name, tensor, first_name, first):
    """Both on one device."""
    if tensor.device != first.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, {first_name} on {first.device}")


def check_same_dtype(op, name, tensor, first_name, first):
    if tensor.dtype != first.dtype:
        raise ValueError(f"{op}: {name} is {tensor.dtype}, {first_name} is {first.dtype}")


def check_floating(op, name, tensor):
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} has to be a floating-point tensor, got {tensor.dtype}")


def check_number(op, name, value, low, high):
    """A real number in [low, high]; NaN is not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} has to be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} has to be between {low} and {high}, got {value}")
