"""Clocks: the wall's on a CPU, CUDA events on a GPU."""

import time

import torch

from fastlayers.benchmarks.inputs import largest_cache

SHORTEST_SAMPLE = 0.002  # seconds; below it the clock and the scheduler weigh


def clock_of(setting):
    """function(step, calls) -> seconds per call."""
    return Events(setting.cold) if setting.device == "cuda" else wall


def wall(step, calls):
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


class Events:
    """CUDA events around every call, so that what lies between two calls is not counted.

    cold: the L2 cache is overwritten before each; meanwhile the host runs ahead, so that its launches are hidden as far
    as they are hidden in a model that keeps the GPU busy
    """

    def __init__(self, cold):
        self.evictor = torch.empty(2 * largest_cache("cuda"), dtype=torch.int8, device="cuda") if cold else None

    def __call__(self, step, calls):
        pairs = []
        for _ in range(calls):
            if self.evictor is not None:
                self.evictor.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            step()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3 / calls
