"""mma.sync against matrix products in float64, lane by lane as the PTX ISA lays the fragments out."""

import numpy as np
import pytest

from tests.simulator import SimulatorError
from tests.simulator.ptx_kernels import (
    BYTES,
    accumulators,
    fragments,
    kernel,
    load,
    matrix,
    random_codes,
    run,
    store,
    values,
    vector,
    words,
)

# shape, d, a, b, target
VARIANTS = [
    ("m16n8k8", "f32", "f16", "f16", 75),
    ("m16n8k8", "f16", "f16", "f16", 75),
    ("m16n8k16", "f32", "f16", "f16", 80),
    ("m16n8k16", "f16", "f16", "f16", 80),
    ("m16n8k8", "f32", "bf16", "bf16", 80),
    ("m16n8k16", "f32", "bf16", "bf16", 80),
    ("m16n8k4", "f32", "tf32", "tf32", 80),
    ("m16n8k8", "f32", "tf32", "tf32", 80),
    *((f"m16n8k{k}", "s32", a, b, 80) for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")),
    *(("m16n8k32", "f32", a, b, 89) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
]


def _text(shape, d, a, b, target, counts, suffix="", before="", guard=""):
    na, nb, nc = counts
    return kernel(
        load("%a", na, 0)
        + load("%b", nb, 0, first=na)
        + load("%c", nc, 0, first=na + nb)
        + before
        + f"{guard} mma.sync.aligned.{shape}.row.col{suffix}.{d}.{a}.{b}.{d} "
        + f"{vector('%d', nc)}, {vector('%a', na)}, {vector('%b', nb)}, {vector('%c', nc)};\n"
        + store("%d", nc),
        target=f"sm_{target}",
    )


def _run(shape, d, a, b, target, codes_a, codes_b, c, **text):
    fragment_a, fragment_b = fragments(codes_a, codes_b, 4 // BYTES[a])
    fragment_c = accumulators(c, d)
    counts = len(fragment_a), len(fragment_b), len(fragment_c)
    out = words(len(fragment_c), 32)
    data = np.concatenate([fragment_a, fragment_b, fragment_c])
    counted = run(_text(shape, d, a, b, target, counts, **text), data, out)
    return matrix(out, d), counted


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "reals"])
@pytest.mark.parametrize("shape, d, a, b, target", VARIANTS)
def test_mma(shape, d, a, b, target, integers):
    rng = np.random.default_rng(0)
    k = int(shape[6:])
    codes_a = random_codes(rng, a, (16, k), integers)
    codes_b = random_codes(rng, b, (k, 8), integers)
    c = rng.integers(-8, 9, (16, 8)).astype(float)
    got, counted = _run(shape, d, a, b, target, codes_a, codes_b, c)
    exact = values(codes_a, a) @ values(codes_b, b) + c
    assert counted["mma_flops"] == 2 * 16 * 8 * k
    assert counted["classes"]["tensor"] == 1
    if integers or d == "s32":
        assert (got == exact).all()
    else:
        rounded = exact.astype({"f32": np.float32, "f16": np.float16}[d]).astype(float)
        assert np.abs(got - rounded).max() <= 1e-6 * np.abs(exact).max()


def test_products_are_exact():
    a, b = np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16)
    a[:, 0], b[0] = 1 + 2**-10, 1 + 2**-10  # the square has 21 bits
    codes = a.view(np.uint16), b.view(np.uint16)
    got, _ = _run("m16n8k16", "f32", "f16", "f16", 80, *codes, np.full((16, 8), -1.0))
    assert (got == 2**-9 + 2**-20).all()


@pytest.mark.parametrize("low, expected", [(2**-30, 1 + 2**-10), (-(2**-30), 1.0)])
def test_f16_sums_round_once(low, expected):
    """1 + 2^-11 lies in the middle of two numbers; what a float cannot hold decides."""
    a, b = np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16)
    a[:, :3], b[:3] = [1, 2**-11, 2**-15], np.array([1, 1, low * 2**15])[:, None]
    got, _ = _run("m16n8k16", "f16", "f16", "f16", 80, a.view(np.uint16), b.view(np.uint16), np.zeros((16, 8)))
    assert (got == expected).all()


@pytest.mark.parametrize("suffix, expected", [("", -(2**31) + 126), (".satfinite", 2**31 - 1)])
def test_integer_overflow(suffix, expected):
    a, b = np.zeros((16, 16), np.uint8), np.zeros((16, 8), np.uint8)
    a[:, 3], b[3] = 127, 1
    c = np.full((16, 8), 2.0**31 - 1)
    got, _ = _run("m16n8k16", "s32", "s8", "s8", 80, a, b, c, suffix=suffix)
    assert (got == expected).all()


@pytest.mark.parametrize(
    "instruction, target",
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "sm_75"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", "sm_75"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "sm_75"),
        ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", "sm_80"),
        ("mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32", "sm_80"),
        ("mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32", "sm_80"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32", "sm_80"),
    ],
)
def test_unsupported(instruction, target):
    body = f"{instruction} {vector('%d', 4)}, {vector('%a', 4)}, {vector('%b', 2)}, {vector('%c', 4)};\n"
    with pytest.raises(SimulatorError) as error:
        run(kernel(body, target), words(1), words(1))
    assert error.value.kind == "unsupported"


@pytest.mark.parametrize("before, guard", [("  setp.ne.u32 %p0, %tid, 5;\n", "@%p0"), ("", "")])
def test_lanes_absent(before, guard):
    text = _text("m16n8k8", "f32", "f16", "f16", 75, (2, 1, 4), before=before, guard=guard)
    with pytest.raises(SimulatorError) as error:
        run(text, words(7, 32), words(4, 32), threads=32 if guard else 20)
    assert error.value.kind == "divergence"


@pytest.mark.parametrize(
    "c, products, wanted",
    [
        (1.0, [1.5 * 2.0**-24], 1.0),  # nearest would be 1 + 2^-23
        (-1.0, [-1.5 * 2.0**-24], -1.0),
        (-1.0, [1.0, 2.0**-24], 2.0**-24),  # kept beside the 1
        (-1.0, [1.0, 2.0**-25], 0.0),
        (-1.0, [1.0, -(2.0**-25)], 0.0),
        (1.0, [2.0**-25] * 4, 1.0),  # each alone is too small
        (1e30, [float("inf")], float("inf")),
    ],
)
def test_float32_sums_are_cut_off(c, products, wanted):
    """Terms to the bits that are kept of the largest among them, the sum to a float, towards zero."""
    a, b = np.zeros((16, 8), np.float32), np.ones((8, 8), np.float32)
    a[:, : len(products)] = products
    got, _ = _run("m16n8k8", "f32", "tf32", "tf32", 80, a.view(np.uint32), b.view(np.uint32), np.full((16, 8), c))
    assert (got == wanted).all()
