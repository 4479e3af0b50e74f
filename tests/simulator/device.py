"""backend="cuda" on CPU tensors: the shipped op, launcher and kernel, with the simulator as the GPU."""

import ctypes
import functools
import re

import torch

from fastlayers import backends
from fastlayers.ops._autograd import attach_native_autograd
from tests.simulator import triton_driver
from tests.simulator.launches import allocate, call, device_memory, module_of, on_host, simulate
from tests.simulator.library import NAMESPACE, library

_ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90")
_HOST_ARGUMENTS = {"rng"}  # which the operators read on the CPU; no kernel may

_capability = backends.cuda_capability  # of the GPU that torch sees


class _Request(ctypes.Structure):  # LaunchRequest of runtime/runtime.h
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("shown", ctypes.c_char_p),
        ("ptx", ctypes.c_void_p),
        ("ptx_bytes", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
        ("shared", ctypes.c_uint64),
    ]


class _Facts(ctypes.Structure):
    _fields_ = [("static_shared", ctypes.c_uint64), ("local", ctypes.c_uint64), ("most_threads", ctypes.c_int32)]


class _Callbacks(ctypes.Structure):  # Simulator of runtime/runtime.h
    _fields_ = [
        ("launch", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Request))),
        ("facts", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Request), ctypes.POINTER(_Facts))),
        ("allocated", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)),
        ("on_host", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)),
    ]


def _keep_error(function):
    """A callback cannot raise through C++: the error waits until the operator returns."""

    @functools.wraps(function)
    def guarded(*args):
        try:
            function(*args)
        except BaseException as error:
            call.error = call.error or error
            return 1
        return 0

    return guarded


@functools.cache
def _text(address, size):
    return ctypes.string_at(address, size).decode()


def _plain(name):
    """void fl::(anonymous namespace)::f<(fl::DType)1>(fl::X) -> f<(DType)1>"""
    name = re.sub(r"^void |\(anonymous namespace\)::|\b\w+::", "", name)
    return re.sub(r"\([^()]*\)$", "", name)


@_keep_error
def _launch(pointer):
    request = pointer.contents
    text, name = _text(request.ptx, request.ptx_bytes), request.name.decode()
    args = [ctypes.string_at(request.args[i], size) for i, size in enumerate(module_of(text).params(name))]
    shown = _plain(request.shown.decode())
    simulate(text, name, tuple(request.grid), tuple(request.block), args, request.shared, shown)


@_keep_error
def _facts(pointer, facts):
    request = pointer.contents
    found = module_of(_text(request.ptx, request.ptx_bytes)).facts(request.name.decode())
    facts.contents.static_shared = found["static_shared"]
    facts.contents.local = found["local_bytes"]
    facts.contents.most_threads = found["max_threads"] or 1024


_callbacks = _Callbacks(
    *(kind(function) for (_, kind), function in zip(_Callbacks._fields_, (_launch, _facts, allocate, on_host)))
)


def _simulated(name):
    """The operator as people call it: the compiled one, with its memory known and its errors raised."""
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    on_device = [argument.name not in _HOST_ARGUMENTS for argument in operator._schema.arguments]

    def run(*args):
        call.memory = device_memory([arg for arg, yes in zip(args, on_device) if yes])
        call.error = None
        try:
            result = operator(*args)
        except RuntimeError as error:
            if call.error is not None:
                raise call.error from error
            raise
        finally:
            call.memory = ()
        if call.error is not None:
            raise AssertionError(f"{name} did not notice that a launch failed") from call.error
        return result

    return run


def connect(loaded):
    """Let a library with the simulator's runtime launch here."""
    loaded.simulator_connect(ctypes.byref(_callbacks))


@functools.cache
def _operators():
    """torch.ops.fastlayers_simulator: every operator that the simulated library implements."""
    connect(library())
    target = torch.library.Library("fastlayers_simulator", "DEF")
    for full_name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        namespace, _, name = full_name.partition("::")
        if namespace == NAMESPACE:
            schema = str(getattr(getattr(torch.ops, NAMESPACE), name).default._schema)
            target.define(schema.removeprefix(f"{NAMESPACE}::"))
            target.impl(name, _simulated(name), "CPU")
            fake = getattr(torch.ops.fastlayers, name)
            torch.library.register_fake(f"fastlayers_simulator::{name}", fake, lib=target)
            attach_native_autograd(name, "fastlayers_simulator", target)
    return target


def install(arch="sm_80", code=None):
    """Until uninstall(), the simulator is the GPU of backend="cuda" and of Triton, and its tensors are CPU tensors.

    arch:   sm_75, sm_80, sm_89 or sm_90; another call changes it
    code:   such an architecture, too: the library counts as compiled for it and older ones alone
    raises  RuntimeError where the kernels cannot be compiled
    """
    if arch not in _ARCHS:
        raise ValueError(f"arch {arch!r} is not one of {', '.join(_ARCHS)}")
    _operators()
    if library().simulator_choose(int(arch[3:]), int((code or arch)[3:])):
        raise RuntimeError(f"the simulator's runtime does not know {arch}")
    triton_driver.activate(int(arch[3:]))
    backends.cuda_device, backends.cuda_operators = "cpu", torch.ops.fastlayers_simulator
    backends.cuda_capability = lambda: divmod(int(arch[3:]), 10)


def uninstall():
    triton_driver.deactivate()
    backends.cuda_device, backends.cuda_operators = "cuda", torch.ops.fastlayers
    backends.cuda_capability = _capability
