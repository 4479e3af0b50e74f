"""What a simulated launch has around it: the memory of the call it belongs to, who records it, who changes its PTX."""

import contextlib
import functools
import threading
from dataclasses import dataclass

import torch

from tests.simulator.module import Module, memory_of

_LIMIT = 20_000_000_000


@dataclass(frozen=True)
class Launch:
    """A launch that was simulated. counts: as Module.launch returns them."""

    name: str  # without namespaces and parameters: adam_dense_kernel<false>
    grid: tuple
    block: tuple
    shared: int  # dynamic, bytes
    counts: dict


class _Call(threading.local):
    memory = ()  # extents
    error = None  # what a launch raised


call = _Call()
"""The operator call that this thread is in: what its kernels may touch, what went wrong."""

_host = []  # extents of host_memory
_records = []  # lists of the record contexts that are open
_rewrite = None  # of rewrite_ptx


@functools.lru_cache(maxsize=64)
def _parsed(text):
    return Module(text)


def module_of(text):
    """The module of this PTX, changed where a test changes it."""
    return _parsed(_rewrite(text) if _rewrite else text)


def simulate(text, name, grid, block, args, shared, shown=None):
    """Module.launch for a kernel of an operator call; args may be tensors, too, whose memory is then added."""
    counts = module_of(text).launch(name, grid, block, args, shared, extents=call.memory, limit=_LIMIT)
    for launches in _records:
        launches.append(Launch(shown or name, grid, block, shared, counts))


def tensors_in(value):
    """Those with memory that a kernel could touch: not sparse ones, for example, which operators refuse."""
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and value.device.type == "cpu":
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def device_memory(value):
    """Extents of all tensors in lists of lists, but for those that are to be on the host."""
    return [extent for extent in memory_of(tensors_in(value)) if not on_host(extent[0])]


def on_host(address):
    return any(begin <= address < begin + size for begin, size, _ in _host)


def allocate(address, size):
    """The call may touch this, too; what was there before and is not part of it any more is gone."""
    if any(begin <= address and address + size <= begin + length for begin, length, _ in call.memory):
        return
    others = [extent for extent in call.memory if extent[0] + extent[1] <= address or extent[0] >= address + size]
    call.memory = [*others, (address, size, True)]


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
