"""What lanes tell each other: shfl, vote, match, redux, activemask, elect."""

import numpy as np
import pytest

from tests.simulator import SimulatorError
from tests.simulator.ptx_kernels import kernel, run, words

LANES = range(32)


def values(seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)


def warp(body, *inputs, outputs=1, target="sm_90a", threads=32):
    """%a<i>: word of input i; what %d<i> hold comes back, one array each."""
    out = [words(32) for _ in range(outputs)]
    text = "".join(f"  ld.global.b32 %a{i}, [%base{i}];\n" for i in range(len(inputs))) + body
    text += "".join(f"\n  st.global.b32 [%base{len(inputs) + i}], %d{i};" for i in range(outputs))
    run(kernel(text, target, len(inputs) + outputs), *inputs, *out, threads=threads)
    return out


def source_lane(mode, lane, by, c):
    """PTX ISA, shfl.sync: the lane that is read, and whether it lies inside the segment."""
    segment, clamp = c >> 8 & 31, c & 31
    last = (lane & segment) | (clamp & ~segment)
    first = lane & segment
    j = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | by & ~segment}[mode]
    inside = j >= last if mode == "up" else j <= last
    return (j, 1) if inside else (lane, 0)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("by", [0, 1, 3, 9, 31])
def test_shuffles(mode, width, by):
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    x = values()
    found, valid = warp(f"shfl.sync.{mode}.b32 %d0|%p1, %a0, {by}, {c}, -1; selp.u32 %d1, 1, 0, %p1;", x, outputs=2)
    wanted = [source_lane(mode, lane, by, c) for lane in LANES]
    assert found.tolist() == [x[lane] for lane, _ in wanted]
    assert valid.tolist() == [inside for _, inside in wanted]


def test_each_lane_may_ask_for_another():
    x, lanes = values(), np.random.default_rng(1).permutation(32).astype(np.uint32)
    (found,) = warp("shfl.sync.idx.b32 %d0, %a0, %a1, 31, -1;", x, lanes)
    assert (found == x[lanes]).all()


