"""Inputs in turn, so that a call does not find its own in a cache."""

import math
from itertools import count
from pathlib import Path

import torch

MOST_COPIES, MOST_BYTES = 8, 1 << 30


def largest_cache(device):
    """Bytes of a GPU's L2 cache, or of the largest cache of CPU 0; 32 MiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 << 20)


class Rotation:
    """Inputs in turn: enough copies that, with the copies between, none still lies in the largest cache.

    At most 8 copies and 1 GiB: beyond that a machine's shared cache is larger than what one process is given of it.
    A setting that is not cold takes the same copy every time.
    """

    def __init__(self, make, bytes_each, setting):
        copies = math.ceil(2 * largest_cache(setting.device) / bytes_each) + 1 if setting.cold else 1
        self.items = [make() for _ in range(max(1, min(copies, MOST_COPIES, MOST_BYTES // bytes_each)))]
        self.calls = count()

    def __next__(self):
        return self.items[next(self.calls) % len(self.items)]
