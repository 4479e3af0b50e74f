"""PTX as a Python object: load it, see its kernels, run one on CPU memory."""

import os
import struct

from tests.simulator.build import core
from tests.simulator.error import SimulatorError


class Module:
    """A module of PTX text, as nvcc -ptx or Triton emit it.

    kernels: names of its entries
    target:  what it was compiled for, such as "sm_80"
    ptx:     the text
    """

    def __init__(self, ptx):
        self.ptx = ptx
        self._program = core().Program(ptx)
        self.kernels = self._program.kernels()
        self.target = self._program.target()

    def params(self, name):
        """Bytes of each parameter."""
        return [size for _, size in self._program.params(name)]

    def facts(self, name):
        """static_shared (bytes per block), local_bytes (per thread), max_threads (0: not limited), instructions."""
        return self._program.facts(name)

    def launch(
        self,
        name,
        grid,
        block,
        args,
        shared=0,
        buffers=(),
        race_check=True,
        limit=2_000_000_000,
        threads=None,
        extents=(),
    ):
        """Run one kernel and return what it did.

        grid, block: an int or up to three
        args:    one per parameter: int, float, bytes (a struct by value), tensor or numpy array (its address)
        shared:  bytes of dynamic shared memory
        buffers: further tensors and arrays that the kernel may touch
        limit:   warp instructions after which the launch is given up (kind timeout)
        threads: workers, by default one per core
        extents: further memory, as (address, bytes, writable)
        returns  dict: total and classes (warp instructions), mma_flops, shared (accesses, wavefronts, minimum,
                 bytes), global (accesses, sectors, minimum, bytes), barriers, largest_block (warp instructions of the
                 block that issued most), lines (the same per PTX instruction)
        raises   SimulatorError, which says what went wrong where
        """
        if name not in self.kernels:
            raise SimulatorError("arguments", f"the module has no kernel {name!r}, only {', '.join(self.kernels)}")
        params = self._program.params(name)
        if len(params) != len(args):
            raise SimulatorError("arguments", f"{name} takes {len(params)} arguments, got {len(args)}")
        packed = bytearray(max((offset + size for offset, size in params), default=0))
        for index, (arg, (offset, size)) in enumerate(zip(args, params)):
            packed[offset : offset + size] = _bytes_of(arg, size, f"{name}: argument {index}")
        arrays = [array for array in (*args, *buffers) if not isinstance(array, int | float | bytes)]
        return self._program.launch(
            name,
            _three(grid),
            _three(block),
            bytes(packed),
            shared,
            [*memory_of(arrays), *extents],
            race_check,
            limit,
            threads or os.cpu_count(),
        )


def memory_of(arrays):
    """(address, bytes, writable) of what lies behind tensors and numpy arrays, each piece of memory once."""
    memory = {}
    for array in arrays:
        extent = _extent(array)
        memory[extent[0]] = max(memory.get(extent[0], extent), extent)
    return list(memory.values())


def _three(sizes):
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return [*sizes, 1, 1][:3]


def _extent(array):
    """(address, bytes, writable) of the memory behind a tensor (its whole storage) or a numpy array."""
    if hasattr(array, "untyped_storage"):
        storage = array.untyped_storage()
        return storage.data_ptr(), storage.nbytes(), True
    if not hasattr(array, "ctypes"):
        raise SimulatorError("arguments", f"expected a CPU tensor or a numpy array, got {type(array).__name__}")
    base = array
    while getattr(base, "base", None) is not None and hasattr(base.base, "ctypes"):
        base = base.base
    return base.ctypes.data, base.nbytes, bool(base.flags.writeable)


def _bytes_of(arg, size, what):
    if isinstance(arg, bytes):
        if len(arg) != size:
            raise SimulatorError("arguments", f"{what} has {len(arg)} bytes, the kernel takes {size}")
        return arg
    if isinstance(arg, bool | int):
        try:
            return int(arg).to_bytes(size, "little", signed=arg < 0)
        except OverflowError:
            raise SimulatorError("arguments", f"{what}: {arg} does not fit into {size} bytes") from None
    if isinstance(arg, float):
        if size not in (2, 4, 8):
            raise SimulatorError("arguments", f"{what} is a float, the kernel takes {size} bytes")
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], arg)
    if size != 8:
        raise SimulatorError("arguments", f"{what} is an array, the kernel takes {size} bytes")
    address = arg.data_ptr() if hasattr(arg, "data_ptr") else arg.ctypes.data
    return address.to_bytes(8, "little")
