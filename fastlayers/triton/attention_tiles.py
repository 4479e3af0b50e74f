"""How many scores each program of the attention kernels computes at a time: a small table per architecture."""

from dataclasses import replace

from triton import knobs

from fastlayers.triton import tiles
from fastlayers.triton.tiles import Tile

# Per kernel and wider head_dim, rows x columns of the scores; inner: columns of a head that are in registers at a time.
# Where that is not all of them, a program computes `inner` columns of the output, and the scores are computed again for
# the next: for float32, whose products of parts hold both factors in registers, and on sm_75, where Triton multiplies
# by plain arithmetic. Chosen for what tests/test_attention_triton.py checks: shared memory, no spills, wgmma on sm_90,
# tcgen05 on sm_100; no GPU has measured them.
_ALL = 256
_AMPERE = {
    "forward": {
        64: (Tile(128, 64, _ALL, 4, 3), Tile(64, 64, _ALL, 4, 3)),
        128: (Tile(128, 64, _ALL, 8, 2),),
        256: (Tile(64, 32, _ALL, 8, 2),),
    },
    "query_gradient": {
        64: (Tile(128, 64, _ALL, 8, 2),),
        128: (Tile(64, 64, _ALL, 8, 2),),
        256: (Tile(64, 32, _ALL, 8, 2),),
    },
    "key_gradient": {
        64: (Tile(64, 128, _ALL, 8, 2),),
        128: (Tile(64, 64, _ALL, 8, 2),),
        256: (Tile(32, 32, _ALL, 8, 1),),
    },
    "decode": {128: (Tile(64, 64, _ALL, 8, 2),), 256: (Tile(64, 32, _ALL, 8, 1),)},
}
_HOPPER_FORWARD = {**_AMPERE["forward"], 64: (Tile(128, 128, _ALL, 8, 3), Tile(128, 64, _ALL, 4, 3))}
_HOPPER = {
    **_AMPERE,
    "forward": _HOPPER_FORWARD,
    "query_gradient": {**_AMPERE["query_gradient"], 256: (Tile(64, 32, 128, 8, 1),)},
    "key_gradient": {
        64: (Tile(64, 64, _ALL, 8, 2),),
        128: (Tile(32, 64, _ALL, 8, 2),),
        256: (Tile(32, 64, 128, 8, 1),),
    },
}
_BLACKWELL = {
    **_AMPERE,
    "forward": _HOPPER_FORWARD,
    "key_gradient": {**_AMPERE["key_gradient"], 256: (Tile(32, 64, _ALL, 8, 1),)},
}
_SMALL_BLACKWELL = {
    **_AMPERE,
    "forward": {**_AMPERE["forward"], 64: (Tile(128, 64, _ALL, 8, 3), Tile(64, 64, _ALL, 4, 3))},
    "query_gradient": {**_AMPERE["query_gradient"], 256: (Tile(64, 32, _ALL, 8, 1),)},
    "key_gradient": {**_AMPERE["key_gradient"], 64: (Tile(32, 64, _ALL, 4, 2),)},
}
_PARTS = {
    "forward": {256: (Tile(64, 32, 32, 8, 1),)},
    "query_gradient": {256: (Tile(32, 32, 32, 4, 1),)},
    "key_gradient": {256: (Tile(16, 32, 32, 4, 1),)},
    "decode": {256: (Tile(64, 32, 32, 8, 1),)},
}
_FEW_ROWS = {256: (Tile(16, 64, 32, 8, 1),)}
_WIDE_PARTS = {
    **_PARTS,
    "query_gradient": {256: (Tile(64, 32, 32, 4, 1),)},
    "key_gradient": {256: (Tile(32, 64, 32, 4, 1),)},
}
_PLAIN = {
    "forward": {256: (Tile(32, 32, 32, 4, 1),)},
    "query_gradient": {256: (Tile(16, 32, 16, 4, 1),)},
    "key_gradient": {256: (Tile(32, 32, 16, 4, 1),)},
    "decode": {256: (Tile(16, 32, 32, 4, 1),)},
}
TILES = {
    75: {2: _PLAIN, 4: _PLAIN},
    80: {2: _AMPERE, 4: {**_PARTS, "query_gradient": _FEW_ROWS, "key_gradient": _FEW_ROWS}},
    90: {2: _HOPPER, 4: _WIDE_PARTS},
    100: {2: _BLACKWELL, 4: {**_WIDE_PARTS, "key_gradient": {256: (Tile(32, 64, 32, 8, 1),)}}},
    120: {2: _SMALL_BLACKWELL, 4: _PARTS},
}
_UNDESCRIBED = {(120, "query_gradient", 64)}  # with descriptors, these tiles would spill
_INTERPRETER = Tile(128, 64, _ALL, 4, 1)


def parts(arch):
    """How tensor cores multiply float32, from sm_80 on: by six products of bfloat16 parts, which take as long as three
    of TF32 parts and err about half as much; by the latter where registers would spill."""
    return "bf16x6" if arch < 120 else "tf32x3"


def candidates(arch, itemsize, kind, dim, describable=True):
    """The tiles for a kernel, the largest first; those with descriptors, last, are taken only where measured.

    dim: the wider head_dim; describable: whether tensor descriptors can read what the kernel's loop reads
    """
    nearest = max((known for known in TILES if known <= arch), default=min(TILES))
    table = TILES[nearest][itemsize][kind]
    width = min(width for width in table if width >= dim)
    found = table[width]
    if not describable or nearest < 90 or itemsize > 2 or (nearest, kind, width) in _UNDESCRIBED:
        return found
    return (*found, *(replace(tile, descriptors=True) for tile in found if tile.inner == _ALL))


def choose(kind, inputs, describable, programs, measure=None):
    """The tile for a kernel of this kind.

    describable: as for candidates
    programs: function(tile), how many a launch has; measure: function(tile) that launches, or None
    """
    if knobs.runtime.interpret:
        return _INTERPRETER
    itemsize, dim = inputs.query.dtype.itemsize, max(inputs.head_dims)
    found = candidates(tiles.current_gpu().arch, itemsize, kind, dim, describable)
    sizes = tiles.bits(inputs.batch * inputs.heads, inputs.seqlen_q, inputs.seqlen_k, dim)
    key = f"{inputs.query.dtype} attention {kind}, causal {inputs.is_causal}, bits of heads q k dim: {sizes}"
    return tiles.pick(found, key, programs, measure)


def constants(tile):
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "INNER": tile.inner,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
