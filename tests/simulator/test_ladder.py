"""benchmarks/ladder: every step is right, takes what its README says, and is found out when broken."""

import functools
import re

import pytest
import torch

from fastlayers.benchmarks.ladder import ladder
from tests.backends import BACKENDS
from tests.simulator import SimulatorError

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the steps")


@functools.cache
def ptx_of(step):
    return ladder.ptx_of(ladder.FOLDER / f"{step}.cu")


def run(ptx, seqlen, is_causal=False, heads=1, growth=1.0):
    """One launch, checked. Scores of the last key are `growth` times as large as they would be."""
    query, key, value = ladder.qkv(seqlen, heads)
    key = (key * torch.linspace(1, growth, seqlen)[:, None]).bfloat16()
    out, counts = ladder.run(ptx, query, key, value, is_causal)
    ladder.check(out, query, key, value, is_causal)
    return counts


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("step", ladder.STEPS)
def test_a_step_is_right(step, is_causal):
    for seqlen, growth in ((1, 1), (67, 1), (200, 40), (131, 1 / 40)):
        run(ptx_of(step), seqlen, is_causal, heads=2 if seqlen < 100 else 1, growth=growth)


@functools.cache
def told():
    """The numbers of the README's table."""
    text = (ladder.FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| (\w[\w ]*) \| ([\d,]+) \| ([\d.]+)% \| (.*) \|$", text, re.MULTILINE)
    return {name: [float(x.replace(",", "")) for x in (n, share, *rest.split(" | "))] for name, n, share, rest in rows}


@pytest.mark.parametrize("step", [*ladder.STEPS, "the product"])
def test_the_readme_tells_what_it_takes(step):
    """Within 3%, which another compiler may differ by, and 10% for the product, which is worked on."""
    if step == "the product":
        _, counts = ladder.product(*ladder.qkv(512))
    else:
        counts = run(ptx_of(step), 512)
    assert ladder.row(counts) == pytest.approx(told()[step], rel=0.1 if step == "the product" else 0.03)


def test_each_step_is_a_step_up():
    naive, tiles, products, shared, softmax = (told()[step] for step in ladder.STEPS)
    assert naive[0] > 4 * tiles[0] > 4 * 10 * products[0]  # instructions
    assert naive[4] > 1000 * tiles[4] and tiles[4] > products[4] > shared[4] == shared[5]  # sectors
    assert products[2] > 6 * products[3] and shared[2] == shared[3]  # wavefronts
    assert softmax[0] < 0.61 * shared[0] and softmax[2:] == shared[2:]


BREAKS = {  # step, what is taken out or changed, and the error that finds it
    "the maximum is that of one key": ("1_naive", "j < end; ++j) top", "j < 1; ++j) top", None),
    "no barrier after use": ("2_tiles", "__syncthreads();  // all", "// all", "race"),
    "v is not transposed": ("3_tensor_cores", ".x4.trans.", ".x4.", None),
    "copies are not waited for": ("4_shared_memory", "cp.async.wait_all;", "", "async"),
    "rows beyond the end are copied": ("4_shared_memory", "row < rows ? 16 : 0", "16", "out_of_bounds"),
    "the largest score of one lane": ("5_softmax", "max_of_row(largest[m][r])", "largest[m][r]", None),
    "output is not rescaled": ("5_softmax", "output[m][d][2 * r] *= shrink;", "", None),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_found_out(name):
    step, pattern, replacement, kind = BREAKS[name]
    source = (ladder.FOLDER / f"{step}.cu").read_text()
    assert pattern in source
    broken = ladder.ptx_of(source.replace(pattern, replacement))
    with pytest.raises(SimulatorError if kind else AssertionError) as found:
        run(broken, 200, is_causal=True, growth=40)
    assert kind is None or found.value.kind == kind
