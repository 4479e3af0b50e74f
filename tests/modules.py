"""Compares a fused module with the original it stands for, by the tolerance rule: outputs and every gradient."""

import copy

import torch

from tests.backends import BACKENDS
from tests.numerics import assert_accurate

MODULE_BACKENDS = [*BACKENDS["attention"], "reference"]


def double(value):
    """The same value, tensors in float64, detached, and leaves where the original was one."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return type(value)(double(v) for v in value)
    if isinstance(value, dict):
        return {k: double(v) for k, v in value.items()}
    return value


def copied(value):
    """The same value with fresh leaves; what was one tensor stays one."""
    return copy.deepcopy(value)


def tensors_of(output):
    """The floating tensors in a module's output: a tensor, a tuple, or a Hugging Face ModelOutput."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


def run(module, args, kwargs, autocast=None):
    """{what: tensor}: outputs, gradients of the floating inputs that want one, and gradients of the parameters."""
    module.zero_grad()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        outputs = tensors_of(module(*args, **kwargs))
    generator = torch.Generator().manual_seed(7)
    loss = sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs)
    loss.backward()
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for i, value in enumerate((*args, *kwargs.values())):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            found[f"gradient of input {i}"] = value.grad
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return found


def assert_agrees(ours, exact, eager):
    """The rule on three results of run(): outputs each by itself, all gradients as one vector.

    A gradient that is 0 but for rounding (a key bias, which softmax cancels) has no accuracy of its own.
    """
    assert ours.keys() == eager.keys() == exact.keys()
    gradients = {}
    for what in eager:
        if what.startswith("output"):
            assert_accurate(ours[what], exact[what], eager[what], what)
        else:
            assert ours[what].shape == eager[what].shape, what
            gradients.setdefault(eager[what].dtype, []).append(what)
    for dtype, names in gradients.items():
        vectors = [torch.cat([found[name].flatten() for name in names]) for found in (ours, exact, eager)]
        assert_accurate(*vectors, f"{dtype} gradients")


def assert_same_module(original, fused, *args, autocast=None, **kwargs):
    """Assert that fused computes what original does; both in one dtype, with the same parameters."""
    exact = run(copy.deepcopy(original).double(), *copied(double((args, kwargs))))
    eager = run(original, *copied((args, kwargs)), autocast)
    ours = run(fused, *copied((args, kwargs)), autocast)
    assert_agrees(ours, exact, eager)


def assert_identical(ours, wanted):
    """Two results of run(), bit by bit."""
    assert ours.keys() == wanted.keys()
    for what in wanted:
        assert torch.equal(ours[what], wanted[what]), what


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()
