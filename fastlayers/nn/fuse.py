"""Runs modules in the order given, each Linear and the activation behind it as one op.

Whether two modules are fused is decided at every call, so that hooks, wrappers (LoRA, FSDP, parametrizations) and
replaced children are never bypassed: they run as they would without fastlayers.
"""

from torch import nn

from fastlayers import ops
from fastlayers.nn.activations import activation_name
from fastlayers.nn.linear import FusedLinear


def has_hooks(module):
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain_linear(module):
    """A Linear (or transformers' Conv1D) that nothing observes or changes: its weights say all that it does."""
    kind = type(module)
    known = (
        kind is nn.Linear
        or (kind is FusedLinear and module.activation == "identity")
        or (kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils")
    )
    return known and not has_hooks(module) and "forward" not in module.__dict__


def fused_name(linear, activation):
    """The activation's name where linear and activation can run as one op, else None."""
    if not is_plain_linear(linear) or (isinstance(activation, nn.Module) and has_hooks(activation)):
        return None
    return activation_name(activation)


def linear_then(linear, activation, input):
    """activation(linear(input)), in one op where that is the same."""
    name = fused_name(linear, activation)
    if name is None:
        return activation(linear(input))
    is_transposed = not isinstance(linear, nn.Linear)  # Conv1D keeps its weight as (in_features, out_features)
    weight = linear.weight.t() if is_transposed else linear.weight
    return ops.linear_act(input, weight, linear.bias, name)


def gated(gate, up, activation, input):
    """activation(gate(input)) * up(input), in one op where that is the same."""
    name = fused_name(gate, activation)
    if name is None or not is_plain_linear(up) or not isinstance(gate, nn.Linear) or not isinstance(up, nn.Linear):
        return activation(gate(input)) * up(input)
    return ops.gated_linear_act(input, gate.weight, up.weight, gate.bias, up.bias, name)


def run_chain(modules, input):
    """modules[-1](... modules[1](modules[0](input))), with every Linear and activation side by side in one op."""
    index = 0
    while index < len(modules):
        pair = modules[index : index + 2]
        if len(pair) == 2 and fused_name(*pair) is not None:
            input = linear_then(*pair, input)
            index += 2
        else:
            input = modules[index](input)
            index += 1
    return input
