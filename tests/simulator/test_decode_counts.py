"""The CUDA kernels of decoding: what they read, exactly, how they split keys, and that broken copies are found out."""

import pytest
import torch

from fastlayers import ops
from tests.backends import BACKENDS
from tests.simulator import SimulatorError, install, record, rewrite_ptx, uninstall

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the kernels")


@pytest.fixture(autouse=True)
def gpu():
    install("sm_80")
    yield
    uninstall()


def decode(lengths, capacity, heads_q=8, heads_k=1, seqlen_q=1, head_dim=128, page_size=None, dtype=BF16, **options):
    """(out, launches); pages, if wanted, lie in memory from the last to the first."""
    generator = torch.Generator().manual_seed(0)
    batch = len(lengths)
    query = torch.randn(batch, heads_q, seqlen_q, head_dim, generator=generator).to(dtype)
    key, value = torch.randn(2, batch, heads_k, capacity, head_dim, generator=generator).to(dtype)
    if page_size:
        options["page_table"] = torch.arange(batch * capacity // page_size, dtype=torch.int32).flip(0).view(batch, -1)
        key, value = (
            x.view(batch, heads_k, -1, page_size, head_dim).transpose(1, 2).flatten(0, 1).flip(0) for x in (key, value)
        )
    with record() as launches, torch.no_grad():
        out = ops.decode_attention(
            query, key, value, torch.tensor(lengths, dtype=torch.int32), enable_gqa=True, backend="cuda", **options
        )
    return out, launches


def bytes_copied(launch):
    """By cp.async, which only keys, values and queries are."""
    copies = [line for line in launch.counts["lines"] if line["instruction"].startswith("cp.async.cg")]
    return sum(line["global"]["bytes"] for line in copies if "global" in line)


CALLS = {
    "one row": {"heads_q": 1},
    "a group": {},
    "several heads": {"heads_q": 12, "heads_k": 3, "head_dim": 64},
    "two tiles of rows": {"seqlen_q": 3, "head_dim": 256},
    "all rows of a block": {"seqlen_q": 8},
    "float32": {"seqlen_q": 2, "dtype": torch.float32},
    "pages": {"page_size": 16},
    "pages of a row": {"page_size": 1, "head_dim": 64},
}


@pytest.mark.parametrize("name", CALLS)
def test_keys_and_values_are_read_once(name):
    """Of each KV head, for all its query heads and tokens; behind the lengths, nothing."""
    call = {"heads_q": 8, "heads_k": 1, "seqlen_q": 1, "head_dim": 128, "dtype": BF16, **CALLS[name]}
    lengths = [700, 130]
    _, launches = decode(lengths, 1024, **call)
    first = launches[0]
    row = call["head_dim"] * call["dtype"].itemsize
    caches = 2 * sum(lengths) * call["heads_k"] * row
    parts = first.grid[0]
    queries = sum(min(parts, -(-n // 64)) for n in lengths) * call["heads_q"] * call["seqlen_q"] * row
    assert caches < bytes_copied(first) <= caches + queries  # each part reads the queries
    for launch in launches:
        counts = launch.counts
        assert counts["shared"]["wavefronts"] == counts["shared"]["minimum"]
        assert counts["global"]["sectors"] <= 1.02 * counts["global"]["minimum"]


def test_rows_beyond_a_block_read_the_caches_again():
    _, launches = decode([1000], 1000, seqlen_q=17, head_dim=64, is_causal=False)  # 136 rows in three blocks
    parts, blocks, _ = launches[0].grid
    assert blocks == 3
    assert bytes_copied(launches[0]) == 3 * 2 * 1000 * 64 * 2 + parts * 136 * 64 * 2


def test_the_parts_follow_the_lengths():
    """As many parts as the capacity and the GPU allow; each sequence is cut into equal ones, on the device."""
    _, launches = decode([8192, 100], 8192, head_dim=64)
    assert [launch.name.split("<")[0] for launch in launches] == [
        "attention_decode_kernel",
        "attention_decode_combine_kernel",
    ]
    assert launches[0].grid == (64, 1, 2)  # of 128 keys at least; 108 multiprocessors are there for 216 blocks
    _, alone = decode([8192], 8192, head_dim=64)
    assert launches[0].counts["mma_flops"] < 1.05 * alone[0].counts["mma_flops"]
    _, (whole,) = decode([512, 100], 512, head_dim=64, heads_q=64, heads_k=64)
    assert whole.grid == (1, 64, 2)


def test_a_window_reads_what_it_sees():
    _, launches = decode([5000], 8192, window=(999, 0), head_dim=64)
    copied = sum(map(bytes_copied, launches))
    parts = launches[0].grid[0]
    assert 2 * 1000 * 64 * 2 < copied <= 2 * 1000 * 64 * 2 + parts * 8 * 64 * 2


def test_many_tokens_take_the_forward_kernel():
    _, (launch,) = decode([300], 300, seqlen_q=65, head_dim=64)
    assert launch.name.startswith("attention_forward")
    _, launches = decode([300], 300, seqlen_q=64, head_dim=64)
    assert launches[0].name.startswith("attention_decode")
    _, launches = decode([320], 320, seqlen_q=65, head_dim=64, page_size=64)
    assert launches[0].name.startswith("attention_decode")


BREAKS = {  # what is taken out or changed, and what finds it
    "a barrier": ("bar.sync", "bar.warp.sync -1; //", {"race", "uninitialised", "async"}),
    "the wait for copies": ("cp.async.wait_group 0", "cp.async.wait_group 1", {"async"}),
    "the commit of copies": ("cp.async.commit_group;", "", {"async"}),
    "the end of the keys": ("min.s32", "max.s32", {"arguments", "out_of_bounds"}),
    "the page of a key": ("shr.u64", "shl.b64", None),
    "the transposition of v": (".x4.trans.", ".x4.", None),
    "the softmax's base": ("ex2.approx.ftz.f32", "rsqrt.approx.ftz.f32", None),
    "the division by the sum": ("div.rn.f32", "mul.rn.f32", None),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_found_out(name):
    pattern, replacement, kinds = BREAKS[name]
    call = {"lengths": [700], "capacity": 704, "seqlen_q": 3, "page_size": 8}
    right, _ = decode(**call)
    with rewrite_ptx(lambda text: text.replace(pattern, replacement)):
        try:
            found, _ = decode(**call)
        except SimulatorError as error:
            assert error.kind in (kinds or {"uninitialised", "async", "out_of_bounds"}), error
            return
    assert kinds is None and not torch.equal(found, right)