@pytest.mark.parametrize("bits", [0, 1, 0xFFFFFFFF, 0x80000001, 0x0000FFFF])
def test_votes(bits):
    x = np.array([bits >> lane & 1 for lane in LANES], np.uint32)
    body = "setp.ne.u32 %p1, %a0, 0;\n"
    for i, mode in enumerate(("all", "any", "uni")):
        body += f"vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %d{i}, 1, 0, %p2;\n"
    body += "vote.sync.ballot.b32 %d3, %p1, -1; vote.sync.ballot.b32 %d4, !%p1, -1;"
    found = [set(v.tolist()) for v in warp(body, x, outputs=5)]
    full = 0xFFFFFFFF
    assert found == [{int(bits == full)}, {int(bits != 0)}, {int(bits in (0, full))}, {bits}, {bits ^ full}]


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_in_any_segments_and_clamps(mode):
    """Each lane with a distance, a segment mask and a clamp of its own; the bits above are not looked at."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        x, by, c = (rng.integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32) for _ in range(3))
        body = f"shfl.sync.{mode}.b32 %d0|%p1, %a0, %a1, %a2, -1; selp.u32 %d1, 1, 0, %p1;"
        found, valid = warp(body, x, by, c, outputs=2)
        wanted = [source_lane(mode, lane, int(by[lane]) & 31, int(c[lane])) for lane in LANES]
        assert found.tolist() == [x[lane] for lane, _ in wanted]
        assert valid.tolist() == [inside for _, inside in wanted]


def test_shuffles_may_overwrite_what_they_read():
    x = values()
    assert warp("mov.b32 %d0, %a0; shfl.sync.bfly.b32 %d0, %d0, 1, 31, -1;", x)[0].tolist() == [
        x[lane ^ 1] for lane in LANES
    ]


@pytest.mark.parametrize("seed", range(4))
def test_some_lanes_vote_and_match(seed):
    """Any set of lanes; the others keep what they have."""
    rng = np.random.default_rng(seed)
    mask = int(rng.integers(1, 2**32))
    lanes = [lane for lane in LANES if mask >> lane & 1]
    x = rng.integers(0, 3 - seed % 3, 32).astype(np.uint32)  # of three, two, one value
    body = f"mov.u32 %r0, 1; shl.b32 %r0, %r0, %tid; and.b32 %r0, %r0, {mask}; setp.ne.u32 %p0, %r0, 0;"
    body += "".join(f"mov.u32 %d{i}, 77;" for i in range(7)) + "@!%p0 bra DONE; setp.ne.u32 %p1, %a0, 0;"
    for i, mode in enumerate(("all", "any", "uni")):
        body += f"vote.sync.{mode}.pred %p2, !%p1, {mask}; selp.u32 %d{i}, 1, 0, %p2;"
    body += f"vote.sync.ballot.b32 %d3, %p1, {mask}; match.any.sync.b32 %d4, %a0, {mask};"
    body += f"match.all.sync.b32 %d5|%p3, %a0, {mask}; selp.u32 %d6, 1, 0, %p3; DONE:"
    found = warp(body, x, outputs=7)
    no = x[lanes] == 0
    alike = {v: sum(1 << lane for lane in lanes if x[lane] == v) for v in set(x[lanes].tolist())}
    one = len(alike) == 1
    wanted = [no.all(), no.any(), one or no.all() or not no.any(), mask ^ alike.get(0, 0)]
    wanted = [[int(v)] * len(lanes) for v in wanted] + [[alike[v] for v in x[lanes].tolist()]]
    wanted += [[mask if one else 0] * len(lanes), [int(one)] * len(lanes)]
    assert [array[lanes].tolist() for array in found] == wanted
    others = [lane for lane in LANES if lane not in lanes]
    assert all((array[others] == 77).all() for array in found)


def test_matches_of_64_bits():
    """Pairs of words: equal in one half only is not equal."""
    low, high = (np.random.default_rng(s).integers(0, 2, 32).astype(np.uint32) for s in (0, 1))
    body = """mov.b64 %x0, {%a0, %a1}; match.any.sync.b64 %d0, %x0, -1; match.all.sync.b64 %d1|%p1, %x0, -1;
      mov.b64 %x1, {%a2, %a3}; match.all.sync.b64 %d2|%p1, %x1, -1; selp.u32 %d3, 1, 0, %p1;"""
    same = np.full(32, 5, np.uint32)
    some, none, all_, yes = warp(body, low, high, same, same, outputs=4)
    pairs = list(zip(low.tolist(), high.tolist()))
    assert some.tolist() == [sum(1 << o for o in LANES if pairs[o] == pairs[lane]) for lane in LANES]
    assert not none.any() and (all_ == 0xFFFFFFFF).all() and yes.all()


def test_votes_of_some_lanes():
    (found,) = warp(
        """mov.u32 %d0, 77; setp.lt.u32 %p1, %tid, 12; setp.ne.u32 %p2, %a0, 0;
        @%p1 vote.sync.ballot.b32 %d0, %p2, 0xfff;""",
        np.arange(32, dtype=np.uint32) % 2,
    )
    assert found.tolist() == [0xAAA] * 12 + [77] * 20


@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_matches(count):
    x = values()[np.random.default_rng(count).integers(0, count, 32)]
    some, all_, same = warp(
        """match.any.sync.b32 %d0, %a0, -1; match.all.sync.b32 %d1|%p1, %a0, -1; selp.u32 %d2, 1, 0, %p1;""",
        x,
        outputs=3,
    )
    equal = [sum(1 << other for other in LANES if x[other] == x[lane]) for lane in LANES]
    everywhere = len(set(x.tolist())) == 1
    assert some.tolist() == equal
    assert set(all_.tolist()) == {0xFFFFFFFF if everywhere else 0} and set(same.tolist()) == {int(everywhere)}


@pytest.mark.parametrize("mode", ["add", "min", "max", "and", "or", "xor"])
@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FF0F])
def test_reductions(mode, mask):
    x = values()
    types = ["b32"] if mode in ("and", "or", "xor") else ["s32", "u32"]
    lanes = [lane for lane in LANES if mask >> lane & 1]
    for type in types:
        part = x[lanes].view(np.int32) if type == "s32" else x[lanes]
        wanted = {
            "add": lambda v: np.add.reduce(v, dtype=v.dtype),
            "min": np.min,
            "max": np.max,
            "and": np.bitwise_and.reduce,
            "or": np.bitwise_or.reduce,
            "xor": np.bitwise_xor.reduce,
        }[mode](part)
        body = f"""mov.u32 %d0, 0; mov.u32 %r0, 1; shl.b32 %r0, %r0, %tid; and.b32 %r0, %r0, {mask};
          setp.ne.u32 %p1, %r0, 0; @%p1 redux.sync.{mode}.{type} %d0, %a0, {mask};"""
        (found,) = warp(body, x)
        assert set(found[lanes].tolist()) == {int(np.array([wanted]).view(np.uint32)[0])}


def test_active_lanes_and_the_elected_one():
    active, leader, chosen = warp(
        """mov.u32 %d0, 0; mov.u32 %d1, 99; mov.u32 %d2, 0; setp.ge.u32 %p1, %tid, 9;
        @%p1 bra THERE; bra DONE;
        THERE: activemask.b32 %d0; elect.sync %d1|%p2, 0xfffffe00; selp.u32 %d2, 1, 0, %p2;
        DONE:""",
        outputs=3,
    )
    assert active.tolist() == [0] * 9 + [0xFFFFFE00] * 23
    assert leader.tolist() == [99] * 9 + [9] * 23 and np.flatnonzero(chosen).tolist() == [9]


@pytest.mark.parametrize(
    "instruction",
    [
        "shfl.sync.idx.b32 %d0, %a0, 0, 31, MASK;",
        "vote.sync.any.pred %p2, %p1, MASK;",
        "shfl.sync.up.b32 %d0|%p2, %a0, 1, 0, MASK;",
        "vote.sync.ballot.b32 %d0, %p1, MASK;",
        "redux.sync.add.u32 %d0, %a0, MASK;",
        "match.any.sync.b32 %d0, %a0, MASK;",
        "match.all.sync.b32 %d0|%p2, %a0, MASK;",
        "elect.sync %d0|%p2, MASK;",
    ],
)
def test_wrong_member_masks(instruction):
    """Half of the warp comes; the mask has to name just that half."""
    body = "mov.u32 %d0, 0; setp.ge.u32 %p1, %tid, 16; @%p1 bra DONE; {} DONE:"
    warp(body.format(instruction.replace("MASK", "0xffff")), values())
    for mask in ("-1", "0xfff0"):
        with pytest.raises(SimulatorError) as caught:
            warp(body.format(instruction.replace("MASK", mask)), values())
        assert caught.value.kind == "divergence"


def test_lanes_that_left_are_not_waited_for():
    """PTX ISA: a mask may name lanes that have exited."""
    (found,) = warp("setp.ge.u32 %p1, %tid, 20; @%p1 ret; vote.sync.ballot.b32 %d0, 1, -1;", outputs=1)
    assert found.tolist() == [0xFFFFF] * 20 + [0] * 12
    (found,) = warp("redux.sync.add.s32 %d0, 3, -1;", threads=8)
    assert found[:8].tolist() == [24] * 8


@pytest.mark.parametrize(
    "body",
    [
        "add.u32 %r0, %tid, 1; shfl.sync.idx.b32 %d0, %a0, %r0, 31, 0xffff;",  # lane 15 reads 16
        "not.b32 %r0, %tid; or.b32 %r0, %r0, 0xffff; vote.sync.ballot.b32 %d0, %p1, %r0;",  # masks that differ
    ],
)
def test_lanes_that_do_not_belong_together(body):
    with pytest.raises(SimulatorError) as caught:
        warp("mov.u32 %d0, 0; setp.ge.u32 %p1, %tid, 16; @%p1 bra DONE; " + body + " DONE:", values())
    assert caught.value.kind == "divergence"


def test_instructions_of_later_gpus():
    for instruction, first in (("redux.sync.add.u32 %d0, %tid, -1;", 80), ("elect.sync %d0|%p1, -1;", 90)):
        with pytest.raises(SimulatorError) as caught:
            warp(instruction, target="sm_75" if first == 80 else "sm_89")
        assert caught.value.kind == "unsupported"
        warp("mov.u32 %d0, 0;" + instruction, target=f"sm_{first}")
