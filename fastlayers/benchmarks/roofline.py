"""What this very machine can do: bytes moved per second, floating-point operations per second of a product."""

import torch

from fastlayers.benchmarks.clocks import clock_of
from fastlayers.benchmarks.inputs import largest_cache

ROUNDS = 15  # the fastest counts: a roof is what can be reached
SIDES = {"cpu": 2048, "cuda": 8192}  # of the square matrices; several times as long as their way through memory


def measure(setting):
    """{"copy_gbytes_per_second": number, "float32": GFLOP/s of torch's matrix product, ...}"""
    found = {"copy_gbytes_per_second": _copy(setting) / 1e9}
    return found | {dtype: _product(setting, dtype) / 1e9 for dtype in setting.dtypes}


def _copy(setting):
    """Bytes read and written per second: of a copy, or of an addition in place, whichever is faster."""
    count = max(128 << 20, largest_cache(setting.device)) // 4
    source, target = (torch.ones(count, device=setting.device) for _ in range(2))
    ways = ((2, lambda: target.copy_(source)), (3, lambda: target.add_(source)))
    return max(tensors * 4 * count / _fastest(setting, way) for tensors, way in ways)


def _product(setting, dtype):
    side = SIDES[setting.device]
    left, right = (torch.randn(side, side, device=setting.device).to(getattr(torch, dtype)) for _ in range(2))
    ways = (lambda: left @ right, lambda: left @ right.T)  # as in attention and in layers; libraries have favourites
    return 2 * side**3 / min(_fastest(setting, way) for way in ways)


def _fastest(setting, step):
    clock = clock_of(setting)
    clock(step, 1)
    return min(clock(step, 1) for _ in range(ROUNDS))


def milliseconds(case, roofs):
    """The least that a case's step takes where only the slower of copying and multiplying counts; None if unknown."""
    rate = roofs.get(case.dtype)
    parts = [case.bytes / (roofs["copy_gbytes_per_second"] * 1e6) if case.bytes else 0.0]
    if case.flops:
        if not rate:
            return None
        parts.append(case.flops / (rate * 1e6))
    return max(parts) or None
