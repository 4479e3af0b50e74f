"""How many scores each program of the attention kernels computes at a time: a small table per architecture."""

from triton import knobs

from fastlayers.triton.attention_inputs import padded
from fastlayers.triton.tiles import Tile

_INTERPRETER = (128, 64, 4, 1)


def choose(kind, inputs, programs, measure=None):
    """The tile for a kernel of this kind: rows x columns of the scores."""
    dim = max(padded(n) for n in inputs.head_dims)
    rows, columns, warps, stages = _INTERPRETER
    assert knobs.runtime.interpret
    return Tile(rows, columns, dim, warps, stages)


def constants(tile):
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
