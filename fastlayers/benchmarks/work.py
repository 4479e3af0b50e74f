"""From functions to candidates: forward, backward or both, on inputs in turn, each checked against float64."""

import shutil
from dataclasses import dataclass

import torch

from fastlayers import backends
from fastlayers.agreement import deviation
from fastlayers.benchmarks.inputs import Rotation
from fastlayers.benchmarks.runner import OURS, Candidate, Skip, one_line

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


@dataclass
class Work:
    """What the candidates of a case have in common.

    call, small: the case's arguments, and such that float64 can compute quickly, for the check
    inputs:      call -> (tensors, gradient of the output)
    reference:   call -> function(*tensors) in plain torch, right in any dtype
    """

    setting: object
    passes: str
    call: object
    small: object
    inputs: object
    reference: object
    bytes_each: int

    def __post_init__(self):
        self.rotation = None

    def candidate(self, maker, checked=True):
        """maker: call -> function(*tensors), or raises Skip."""
        return Candidate(self._step(maker(self.call)), (lambda: self._check(maker)) if checked else None)

    def _made(self, call):
        tensors, dout = self.inputs(call)
        return [tensor.requires_grad_(self.passes != FORWARD) for tensor in tensors], dout

    def _next(self):
        if self.rotation is None:  # shared by the candidates of a case, made when the first of them runs
            tensors, dout = self._made(self.call)

            def copies():
                return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors], dout.clone()

            self.rotation = Rotation(copies, self.bytes_each, self.setting)
        return next(self.rotation)

    def _step(self, function):
        if self.passes == BACKWARD:
            return self._backward_step(function)

        def step():
            return _results(function, *self._next(), self.passes)

        return step

    def _backward_step(self, function):
        """On one set of inputs, since what the forward saved of each would have to be kept."""
        kept = []

        def step():
            if not kept:
                tensors, dout = self._next()
                kept.extend((function(*tensors), tensors, dout))
            return torch.autograd.grad(*kept, retain_graph=True)

        return step

    def _check(self, maker):
        tensors, dout = self._made(self.small)
        exact_tensors = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
        passes = self.passes if self.passes == FORWARD else BOTH
        reference = self.reference(self.small)
        exact = _results(reference, exact_tensors, dout.double(), passes)
        eager = _results(reference, tensors, dout, passes)
        found = _results(maker(self.small), tensors, dout, passes)
        return max(map(deviation, found, exact, eager), key=lambda one: one.ratio)


def _results(function, tensors, dout, passes):
    with torch.set_grad_enabled(passes == BOTH):
        out = function(*tensors)
        return (out, *torch.autograd.grad(out, tensors, dout)) if passes == BOTH else (out,)


def gather(makers):
    """{name: function() that returns a candidate or raises} -> {name: Candidate or Skip}."""
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Skip as reason:
            found[name] = reason
        except Exception as error:  # a package that is installed and broken stops nobody
            found[name] = Skip(one_line(error))
    return found


def our_backends(op, facts):
    """{candidate: backend}: what a call that names none gets, and on a GPU each kernel by name, or why it cannot."""
    found = {OURS: None}
    if facts["device"] == "cpu":
        return found
    for name in backends._reasons[op]:
        if name not in ("cpu", "reference"):
            reason = backends.why_not(op, name, facts)
            found[f"{OURS} ({name})"] = Skip(reason) if reason else name
    return found


def our_makers(op, facts, make):
    """The same as makers for gather; make: backend -> candidate."""

    def maker(backend):
        def made():
            if isinstance(backend, Skip):
                raise backend
            return make(backend)

        return made

    return {name: maker(backend) for name, backend in our_backends(op, facts).items()}


def compiled(function, device):
    """torch.compile(function); raises Skip where its code generators cannot work."""
    if device == "cuda" and backends.triton_reason({"device": "cuda"}):
        raise Skip(backends.triton_reason({"device": "cuda"}))
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise Skip("torch.compile needs a C++ compiler, such as g++; none was found")
    torch.compiler.reset()  # so that it compiles for these very shapes, not for any, and never gives up
    return torch.compile(function)
