"""Triton with the simulator as its GPU: kernel[grid](...) compiles as for a GPU and runs its PTX on CPU tensors."""

import functools
import importlib.util
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simulator.error import SimulatorError
from tests.simulator.launches import allocate, call, device_memory, simulate, tensors_in
from tests.simulator.module import memory_of

_SHARED = {75: 65536, 80: 166912, 89: 101376, 90: 232448}  # bytes per block


class _Launcher:
    """What Triton makes of a compiled kernel once, and calls for each launch."""

    def __init__(self, source, metadata):
        from triton.runtime.cache import get_cache_manager

        group = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json")
        (ptx,) = [path for path in group.values() if path.endswith(".ptx")]
        self.text, self.metadata, self.types = Path(ptx).read_text(), metadata, list(source.signature.values())

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
        meta = self.metadata
        if meta.num_ctas != 1:
            raise SimulatorError("unsupported", f"{meta.name}: clusters of {meta.num_ctas} blocks")
        scratch = [_scratch(x * y * z * size) for size in (meta.global_scratch_size, meta.profile_scratch_size)]
        values = [*_flat(self.types, args), *scratch]
        simulate(self.text, meta.name, (x, y, z), (32 * meta.num_warps, 1, 1), values, meta.shared)


def _flat(types, args):
    """The kernel's arguments: what is no constant, descriptors as Triton passes them without hardware for them."""
    for kind, arg in zip(types, args):
        if isinstance(kind, tuple):
            yield from _flat(kind, arg)
        elif kind.startswith("tensordesc"):
            from triton.backends.driver import decompose_descriptor  # from Triton 3.8 on

            yield from decompose_descriptor(arg)
        elif kind != "constexpr":
            yield arg


def _scratch(size):
    return torch.full((size,), 0xFF, dtype=torch.uint8) if size else 0


class _Utils:
    def __init__(self, arch):
        self.arch = arch

    def load_binary(self, name, binary, shared, device):
        return object(), name, 0, 0, 1024  # module, function, registers, spills, threads per block

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {
            "max_shared_mem": _SHARED[self.arch],
            "multiprocessor_count": 108,
            "warpSize": 32,
            "max_num_regs": 65536,
        }


@functools.cache
def _driver(arch):
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        utils = _Utils(arch)
        launcher_cls = _Launcher

        @classmethod
        def is_active(cls):
            return True

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return arch  # so that Triton keeps the kernels of each architecture apart

        def get_current_stream(self, device):
            return 0

        def set_current_device(self, device):
            pass

        def get_active_torch_device(self):
            return torch.device("cpu")

        def map_python_to_cpp_type(self, kind):
            raise NotImplementedError

        def get_benchmarker(self):
            """The simulator knows no time: of several configurations, the first is taken."""
            return lambda run, quantiles=None, **_: [0.0] * len(quantiles or (0.5,))

    return Driver()


class _Allocations(TorchDispatchMode):
    """What is computed within lives until the end, and may be touched by kernels that find it through pointers."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = list(tensors_in(result))
        self.kept += made
        for address, size, _ in memory_of(made):
            allocate(address, size)
        return result


def _with_memory(function):
    """An operator in Triton that passes tables of pointers: its kernels may touch its arguments and what it makes."""

    @functools.wraps(function)
    def run(*args):
        call.memory = device_memory(args)
        try:
            with _Allocations():
                function(*args)
        finally:
            call.memory = ()

    return run


def _here():
    return importlib.util.find_spec("triton") is not None


def activate(arch):
    if _here():
        import triton

        import fastlayers.triton.adam as adam

        triton.runtime.driver.set_active(_driver(arch))
        adam.adam_step = _with_memory(getattr(adam.adam_step, "__wrapped__", adam.adam_step))


def deactivate():
    if _here():
        import triton

        import fastlayers.triton.adam as adam

        triton.runtime.driver.set_active(None)  # found again when it is needed
        adam.adam_step = getattr(adam.adam_step, "__wrapped__", adam.adam_step)
