"""Which of the ops' activations a module or a function computes."""

import torch
import torch.nn.functional as F
from torch import nn

_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.leaky_relu: "leaky_relu",
}

_MODULES = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}

# transformers.activations by class name, so that transformers need not be imported
_TRANSFORMERS = {
    "AccurateGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "LinearActivation": "identity",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu_squared",
    "SiLUActivation": "silu",
}

LEAKY_RELU_SLOPE = 0.01  # the only slope that the ops have: torch's default


def activation_name(activation):
    """The name that ops.linear_act gives to a module or a function, or None where it has none.

    Only exact classes count: a subclass may compute something else.
    """
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation)
    kind = type(activation)
    if kind in _MODULES:
        return _MODULES[kind]
    if kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if kind is nn.LeakyReLU:
        return "leaky_relu" if activation.negative_slope == LEAKY_RELU_SLOPE else None
    if kind.__module__ == "transformers.activations":
        return _TRANSFORMERS.get(kind.__name__)
    return None


def looks_like_activation(module):
    """Whether a module is an elementwise activation of torch's or transformers' own, known to the ops or not."""
    kind = type(module)
    if activation_name(module) is not None:
        return kind is not nn.Identity
    if kind.__module__ not in ("torch.nn.modules.activation", "transformers.activations"):
        return False
    return not isinstance(module, nn.MultiheadAttention) and "softmax" not in kind.__name__.lower()
