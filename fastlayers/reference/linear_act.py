"""Linear + activation in plain torch."""

import torch.nn.functional as F

from fastlayers.reference.activations import ACTIVATIONS


def linear_act(input, weight, bias=None, activation="gelu"):
    """activation(input @ weight.T + bias); autograd saves what torch's own functions save."""
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


def gated_linear_act(input, weight_gate, weight_up, bias_gate=None, bias_up=None, activation="silu"):
    """activation(input @ weight_gate.T + bias_gate) * (input @ weight_up.T + bias_up)."""
    gate = ACTIVATIONS[activation](F.linear(input, weight_gate, bias_gate))
    return gate * F.linear(input, weight_up, bias_up)
