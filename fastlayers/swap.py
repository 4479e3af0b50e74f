"""swap_ puts fused layers into an existing model in place; unswap_ takes them out again.

A module is swapped by changing its class to a subclass with another forward. Names, parameters, hooks, flags and
identity therefore stay what they were, and so do isinstance checks and optimizers that hold the parameters.
"""

import re
import sys
from dataclasses import dataclass, field

from torch import nn

from fastlayers.integrations import forwards
from fastlayers.nn import FusedLinear, FusedMultiheadAttention, FusedTransformerEncoderLayer
from fastlayers.nn.activations import activation_name, looks_like_activation
from fastlayers.nn.fuse import fused_name, has_hooks, is_plain_linear

_FUSED = {
    nn.Linear: FusedLinear,
    nn.MultiheadAttention: FusedMultiheadAttention,
    nn.TransformerEncoderLayer: FusedTransformerEncoderLayer,
}


@dataclass(frozen=True)
class SwapEntry:
    name: str  # as in model.named_modules()
    kind: str  # the class it had
    note: str  # what it runs now, or why it was left


@dataclass
class SwapReport:
    """What swap_ replaced, what it left, and why. print(report) shows a table."""

    swapped: list[SwapEntry] = field(default_factory=list)
    left: list[SwapEntry] = field(default_factory=list)
    already: int = 0  # modules that were fused before

    def __str__(self):
        lines = [f"swapped {len(self.swapped)} modules, left {len(self.left)}, {self.already} were fused already"]
        for title, entries in (("swapped", self.swapped), ("left", self.left)):
            rows = _rows(entries)
            widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else ()
            for row in rows:
                lines.append(f"{title:<8}" + "  ".join(c.ljust(w) for c, w in zip(row, widths)) + f"  {row[3]}")
        return "\n".join(lines)


def _rows(entries):
    """(name, count, kind, note) with the layers of a stack in one row: encoder.layer.*.output.dense."""
    groups = {}
    for entry in entries:
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", entry.name) or "(model)", entry.kind, entry.note)
        groups[key] = groups.get(key, 0) + 1
    return [(name, f"x{count}", kind, note) for (name, kind, note), count in groups.items()]


class Plan:
    """What a swap will do, before it does it: planners call swap, leave and skip once per module they know."""

    def __init__(self, filter_fn):
        self.filter_fn = filter_fn
        self.report = SwapReport()
        self.actions = []
        self.unwilling = []  # entries that strict=True complains about

    def swap(self, name, module, note, action):
        """Plan action() and return True, or leave the module where the caller's filter says so."""
        if self.filter_fn is not None and not self.filter_fn(name, module):
            self.report.left.append(SwapEntry(name, type(module).__name__, "filter_fn"))
            return False
        self.report.swapped.append(SwapEntry(name, type(module).__name__, note))
        self.actions.append(action)
        return True

    def leave(self, name, module, why):
        entry = SwapEntry(name, type(module).__name__, why)
        self.report.left.append(entry)
        self.unwilling.append(entry)

    def skip(self):
        self.report.already += 1


def swap_(model, *, filter_fn=None, strict=False):
    """Replace, in place, what fastlayers can run faster, and return a SwapReport.

    Swapped are torch's MultiheadAttention, TransformerEncoderLayer and Linear, a Linear with its activation in a
    Sequential or in a module that runs its children one after the other, gated feed-forward blocks, and Hugging Face
    attention. The model keeps its state_dict, its parameters (the same objects), hooks, flags, device and dtype.

    filter_fn: filter_fn(name, module) -> bool; False leaves that module as it is
    strict:    raise, before anything is changed, if something that looks swappable would be left for another reason
    raises     TypeError for a model that is no torch.nn.Module, ValueError under strict
    """
    _check_model("swap_", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"swap_: filter_fn has to be callable, got {type(filter_fn).__name__}")
    plan = Plan(filter_fn)
    inside_attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if id(module) not in inside_attention:
            _plan_module(plan, name, module)
    if "transformers" in sys.modules:
        from fastlayers.integrations import huggingface

        huggingface.plan_attention(plan, model)
    if strict and plan.unwilling:
        reasons = "; ".join(f"{e.name or '(model)'} ({e.kind}): {e.note}" for e in plan.unwilling)
        raise ValueError(f"swap_: strict, and these would be left: {reasons}")
    for action in plan.actions:
        action()
    return plan.report


