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
        attach_native_autograd(operator, "fastlayers", _library())


def attach_fake(operator, namespace):
    """Give torch.ops.<namespace>.<operator> the fake that was declared for this operator."""
    torch.library.register_fake(f"{namespace}::{operator}", _fakes[operator])


def attach_autograd(operator, namespace):
    """Give torch.ops.<namespace>.<operator>, defined in Python, the gradient that was declared for this operator."""
    if operator in _gradients:
        backward, setup_context = _gradients[operator]
        bound = functools.partial(_run, backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(f"{namespace}::{operator}", bound, setup_context=setup_context)


@functools.cache
def _library():
    return torch.library.Library("fastlayers", "FRAGMENT")  # which has to live as long as the process


def attach_native_autograd(operator, namespace, library):
    """The same for one defined in C++, as torch.library.register_autograd does it, but for the defaults that it fills
    in: ours has none, and for an operator of 19 arguments that alone was seen to take 70 us of every call.
    """
    if operator not in _gradients:
        return
    backward, setup_context = _gradients[operator]
    operators = getattr(torch.ops, namespace)
    call = getattr(operators, operator).default

    def run(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            return call.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *args, keyset = args
            output = run(keyset, args)
            if setup_context:
                setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            found = _run(backward, operators, ctx, *grads)
            return (*found, None) if isinstance(found, tuple) else (found, None)

    Gradient.__name__ = Gradient.__qualname__ = f"{operator}_gradient"

    def kernel(keyset, *args):
        wanted = torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
        return Gradient.apply(*args, keyset) if wanted else run(keyset, args)

    library.impl(operator, kernel, "Autograd", with_keyset=True)


def _run(backward, operators, ctx, *grads):
    """Where a gradient of this gradient may be asked for (create_graph), every grad counts as requiring one: what
    `backward` returns belongs to the graph then, even where no tensor that it reads does, and refuses.
    """
    if torch.is_grad_enabled():
        grads = [g if g is None or g.requires_grad else g.detach().requires_grad_() for g in grads]
    return backward(operators, ctx, *grads)
