"""Fakes and gradients of the operators, in whichever torch.ops namespace holds them: compiled ones and Triton's."""

import functools

import torch

from fastlayers import _native

_fakes = {}  # operator -> function
_gradients = {}  # operator -> (backward, setup_context)


def register_fake(operator, fake):
    """Declare what torch.ops.fastlayers.<operator> returns where there is no memory behind its tensors."""
    _fakes[operator] = fake
    if not _native.error:
        torch.library.register_fake(f"fastlayers::{operator}", fake)


def register_autograd(operator, backward, setup_context=None):
    """Declare the gradient of torch.ops.fastlayers.<operator>.

    backward(operators, ctx, *grads): `operators` is the namespace that the forward was called in, so that the
            gradient runs where the forward ran
    setup_context: as torch.library.register_autograd takes it
    """
    _gradients[operator] = backward, setup_context
    if not _native.error:
        attach_autograd(operator, "fastlayers")


def attach_fake(operator, namespace):
    """Give torch.ops.<namespace>.<operator> the fake that was declared for this operator."""
    torch.library.register_fake(f"{namespace}::{operator}", _fakes[operator])


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
