"""Gradients of the compiled operators, in whichever torch.ops namespace holds them."""

import functools

import torch

_gradients = {}  # operator -> (backward, setup_context)


def register_autograd(operator, backward, setup_context=None):
    """Declare the gradient of torch.ops.fastlayers.<operator>.

    backward(operators, ctx, *grads): `operators` is the namespace that the forward was called in, so that the
            gradient runs where the forward ran
    setup_context: as torch.library.register_autograd takes it
    """
    _gradients[operator] = backward, setup_context
    attach_autograd(operator, "fastlayers")


def attach_autograd(operator, namespace, lib=None):
    """Give torch.ops.<namespace>.<operator> the gradient that was declared for this operator, if one was."""
    if operator in _gradients:
        backward, setup_context = _gradients[operator]
        bound = functools.partial(_run, backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(f"{namespace}::{operator}", bound, setup_context=setup_context, lib=lib)


def _run(backward, operators, ctx, *grads):
    """Where a gradient of this gradient may be asked for (create_graph), every grad counts as requiring one: what
    `backward` returns belongs to the graph then, even where no tensor that it reads does, and refuses.
    """
    if torch.is_grad_enabled():
        grads = [g if g is None or g.requires_grad else g.detach().requires_grad_() for g in grads]
    return backward(operators, ctx, *grads)
