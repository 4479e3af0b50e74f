"""Recognises what a module's forward does, so that a Linear and its activation in it can run as one op.

A forward is recognised when it compiles to the same bytecode as one of the templates below, whatever its attributes
are called: `_chain3` stands for BertIntermediate and CLIPMLP alike. Such a module is swapped by changing its class to a
subclass with another forward, so that parameters, hooks and isinstance stay as they were.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fastlayers.nn.fuse import gated, run_chain


class Recognised(NamedTuple):
    method: str  # the method that is recognised
    names: tuple  # the attributes it uses, in the order in which `run` takes them
    run: Callable  # run(modules, input)
    pairs: tuple  # indices into names: (what may be a Linear, what may be its activation)


def _chain2(self, x):
    x = self.a(x)
    x = self.b(x)
    return x


def _chain3(self, x):
    x = self.a(x)
    x = self.b(x)
    x = self.c(x)
    return x


def _chain4(self, x):
    x = self.a(x)
    x = self.b(x)
    x = self.c(x)
    x = self.d(x)
    return x


def _chain5(self, x):
    x = self.a(x)
    x = self.b(x)
    x = self.c(x)
    x = self.d(x)
    x = self.e(x)
    return x


def _chain4_renamed(self, input):
    x = self.a(input)
    x = self.b(x)
    x = self.c(x)
    x = self.d(x)
    return x


def _nested2(self, x):
    return self.b(self.a(x))


def _nested3(self, x):
    return self.c(self.b(self.a(x)))


def _gated(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x))


def _gated_named(self, x):
    down = self.down(self.act(self.gate(x)) * self.up(x))
    return down


def _pooler(self, x):
    first = x[:, 0]
    pooled = self.dense(first)
    pooled = self.activation(pooled)
    return pooled


def _run_nested(modules, input):
    return run_chain(modules[::-1], input)


def _run_gated(modules, input):
    down, act, gate, up = modules
    return down(gated(gate, up, act, input))


def _run_pooler(modules, input):
    return run_chain(modules, input[:, 0])


_TEMPLATES = {
    _chain2: run_chain,
    _chain3: run_chain,
    _chain4: run_chain,
    _chain5: run_chain,
    _chain4_renamed: run_chain,
    _nested2: _run_nested,
    _nested3: _run_nested,
    _gated: _run_gated,
    _gated_named: _run_gated,
    _pooler: _run_pooler,
}


def _fingerprint(function):
    code = function.__code__
    constants = tuple(repr(c) for c in code.co_consts if not isinstance(c, str))
    takes = (code.co_argcount, code.co_kwonlyargcount, code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS))
    return code.co_code, len(code.co_names), constants if len(constants) > 1 else (), takes


_RUNS = {_fingerprint(template): run for template, run in _TEMPLATES.items()}


@functools.cache
def recognise(kind):
    """What an instance of the class `kind` computes, or None where no template fits."""
    for method in ("forward", "ff_chunk"):
        if not hasattr(kind, method):
            continue
        function = inspect.unwrap(getattr(kind, method))
        run = _RUNS.get(_fingerprint(function)) if inspect.isfunction(function) else None
        if run is None:
            continue
        names = function.__code__.co_names
        if run is _run_gated:
            pairs = ((2, 1),)
        elif run is _run_nested:
            pairs = tuple((i + 1, i) for i in range(len(names) - 1))
        else:
            pairs = tuple((i, i + 1) for i in range(len(names) - 1))
        return Recognised(method, names, run, pairs)
    return None


@functools.cache
def fused_class(kind):
    """The subclass of `kind` (a recognised class, or one with Sequential's forward) that fuses, made once."""
    if kind.forward is nn.Sequential.forward:
        method, body = "forward", lambda self, input: run_chain(list(self), input)
    else:
        recognised = recognise(kind)
        method = recognised.method

        def body(self, *args, **kwargs):
            (input,) = (*args, *kwargs.values())
            return recognised.run([getattr(self, name) for name in recognised.names], input)

        body.__signature__ = inspect.signature(getattr(kind, method))  # transformers counts the parameters

    def __reduce_ex__(self, protocol):
        _, _, *state = kind.__reduce_ex__(self, protocol)
        return _new_fused, (kind,), *state

    members = {method: body, "__reduce_ex__": __reduce_ex__, "__module__": kind.__module__}
    return type(f"Fused{kind.__name__}", (kind,), members)


def _new_fused(kind):
    cls = fused_class(kind)
    return cls.__new__(cls)
