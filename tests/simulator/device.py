"""backend="cuda" on CPU tensors: the shipped op, launcher and kernel, with the simulator as the GPU."""

import contextlib
import ctypes
import functools
import re
import threading
from dataclasses import dataclass

import torch

from fastlayers import backends
from tests.simulator.library import NAMESPACE, library
from tests.simulator.module import Module, memory_of

_ARCHS = ("sm_75", "sm_80", "sm_90")
_HOST_ARGUMENTS = {"rng"}  # which the operators read on the CPU; no kernel may
_LIMIT = 20_000_000_000


@dataclass(frozen=True)
class Launch:
    """A launch that was simulated. counts: as Module.launch returns them."""

    name: str  # without namespaces and parameters: adam_dense_kernel<false>
    grid: tuple
    block: tuple
    shared: int  # dynamic, bytes
    counts: dict


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


class _Call(threading.local):
    """The operator call that this thread is in."""

    memory = ()  # extents that its kernels may touch
    error = None  # what a launch raised


_call = _Call()
_host = []  # extents of host_memory
_records = []  # lists of the record contexts that are open
_rewrite = None  # of rewrite_ptx


def _keep_error(function):
    """A callback cannot raise through C++: the error waits until the operator returns."""

    @functools.wraps(function)
    def guarded(*args):
        try:
            function(*args)
        except BaseException as error:
            _call.error = _call.error or error
            return 1
        return 0

    return guarded


@functools.cache
def _text(address, size):
    return ctypes.string_at(address, size).decode()


@functools.lru_cache(maxsize=64)
def _parsed(text):
    return Module(text)


def _module(request):
    text = _text(request.ptx, request.ptx_bytes)
    return _parsed(_rewrite(text) if _rewrite else text)


def _plain(name):
    """void fl::(anonymous namespace)::f<(fl::DType)1>(fl::X) -> f<(DType)1>"""
    name = re.sub(r"^void |\(anonymous namespace\)::|\b\w+::", "", name)
    return re.sub(r"\([^()]*\)$", "", name)


@_keep_error
def _launch(pointer):
    request = pointer.contents
    module, name = _module(request), request.name.decode()
    args = [ctypes.string_at(request.args[i], size) for i, size in enumerate(module.params(name))]
    grid, block, shared = tuple(request.grid), tuple(request.block), request.shared
    counts = module.launch(name, grid, block, args, shared, extents=_call.memory, limit=_LIMIT)
    for launches in _records:
        launches.append(Launch(_plain(request.shown.decode()), grid, block, shared, counts))


@_keep_error
def _facts(pointer, facts):
    found = _module(pointer.contents).facts(pointer.contents.name.decode())
    facts.contents.static_shared = found["static_shared"]
    facts.contents.local = found["local_bytes"]
    facts.contents.most_threads = found["max_threads"] or 1024


def _allocated(address, size):
    others = [extent for extent in _call.memory if extent[0] + extent[1] <= address or extent[0] >= address + size]
    _call.memory = [*others, (address, size, True)]


def _on_host(address):
    return int(any(begin <= (address or 0) < begin + size for begin, size, _ in _host))


_callbacks = _Callbacks(
    *(kind(function) for (_, kind), function in zip(_Callbacks._fields_, (_launch, _facts, _allocated, _on_host)))
)


def _tensors(value):
    """Those with memory that a kernel could touch: not sparse ones, for example, which operators refuse."""
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and value.device.type == "cpu":
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _simulated(name):
    """The operator as people call it: the compiled one, with its memory known and its errors raised."""
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    on_device = [argument.name not in _HOST_ARGUMENTS for argument in operator._schema.arguments]

    def run(*args):
        given = [tensor for arg, yes in zip(args, on_device) if yes for tensor in _tensors(arg)]
        host = {extent[0] for extent in _host}
        _call.memory = [extent for extent in memory_of(given) if extent[0] not in host]
        _call.error = None
        try:
            result = operator(*args)
        except RuntimeError as error:
            if _call.error is not None:
                raise _call.error from error
            raise
        finally:
            _call.memory = ()
        if _call.error is not None:
            raise AssertionError(f"{name} did not notice that a launch failed") from _call.error
        return result

    return run


@functools.cache
def _operators():
    """torch.ops.fastlayers_simulator: every operator that the simulated library implements."""
    loaded = library()
    loaded.simulator_connect(ctypes.byref(_callbacks))
    target = torch.library.Library("fastlayers_simulator", "DEF")
    for full_name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        namespace, _, name = full_name.partition("::")
        if namespace == NAMESPACE:
            schema = str(getattr(getattr(torch.ops, NAMESPACE), name).default._schema)
            target.define(schema.removeprefix(f"{NAMESPACE}::"))
            target.impl(name, _simulated(name), "CPU")
            fake = getattr(torch.ops.fastlayers, name)
            torch.library.register_fake(f"fastlayers_simulator::{name}", fake, lib=target)
    return target


def install(arch="sm_80"):
    """Serve backend="cuda" on CPU tensors by the simulator, as a GPU of this architecture, until uninstall().

    arch:   sm_75, sm_80 or sm_90; another call changes it
    raises  RuntimeError where the kernels cannot be compiled
    """
    if arch not in _ARCHS:
        raise ValueError(f"arch {arch!r} is not one of {', '.join(_ARCHS)}")
    _operators()
    if library().simulator_choose(int(arch[3:])):
        raise RuntimeError(f"the simulator's runtime does not know {arch}")
    backends.cuda_device, backends.cuda_operators = "cpu", torch.ops.fastlayers_simulator


def uninstall():
    backends.cuda_device, backends.cuda_operators = "cuda", torch.ops.fastlayers


@contextlib.contextmanager
def record():
    """`with record() as launches:` fills the list with a Launch for each launch that succeeds."""
    launches = []
    _records.append(launches)
    try:
        yield launches
    finally:
        _records[:] = [other for other in _records if other is not launches]


@contextlib.contextmanager
def rewrite_ptx(change):
    """Within, kernels run from change(PTX text): tests break them on purpose."""
    global _rewrite
    _rewrite = change
    try:
        yield
    finally:
        _rewrite = None


@contextlib.contextmanager
def host_memory(*tensors):
    """Within, these tensors count as being on the CPU; all others are on the simulated device."""
    before = list(_host)
    _host.extend(memory_of(tensors))
    try:
        yield
    finally:
        _host[:] = before