def unswap_(model):
    """Undo swap_: every module that it changed gets its class, and its attention implementation, back."""
    _check_model("unswap_", model)
    for module in model.modules():
        original = module.__dict__.pop("_swapped_from", None)
        if original is not None:
            module.__class__ = original
    if "transformers" in sys.modules:
        from fastlayers.integrations import huggingface

        huggingface.restore_attention(model)


def _check_model(function, model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model has to be a torch.nn.Module, got {type(model).__name__}")


def _become(module, fused):
    module._swapped_from = type(module)
    module.__class__ = fused


def _plan_module(plan, name, module):
    kind = type(module)
    if kind in _FUSED.values() or "_swapped_from" in module.__dict__:
        plan.skip()
    elif isinstance(module, tuple(_FUSED)):
        _plan_known(plan, name, module)
    elif kind.forward is nn.Sequential.forward:
        _plan_pairs(plan, name, module, list(zip(module._modules.items(), list(module._modules.items())[1:])))
    elif (recognised := forwards.recognise(kind)) is not None:
        children = [(child, getattr(module, child, None)) for child in recognised.names]
        _plan_pairs(plan, name, module, [(children[i], children[j]) for i, j in recognised.pairs])
    elif _has_linear_and_activation(module):
        plan.leave(name, module, "has a Linear and an activation, but swap_ does not know its forward")


def _plan_known(plan, name, module):
    """A module of one of the classes in _FUSED, or of a subclass."""
    fused = _FUSED.get(type(module))
    if fused is None:
        base = next(kind.__name__ for kind in _FUSED if isinstance(module, kind))
        plan.leave(name, module, f"a subclass of {base} may compute something else")
    elif "forward" in module.__dict__:
        plan.leave(name, module, "its forward was replaced on the instance")
    elif not all(p.is_floating_point() for p in module.parameters(recurse=False)):
        plan.leave(name, module, "its parameters are not floating-point")
    else:
        plan.swap(name, module, fused.__name__, lambda: _become(module, fused))


def _plan_pairs(plan, name, module, pairs):
    """A module that runs its children one after the other; pairs: ((name, child), (name, child)) side by side."""
    fused = []
    for (first_name, first), (second_name, second) in pairs:
        if not (_is_linear(first) and _is_activation(second)):
            continue
        if why := _why_not_fused(first, second):
            plan.leave(f"{name}.{first_name}".lstrip("."), first, why)
        else:
            fused.append(f"{first_name}+{second_name}")
    if not fused:
        return
    if "forward" in module.__dict__:
        plan.leave(name, module, "its forward was replaced on the instance")
        return
    cls = forwards.fused_class(type(module))
    plan.swap(name, module, f"{', '.join(fused)} in one op", lambda: _become(module, cls))


def _is_linear(module):
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and is_plain_linear(module))


def _is_activation(module):
    return looks_like_activation(module) if isinstance(module, nn.Module) else activation_name(module) is not None


def _why_not_fused(linear, activation):
    """Why a Linear and the activation behind it cannot be one op, or None."""
    if fused_name(linear, activation) is not None:
        return None
    what = type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "?")
    if has_hooks(linear):
        return f"not fused with {what}: a hook on the Linear would be bypassed"
    if isinstance(activation, nn.Module) and has_hooks(activation):
        return f"not fused with {what}: a hook on it would be bypassed"
    if not is_plain_linear(linear):
        return f"not fused with {what}: a subclass of Linear may compute something else"
    return f"not fused with {what}: the ops do not have this activation"


def _has_linear_and_activation(module):
    children = list(module.children())
    is_container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return not is_container and any(map(_is_linear, children)) and any(map(looks_like_activation, children))
