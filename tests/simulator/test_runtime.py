"""The CUDA runtime in libcudart's place: launches, their limits, and what a launcher asks about kernels and device."""

import ctypes
import functools
from pathlib import Path

import pytest
import torch

from tests.backends import BACKENDS
from tests.simulator import record
from tests.simulator.device import connect
from tests.simulator.launches import call, device_memory
from tests.simulator.library import build_small

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the calls")
INVALID_VALUE, NOT_SUPPORTED, LAUNCH_FAILURE = 1, 801, 719


@functools.cache
def loaded():
    library = ctypes.CDLL(str(build_small(Path(__file__).parent / "runtime_calls.cu")))
    connect(library)
    return library


@pytest.fixture(params=[75, 80, 90])
def runtime(request):
    loaded().simulator_choose(request.param, request.param)
    loaded().arch = request.param
    yield loaded()
    loaded().allow_shared(48 * 1024)


@pytest.fixture
def out():
    """300 numbers that kernels may touch."""
    tensor = torch.zeros(300)
    call.memory, call.error = device_memory([tensor]), None
    yield tensor
    call.memory, call.error = (), None


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def test_launches_reach_the_kernel_of_the_architecture(runtime, out):
    with record() as launches:
        assert runtime.launch(address(out), ctypes.c_float(1.5), 300, 128, 512) == 0
        assert (out == 1.5).all()
        for cluster in (0, 1):
            assert runtime.launch_ex(address(out), ctypes.c_float(2.5 + cluster), 300, cluster) == 0
            assert (out == 2.5 + cluster).all()
    assert [(at.name, at.grid, at.block, at.shared) for at in launches] == [("fill", (3, 1, 1), (128, 1, 1), 512)] * 3
    assert runtime.capability() == runtime.arch


def test_a_launch_that_fails_is_the_last_error_once(runtime, out):
    assert runtime.launch(address(out), ctypes.c_float(1), 301, 128, 512) == LAUNCH_FAILURE
    assert call.error.kind == "out_of_bounds" and "fill" in str(call.error)
    assert runtime.last_error() == 0
    call.error = None
    assert runtime.launch(address(out), ctypes.c_float(1), 300, 256, 1024) == LAUNCH_FAILURE  # __launch_bounds__(128)
    assert call.error.kind == "arguments"
    assert runtime.launch_ex(address(out), ctypes.c_float(1), 300, 2) == NOT_SUPPORTED
    assert runtime.last_error() == NOT_SUPPORTED


def test_shared_memory_above_48_kb_is_asked_for(runtime, out):
    most = {75: 64, 80: 163, 90: 227}[runtime.arch] * 1024
    launch = functools.partial(runtime.launch, address(out), ctypes.c_float(1), 300, 128)
    assert launch(48 * 1024) == 0
    assert launch(48 * 1024 + 4) == INVALID_VALUE
    assert runtime.allow_shared(most + 4) == INVALID_VALUE == runtime.last_error()
    assert runtime.allow_shared(most) == 0 and launch(most) == 0
    assert launch(most + 4) == INVALID_VALUE
    assert runtime.allow_shared_beside_static(most) == INVALID_VALUE == runtime.last_error()
    assert runtime.allow_shared_beside_static(most - 4096) == 0


def test_what_is_known_of_kernels_and_device(runtime):
    assert runtime.static_shared() == 4096 and runtime.most_threads() == 128
    threads = {75: 1024, 80: 2048, 90: 2048}[runtime.arch]
    shared = {75: 64, 80: 163, 90: 227}[runtime.arch]
    assert runtime.blocks_per_multiprocessor(128, 0) == threads // 128
    assert runtime.blocks_per_multiprocessor(128, 31 * 1024) == shared * 1024 // (
        31 * 1024 + 1024 * (runtime.arch != 75)
    )
    assert runtime.blocks_per_multiprocessor(256, 0) == 0


def test_memory_calls(runtime):
    to, source = torch.full((6,), 7.0), torch.arange(3.0)
    assert runtime.clear_and_copy(address(to), address(source), 3) == 0
    assert to.tolist() == [0, 1, 2, 0, 0, 0]
