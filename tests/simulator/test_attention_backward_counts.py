"""The backward of attention on CUDA: what it moves and waits for, exactly; broken copies of it are found out."""

import pytest
import torch

from fastlayers import ops
from tests.attention_cases import check, qkv
from tests.backends import BACKENDS
from tests.simulator import SimulatorError, install, record, rewrite_ptx, uninstall

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the kernels")


@pytest.fixture(autouse=True)
def gpu():
    install("sm_80")
    yield
    uninstall()


def backward(head_dim, seqlen=512, heads=1, dtype=torch.bfloat16, change=None, **options):
    """(gradients, {kernel: counts}) of one call, whose backward runs from change(PTX)."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 1, heads, seqlen, head_dim, generator=generator).to(dtype).requires_grad_()
    out = ops.attention(*inputs, backend="cuda", **options)
    upstream = torch.randn(out.shape, generator=generator).to(dtype)
    with record() as launches, rewrite_ptx(change or (lambda text: text)):
        (gradients,) = torch.autograd.grad(out, inputs, upstream)
    return gradients, {launch.name.split("<")[0]: launch.counts for launch in launches}


# Warp instructions of PTX, shared-memory wavefronts and global sectors per 64 x 64 scores that FlashAttention-2 2.8.3
# takes for one head of 512 x 512, compiled by nvcc 13.0 for sm_80 and counted in the same way. Ours are 2647 and 2577
# instructions; 1366 and 1209 wavefronts; 656 and 733 sectors.
FLASH_ATTENTION_2 = {(64, False): (2824, 1392, 656), (64, True): (3168, 1421, 733)}


@pytest.mark.parametrize("head_dim, is_causal", [(64, False), (64, True), (128, False), (128, True)])
def test_counts(head_dim, is_causal):
    _, kernels = backward(head_dim, is_causal=is_causal)
    assert set(kernels) == {"attention_row_data_kernel", "attention_backward_kernel", "attention_dq_kernel"}
    for counts in kernels.values():
        assert counts["shared"]["wavefronts"] == counts["shared"]["minimum"]
        assert counts["global"]["sectors"] == counts["global"]["minimum"]
    counts = kernels["attention_backward_kernel"]
    tiles = 40 if is_causal else 64  # of 64 x 64 scores in blocks of 128 rows and keys
    if (head_dim, is_causal) in FLASH_ATTENTION_2:
        instructions, wavefronts, sectors = FLASH_ATTENTION_2[head_dim, is_causal]
        assert counts["total"] / tiles <= instructions
        assert counts["shared"]["wavefronts"] / tiles <= wavefronts
        assert counts["global"]["sectors"] / tiles <= sectors


GENERAL = {  # warp instructions of PTX per 64 x 64 scores at most, with what options
    "bool mask": (7900, {"attn_mask": torch.ones(1, 1, 512, 512, dtype=torch.bool)}),
    "additive mask": (9300, {"attn_mask": torch.zeros(1, 1, 512, 512, dtype=torch.bfloat16)}),
    "dropout": (10450, {"dropout_p": 0.1}),
}


@pytest.mark.parametrize("name", GENERAL)
def test_general_counts(name):
    most, options = GENERAL[name]
    _, kernels = backward(64, **options)
    assert kernels["attention_backward_kernel"]["total"] / 64 <= most


def test_random_numbers_are_used_whole():
    """128 bits decide on 8 keys: 512 times in a tile of 64 x 64, by 16 warps, who then ask each other 8 times."""
    _, kernels = backward(64, dropout_p=0.1)
    lines = kernels["attention_backward_kernel"]["lines"]
    assert sum(line["issued"] for line in lines if "vote.sync.ballot" in line["instruction"]) == 64 * 16 * 8


def test_deterministic_mode_costs_little(monkeypatch):
    """1.012 times the instructions of the fast mode, without those of waiting: with one worker the simulator runs one
    block after the other in the order of their tickets, and each finds its turn come at the first look."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    for is_causal in (False, True):
        fast, ordered = (
            backward(64, is_causal=is_causal, deterministic=deterministic)[1]["attention_backward_kernel"]["total"]
            for deterministic in (False, True)
        )
        assert ordered <= 1.25 * fast


NARROW = [(torch.bfloat16, 128), (torch.float16, 256), (torch.float32, 224)]


@pytest.mark.parametrize("dtype, head_dim", NARROW, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_less_shared_memory(deterministic, dtype, head_dim):
    """Where a block gets 99 KB, it takes fewer keys."""
    install("sm_89")
    tensors = dict(zip(("query", "key", "value"), qkv(dtype, batch=1, heads_q=2, seqlen_q=200, head_dim=head_dim)))
    check(ops.attention, tensors, "cuda", is_causal=True, deterministic=deterministic)


def test_hidden_tiles_are_never_visited():
    """A window of 64 keys: 64 queries see 127 of them, in two blocks of 128 at most; there are four."""
    _, kernels = backward(64, window=(63, 0))
    _, all_tiles = backward(64)
    flops, most = (found["attention_backward_kernel"]["mma_flops"] for found in (kernels, all_tiles))
    assert flops <= most * 3 / 8


def test_no_memory_for_scores():
    """What the kernels around the main one touch grows with the sequence, but for the ticket's 4 bytes."""
    once, twice = (
        sum(counts["global"]["bytes"] for name, counts in backward(64, seqlen)[1].items() if "backward" not in name)
        for seqlen in (256, 512)
    )
    assert twice - 4 == 2 * (once - 4)


BREAKS = {  # what is taken out or changed, what finds it (None: wrong gradients), options
    "a barrier": ("bar.sync", "bar.warp.sync -1; //", {"race", "uninitialised", "async"}, {}),
    "the wait for copies": ("cp.async.wait_group 0", "cp.async.wait_group 1", {"async"}, {}),
    "the commit of copies": ("cp.async.commit_group;", "", {"async"}, {}),
    "the transposition of tiles": (".x4.trans.", ".x4.", None, {}),
    "the softmax's base": ("ex2.approx.ftz.f32", "rsqrt.approx.ftz.f32", None, {}),
    "the sums of dq": ("red.relaxed.gpu.global.add.f32", "//", None, {}),
    "the turns": ("red.release.gpu.global.add.s32", "//", {"timeout"}, {"deterministic": True}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_found_out(name, monkeypatch):
    pattern, replacement, kinds, options = BREAKS[name]
    monkeypatch.setattr("tests.simulator.launches._LIMIT", 20_000_000)
    right, _ = backward(64, 200, is_causal=True, **options)

    def change(text):
        assert pattern in text or "any_kernel" in text  # of csrc/common/cuda_arch.cu
        return text.replace(pattern, replacement)

    try:
        found, _ = backward(64, 200, is_causal=True, change=change, **options)
    except SimulatorError as error:
        assert kinds is not None and error.kind in kinds, error
        return
    assert kinds is None and not torch.allclose(found, right, rtol=0.1, atol=0.1)
