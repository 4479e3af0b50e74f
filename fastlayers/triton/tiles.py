"""How large a tile of a product each program computes: a small table per architecture, and a choice from it.

Where FASTLAYERS_TRITON_AUTOTUNE is not 0, the first call of a kind on a GPU measures the candidates and keeps the
answer on disk, by device, Triton version and key. Otherwise, and while torch.compile traces, the choice goes by the
number of programs alone.
"""

import functools
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton import knobs


@dataclass(frozen=True)
class Tile:
    """rows x columns of the output per program; inner: how much of the sum is in shared memory at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    persistent: bool = False  # one program per multiprocessor computes tile after tile
    descriptors: bool = False  # operands are read through tensor descriptors, by the TMA unit from sm_90 on
    specialised: bool = False  # and by warps that do nothing else

    def shared(self, itemsize, weights=1):
        """Bytes of shared memory that the operands take."""
        return self.stages * (self.rows + weights * self.columns) * self.inner * itemsize

    def blocks(self, m, n):
        return math.ceil(m / self.rows) * math.ceil(n / self.columns)

    def half(self):
        """For two products at once: as many sums and operands as this tile has for one."""
        return replace(self, columns=self.columns // 2)


# Per architecture and itemsize of the operands, the largest tile first. Float32 is multiplied as three TF32 products,
# which takes registers; on sm_75 Triton has no tensor cores, and multiplies everything by plain arithmetic. Chosen for
# what tests/test_linear_act_triton.py checks: shared memory, no spills, wgmma on sm_90, tcgen05 on sm_100; no GPU has
# measured them.
_PLAIN = (Tile(64, 64, 16, 8, 1), Tile(16, 64, 32, 4, 1))
_FEW_ROWS, _FEW_ROWS_WIDE = Tile(16, 64, 128, 4, 3), Tile(16, 64, 64, 4, 3)
_WIDE = (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), _FEW_ROWS_WIDE)
_AMPERE = {
    2: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), _FEW_ROWS),
    4: _WIDE,
}
_HOPPER = (Tile(128, 128, 64, 8, 4, persistent=True), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4), _FEW_ROWS)
_DESCRIBED = Tile(128, 128, 64, 8, 4, persistent=True, descriptors=True)
_HOPPER_SPECIALISED = Tile(128, 128, 64, 4, 4, descriptors=True, specialised=True)
TILES = {
    75: {2: _PLAIN, 4: _PLAIN},
    80: _AMPERE,
    90: {2: (*_HOPPER, _DESCRIBED, _HOPPER_SPECIALISED), 4: (Tile(128, 128, 32, 8, 3), *_WIDE[1:])},
    100: {2: (*_HOPPER, _DESCRIBED, replace(_DESCRIBED, specialised=True)), 4: _WIDE},
    120: {2: _AMPERE[2], 4: (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3), _FEW_ROWS_WIDE)},
}
SHARED = {75: 65536, 80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes per block
_INTERPRETER = Tile(64, 64, 64, 4, 1)


POINTERS, DESCRIPTORS, SPECIALISED = range(3)  # how much a product's operands and form allow


def candidates(arch, itemsize, weights, shared, loads=SPECIALISED):
    """The tiles for a GPU, the largest first. Those with descriptors come last: they are taken only where measured.

    weights: products at once; shared: bytes that a block may have
    loads: POINTERS, or DESCRIPTORS where these can read the operands, or SPECIALISED where it is one product, too: on
        some kernels with more of them, Triton's compiler fails
    """
    nearest = max((known for known in TILES if known <= arch), default=min(TILES))
    tiles = [tile if weights == 1 else tile.half() for tile in TILES[nearest][itemsize]]
    if weights > 1 or arch not in TILES:  # GPUs beside the table's have not been compiled for
        loads = min(loads, DESCRIPTORS)
    tiles = [tile for tile in tiles if tile.descriptors + tile.specialised <= loads]
    return [tile for tile in tiles if tile.shared(itemsize, weights) <= shared]


def choose(m, n, k, dtype, weights=1, loads=POINTERS, measure=None):
    """The tile for (m, k) @ (k, n), `weights` times at once.

    loads: as for candidates
    measure: function(tile) that launches the product, or None where nothing may be launched
    """
    if knobs.runtime.interpret:
        return _INTERPRETER
    gpu = current_gpu()
    tiles = candidates(gpu.arch, dtype.itemsize, weights, gpu.shared, loads)
    tiles = [tile for tile in tiles if tile.rows >= 64 or m <= 2 * tile.rows]
    key = f"{dtype} x{weights}, bits of m n k: {bits(m, n, k)}"
    return pick(tiles, key, lambda tile: tile.blocks(m, n), measure)


def bits(*sizes):
    """Of sizes that lead to the same choice: how many bits they have."""
    return " ".join(str(max(size, 16).bit_length()) for size in sizes)


def pick(tiles, key, programs, measure):
    """The fastest where there is time to measure, else the first with enough programs for the GPU, without descriptors.

    key: what the choice depends on, besides GPU and Triton; programs: function(tile), how many it takes
    """
    gpu = current_gpu()
    if len(tiles) > 1 and measure and gpu.name and os.environ.get("FASTLAYERS_TRITON_AUTOTUNE") != "0":
        form = "".join(f", {name}" for name in ("descriptors", "specialised") if any(getattr(t, name) for t in tiles))
        return _measured(f"{gpu.name}, triton {triton.__version__}, {key}{form}", tiles, measure)
    plain = [tile for tile in tiles if not tile.descriptors]
    return next((tile for tile in plain if programs(tile) >= gpu.multiprocessors), plain[-1])


@dataclass(frozen=True)
class Gpu:
    arch: int  # 80
    name: str | None  # None: simulated, so that there is no time to measure
    shared: int  # bytes that a block may have
    multiprocessors: int


def current_gpu():
    return _gpu(triton.runtime.driver.active.get_current_device())


@functools.cache
def _gpu(index):
    driver = triton.runtime.driver.active
    found = driver.utils.get_device_properties(index)
    name = torch.cuda.get_device_name(index) if driver.get_active_torch_device().type == "cuda" else None
    arch = driver.get_current_target().arch
    return Gpu(arch, name, found["max_shared_mem"], found["multiprocessor_count"])


def multiprocessors():
    """Of the current GPU; 1 in the interpreter."""
    return 1 if knobs.runtime.interpret else current_gpu().multiprocessors


def cache_path():
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastlayers/triton_tiles.json"


@functools.cache
def _remembered():
    """key -> tile, as it stands on disk; what cannot be read is measured again."""
    try:
        return {key: Tile(**fields) for key, fields in json.loads(cache_path().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _median(run):
    """Milliseconds."""
    return triton.runtime.driver.active.get_benchmarker()(run, return_mode="median")


def _measured(key, tiles, measure):
    known = _remembered()
    if known.get(key) not in tiles:
        known[key] = min(tiles, key=lambda tile: _median(lambda: measure(tile)))
        _write(known)
    return known[key]


def _write(known):
    """Whole or not at all: other processes may read and write it at the same time."""
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_suffix(f".{os.getpid()}")
        mine.write_text(json.dumps({key: asdict(tile) for key, tile in known.items()}, indent=1))
        mine.replace(path)
    except OSError:
        pass  # a home that cannot be written: measured again in the next process
