"""Which implementation serves a call: cpu (C++), cuda (CUDA C++), triton, or reference (plain torch).

cublas is a fifth name, for linear layers: torch's own product, and one CUDA pass for bias and activation.
"""

import functools
import importlib.util
import os

import torch

from fastlayers import _native, choices

NAMES = ("cpu", "cuda", "triton", "cublas", "reference")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""


_reasons = {}  # op -> backend -> function(facts) that returns None, or why the backend cannot serve the call
_facts = {}  # op -> function(*args, **kwargs) of the public op, returning the facts of that call
_forced = os.environ.get("FASTLAYERS_BACKEND") or None  # every call is served by this one, where set

# Where the tensors of the backends cuda and triton lie, and the operators of cuda: tests/simulator puts a simulated
# GPU there, whose tensors are on the CPU.
cuda_device, cuda_operators = "cuda", torch.ops.fastlayers


def constant_when_compiled(function):
    """torch.compile calls it while it traces and takes the answer for good: torch.compiler.assume_constant_result,
    whose import would bring in the whole compiler, and triton. A function with a cache of its own is looked through."""
    function._dynamo_marked_constant = True
    return function


@constant_when_compiled
def cuda_capability():
    """(8, 0) of the current GPU; of the simulated one where there is one."""
    return _capability_of(torch.cuda.current_device())


_capability_of = functools.cache(torch.cuda.get_device_capability)


def operators(backend):
    """The torch.ops namespace with the operators of the backend cpu, cuda, cublas or triton."""
    if backend == "triton":
        _load_triton()
        return torch.ops.fastlayers_triton
    return cuda_operators if backend in ("cuda", "cublas") else torch.ops.fastlayers


def register(op, *, facts, **reasons):
    """Declare an op: how to get the facts of a call, and per backend a function from facts to a reason or None.

    facts are a dict with at least device (a string such as "cpu"), index (of the device, or None) and dtype, and, where
    fastlayers.choices has entries for the op, sizes and needs_gradient; is_plain where torch's own function is to
    serve on a GPU, doing the same in one kernel. Order of `reasons` is preference where there is no such entry.
    """
    _facts[op] = facts
    _reasons[op] = reasons


def facts(op, *args, **kwargs):
    """The facts of a call fastlayers.ops.<op>(*args, **kwargs) that decide who can serve it."""
    return _facts[op](*args, **kwargs)


def check_name(backend):
    if backend not in NAMES:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(NAMES)}")


def native_reason(facts):
    """Why the compiled CPU kernels cannot run here at all, or None. Shared by every op's cpu reason."""
    if facts["device"] != "cpu":
        return f"the tensors are on {facts['device']}, not on cpu"
    if _native.error:
        return _native.error
    if _native.cpu_isa == "none":
        return "the CPU kernels need x86-64 with AVX2 and FMA"
    return None


def cuda_reason(facts):
    """The same of the CUDA kernels."""
    if facts["device"] != cuda_device:
        return f"the tensors are on {facts['device']}, not on {cuda_device}"
    if cuda_operators is torch.ops.fastlayers and not _cuda_built():
        return _native.error or "the library was built without CUDA kernels; rebuild it where nvcc is found"
    return None


def triton_reason(facts):
    """The same of the Triton kernels."""
    if not _triton_installed():
        return "triton is not installed (pip install triton)"
    if facts["device"] != cuda_device and not triton_interpreted():
        return f"the tensors are on {facts['device']}, not on cuda (TRITON_INTERPRET=1 runs it on cpu)"
    if facts.get("index") is not None and facts["index"] != _current_gpu():
        return (
            f"triton launches on the current GPU, cuda:{_current_gpu()}, and the tensors are on cuda:{facts['index']}"
        )
    return None


@constant_when_compiled
def _current_gpu():
    return torch.cuda.current_device()


@constant_when_compiled
def _triton_installed():
    return importlib.util.find_spec("triton") is not None


@constant_when_compiled
def triton_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_when_compiled
def _load_triton():
    """Import triton and the operators in it, which takes a second: not before a call asks for them."""
    import fastlayers.triton.operators  # noqa: F401


@constant_when_compiled
def _cuda_built():
    return _built_for_cuda()


@functools.cache
def _built_for_cuda():
    return _native.error is None and bool(_native.build_info().get("cuda_archs"))


def choose(op, facts, backend=None):
    """The backend for a call: the one asked for (argument, use_backend, FASTLAYERS_BACKEND), else the best.

    raises BackendError where the one asked for cannot serve the call, ValueError for an unknown name
    """
    wanted = backend or _forced
    if wanted:
        check_name(wanted)
        reason = why_not(op, wanted, facts)
        if reason:
            raise BackendError(f"{op}: backend {wanted!r} cannot serve this call: {reason}")
        return wanted
    if facts.get("is_plain") and facts["device"] == cuda_device:
        return "reference"
    choice = choice_for(op, facts)
    for name in choice.backends if choice else ():
        if why_not(op, name, facts) is None:
            return name
    for name, reason in _reasons[op].items():
        if reason(facts) is None:
            return name
    return "reference"


def choice_for(op, facts):
    """The entry of the table of choices that a call on a GPU goes by, or None."""
    sizes = facts.get("sizes")
    if sizes is None or facts["device"] != cuda_device or any(type(size) is not int for size in sizes):
        return None
    dtype = str(facts["dtype"]).removeprefix("torch.")
    return _find_choice(op, cuda_capability(), dtype, facts["needs_gradient"], sizes)


@constant_when_compiled
def _find_choice(*call):
    return choices.find(*call)


def why_not(op, backend, facts):
    """None where `backend` can serve a call with these facts, else the reason."""
    if backend == "reference":
        return None
    reason = _reasons[op].get(backend)
    return reason(facts) if reason else f"{op} has no {backend} kernel yet"


class use_backend:
    """`with use_backend("reference"): ...` forces a backend for every op, in the whole process; None lifts it."""

    def __init__(self, backend):
        if backend is not None:
            check_name(backend)
        self.backend = backend

    def __enter__(self):
        global _forced
        self.previous, _forced = _forced, self.backend

    def __exit__(self, *exception):
        global _forced
        _forced = self.previous


def explain(op, *args, **kwargs):
    """Print and return, per backend, whether it would serve fastlayers.ops.<op>(*args, **kwargs), and why not."""
    if op not in _facts:
        raise ValueError(f"op {op!r} is not one of {', '.join(sorted(_facts))}")
    kwargs.pop("backend", None)
    found = facts(op, *args, **kwargs)
    answers = {name: why_not(op, name, found) for name in NAMES}
    chosen = choose(op, found)
    choice = choice_for(op, found)
    because = f" ({choice.source})" if choice and chosen in choice.backends else ""
    for name, reason in answers.items():
        verdict = f"chosen{because}" if name == chosen else "can serve" if reason is None else f"cannot serve: {reason}"
        print(f"{op}: {name:<9} {verdict}")
    return answers
