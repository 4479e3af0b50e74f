"""The CUDA kernels of attention: what they move and wait for, exactly, and that broken copies of them are found out."""

import pytest
import torch

from fastlayers import ops
from tests.backends import BACKENDS
from tests.simulator import SimulatorError, install, record, rewrite_ptx, uninstall

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the kernels")


@pytest.fixture(autouse=True)
def gpu():
    install("sm_80")
    yield
    uninstall()


def qkv(head_dim, seqlen=512, dtype=torch.bfloat16):
    return torch.randn(3, 1, 1, seqlen, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)


def forward(head_dim, seqlen=512, dtype=torch.bfloat16, **options):
    with record() as launches:
        out = ops.attention(*qkv(head_dim, seqlen, dtype), backend="cuda", **options)
    (launch,) = launches
    return out, launch.counts


# Warp instructions of PTX and shared-memory wavefronts per 64 x 64 scores that FlashAttention-2 2.8.3 takes for one
# head of 512 x 512, compiled by nvcc 13.0 for sm_80 and counted in the same way. Ours are 1316, 1566, 1951 and 2262
# instructions; 352, 346, 816 and 781 wavefronts.
FLASH_ATTENTION_2 = {
    (64, False): (1368, 376),
    (64, True): (1573, 390),
    (128, False): (2064, 816),
    (128, True): (2276, 845),
}


@pytest.mark.parametrize("head_dim, is_causal", FLASH_ATTENTION_2)
def test_counts(head_dim, is_causal):
    _, counts = forward(head_dim, is_causal=is_causal)
    assert counts["shared"]["wavefronts"] == counts["shared"]["minimum"]
    assert counts["global"]["sectors"] == counts["global"]["minimum"]
    tiles = 40 if is_causal else 64  # of 64 x 64 scores in blocks of 128 rows and keys
    instructions, wavefronts = FLASH_ATTENTION_2[head_dim, is_causal]
    assert counts["total"] / tiles <= instructions
    assert counts["shared"]["wavefronts"] / tiles <= wavefronts
    # q and o once, k and v once for each 128 rows that see them, 4 bytes of lse a row
    blocks = 10 if is_causal else 16
    wanted = 2 * 512 * head_dim * 2 + 2 * blocks * 128 * head_dim * 2 + 512 * 4
    assert counts["global"]["bytes"] == wanted


GENERAL = {  # warp instructions of PTX per 64 x 64 scores at most, with what options
    "bool mask": (3500, {"attn_mask": torch.ones(1, 1, 512, 512, dtype=torch.bool)}),
    "additive mask": (3900, {"attn_mask": torch.zeros(1, 1, 512, 512, dtype=torch.bfloat16)}),
    "dropout": (4700, {"dropout_p": 0.1}),
}


@pytest.mark.parametrize("name", GENERAL)
def test_general_counts(name):
    most, options = GENERAL[name]
    _, counts = forward(64, **options)
    assert counts["total"] / 64 <= most


@pytest.mark.parametrize("head_dim, rows", [(32, 64), (64, 64), (128, 64), (256, 32)])
def test_float32_counts(head_dim, rows):
    """Every number is read once per block, without bank conflicts; a product is three of TF32, a short one four."""
    _, counts = forward(head_dim, 128, torch.float32)
    assert counts["shared"]["wavefronts"] == counts["shared"]["minimum"]
    assert counts["global"]["sectors"] == counts["global"]["minimum"]
    assert counts["global"]["bytes"] == (2 + 2 * 128 // rows) * 128 * head_dim * 4 + 128 * 4
    products = 4 if head_dim <= 32 else 3
    assert counts["mma_flops"] == products * 2 * 2 * 128 * 128 * head_dim


def test_hidden_tiles_are_never_visited():
    """A window of 64 keys: the tensor cores work on the tiles that some row of a warp sees."""
    _, counts = forward(64, window=(63, 0))
    _, all_tiles = forward(64)
    # 32 rows see 95 keys at most, in two or three tiles of 64; there are 8.
    assert counts["mma_flops"] <= all_tiles["mma_flops"] * 3 / 8


BREAKS = {  # what is taken out or changed, and what finds it
    "a barrier": ("bar.sync", "bar.warp.sync -1; //", {"race", "uninitialised", "async"}),
    "the wait for copies": ("cp.async.wait_group 0", "cp.async.wait_group 1", {"async"}),
    "the commit of copies": ("cp.async.commit_group;", "", {"async"}),
    "the end of the sequence": ("max.s32", "min.s32", None),
    "the transposition of v": (".x4.trans.", ".x4.", None),
    "the softmax's base": ("ex2.approx.ftz.f32", "rsqrt.approx.ftz.f32", None),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_found_out(name):
    pattern, replacement, kinds = BREAKS[name]
    right, _ = forward(64, 200, is_causal=True)
    with rewrite_ptx(lambda text: text.replace(pattern, replacement)):
        try:
            found, _ = forward(64, 200, is_causal=True)
        except SimulatorError as error:
            assert error.kind in (kinds or {"uninitialised", "async", "out_of_bounds"}), error
            return
    assert kinds is None and not torch.equal(found, right)
