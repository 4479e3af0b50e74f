"""Floating-point arithmetic: exact operations bit for bit, approximate ones within what the PTX ISA documents."""

from fractions import Fraction

import numpy as np
import pytest

from tests.simulator.elementwise import edges, pairs, run, same
from tests.simulator.test_convert import ALL16, bf16_values, f16_values, to_16, to_f32

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TINY = np.finfo(np.float32).tiny
MODES = ["rn", "rz", "rm", "rp"]


def flush(x):
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x).astype(np.float32)


def exact_f32(x, y, operation, mode):
    """x op y of float32, rounded once; the float64 result is made odd where it is inexact, so that it rounds right."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    z = {"add": a + b, "sub": a - b, "mul": a * b}[operation]
    if operation != "mul":  # the rest of a sum, after Knuth
        b = -b if operation == "sub" else b
        part = z - a
        rest = (a - (z - part)) + (b - part)
        z = make_odd(z, rest)
        if mode == "rm":  # an exact zero of two different signs is -0 when rounding down
            z = np.where((z == 0) & (np.signbit(a) != np.signbit(b)), -0.0, z)
    return to_f32(z, mode)


def make_odd(z, rest):
    bits = z.view(np.int64)
    inexact = np.isfinite(z) & np.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
    away = (rest > 0) == (z > 0)
    return np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(np.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_f32(operation, mode):
    x, y = pairs(np.float32)
    found = run(f"{operation}.{mode}.f32 %d, %s0, %s1;", [x, y], np.float32)
    assert same(found, exact_f32(x, y, operation, mode)).all()


@pytest.mark.parametrize("operation", ["add", "mul"])
def test_f32_flushed_and_saturated(operation):
    x, y = pairs(np.float32)
    found = run(f"{operation}.rn.ftz.f32 %d, %s0, %s1;", [x, y], np.float32)
    assert same(found, flush(exact_f32(flush(x), flush(y), operation, "rn"))).all()
    found = run(f"{operation}.rn.sat.f32 %d, %s0, %s1;", [x, y], np.float32)
    wanted = exact_f32(x, y, operation, "rn")
    wanted = np.where(wanted > 0, np.minimum(wanted, np.float32(1)), np.float32(0))
    assert same(found, wanted).all()


def exact_fma(x, y, z, mode):
    """One by one, as fractions."""
    out = np.empty(len(x), np.float32)
    with np.errstate(all="ignore"):
        rough = x.astype(np.float64) * y + z
    for i, (a, b, c) in enumerate(zip(x, y, z)):
        if not np.isfinite([a, b, c]).all() or rough[i] == 0:
            out[i] = np.float32(rough[i])
            continue
        value = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        near = float(value)
        odd = make_odd(np.array([near]), np.array([float(np.sign(value - Fraction(near)))]))
        out[i] = to_f32(odd, mode)[0]
    return out


@pytest.mark.parametrize("mode", MODES)
def test_f32_fma(mode):
    x, y = pairs(np.float32)
    z = np.random.default_rng(3).permutation(np.resize(edges(np.float32), len(x)))
    z[::3] = -(x[::3] * y[::3])  # cancels
    keep = np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(z))[:3000]
    x, y, z = x[keep], y[keep], z[keep]
    wanted = exact_fma(x, y, z, mode)
    found = run(f"fma.{mode}.f32 %d, %s0, %s1, %s2;", [x, y, z], np.float32)
    nonzero = wanted != 0  # signs of exact zeros are those of the sum, tested above
    assert same(found, wanted)[nonzero].all() and (found[~nonzero] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_f32_division_and_roots(mode):
    x, y = pairs(np.float32)
    wide = x.astype(np.longdouble) / y.astype(np.longdouble)
    assert same(run(f"div.{mode}.f32 %d, %s0, %s1;", [x, y], np.float32), odd_to_f32(wide, mode)).all()
    assert same(run(f"rcp.{mode}.f32 %d, %s0;", [x], np.float32), odd_to_f32(1 / x.astype(np.longdouble), mode)).all()
    root = np.sqrt(x.astype(np.longdouble))
    assert same(run(f"sqrt.{mode}.f32 %d, %s0;", [x], np.float32), odd_to_f32(root, mode)).all()


def odd_to_f32(wide, mode):
    """A quotient or root of float32 in 64 bits of mantissa is a float32 only where it is one exactly."""
    near = wide.astype(np.float64)
    return to_f32(make_odd(near, (wide - near.astype(np.longdouble)).astype(np.float64)), mode)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div"])
def test_f64(operation):
    x, y = pairs(np.float64)
    wanted = {"add": x + y, "sub": x - y, "mul": x * y, "div": x / y}[operation]
    assert same(run(f"{operation}.rn.f64 %d, %s0, %s1;", [x, y], np.float64), wanted).all()


def test_f64_unary_and_fma():
    x, y = pairs(np.float64)
    assert same(run("sqrt.rn.f64 %d, %s0;", [x], np.float64), np.sqrt(x)).all()
    assert same(run("rcp.rn.f64 %d, %s0;", [x], np.float64), 1 / x).all()
    small = np.isfinite(x) & np.isfinite(y) & (np.abs(x) < 1e100) & (np.abs(y) < 1e100) & (np.abs(x) > 1e-100)
    x, y = x[small][:2000], y[small][:2000]
    wanted = np.array([float(Fraction(a) * Fraction(b) + 3) for a, b in zip(x.tolist(), y.tolist())])
    found = run("fma.rn.f64 %d, %s0, %s1, 0d4008000000000000;", [x, y], np.float64)
    assert same(found, wanted).all()


@pytest.mark.parametrize("dtype, type", [(np.float32, "f32"), (np.float64, "f64")])
@pytest.mark.parametrize("operation", ["min", "max"])
def test_extremes(operation, dtype, type):
    x, y = pairs(dtype)
    wanted = {"min": np.fmin, "max": np.fmax}[operation](x, y)
    zeros = (x == 0) & (y == 0)
    lower = np.signbit(x) | np.signbit(y) if operation == "min" else np.signbit(x) & np.signbit(y)
    wanted = np.where(zeros, np.where(lower, -0.0, 0.0), wanted)
    assert same(run(f"{operation}.{type} %d, %s0, %s1;", [x, y], dtype), wanted).all()
    if type == "f32":
        wanted = np.where(np.isnan(x) | np.isnan(y), np.nan, wanted)
        assert same(run(f"{operation}.NaN.f32 %d, %s0, %s1;", [x, y], dtype), wanted).all()


@pytest.mark.parametrize("dtype, type", [(np.float32, "f32"), (np.float64, "f64")])
def test_signs(dtype, type):
    x, y = pairs(dtype)
    assert same(run(f"abs.{type} %d, %s0;", [x], dtype), np.abs(x)).all()
    assert same(run(f"neg.{type} %d, %s0;", [x], dtype), -x).all()
    # PTX: the sign of the first operand, the size of the second.
    assert same(run(f"copysign.{type} %d, %s0, %s1;", [x, y], dtype), np.copysign(y, x)).all()


def ulps(found, wanted):
    """Distance in units of the last place of float32."""
    spacing = np.spacing(np.maximum(np.abs(wanted), TINY).astype(np.float32)).astype(np.float64)
    return np.abs(found.astype(np.float64) - wanted) / spacing


def moderate(low, high, count=20_000):
    return np.exp(np.random.default_rng(0).uniform(np.log(low), np.log(high), count)).astype(np.float32)


# Instruction, function, inputs, largest error in units of the last place. PTX ISA, the sections of each instruction.
APPROXIMATE = [
    ("rcp.approx.ftz.f32", lambda x: 1 / x, moderate(1e-30, 1e30), 1),
    ("sqrt.approx.ftz.f32", np.sqrt, moderate(1e-30, 1e30), 2),
    ("rsqrt.approx.ftz.f32", lambda x: x**-0.5, moderate(1e-30, 1e30), 2),
    ("ex2.approx.ftz.f32", np.exp2, np.concatenate([-moderate(1e-3, 120), moderate(1e-3, 120)]), 2),
]


@pytest.mark.parametrize("instruction, function, x, most", APPROXIMATE, ids=lambda v: v if isinstance(v, str) else "")
def test_approximations(instruction, function, x, most):
    found = run(f"{instruction} %d, %s0;", [x], np.float32)
    assert ulps(found, function(x.astype(np.float64))).max() <= most


@pytest.mark.parametrize("kind", ["full", "approx"])
def test_approximate_division(kind):
    x, y = moderate(1e-15, 1e15), moderate(1e-15, 1e15)[::-1].copy()
    found = run(f"div.{kind}.f32 %d, %s0, %s1;", [x, y], np.float32)
    assert ulps(found, x.astype(np.float64) / y).max() <= 2


@pytest.mark.parametrize(
    "instruction, function, low, high, error",
    [
        ("lg2.approx.f32", np.log2, 0.5, 2, 2**-22),  # absolute, in (0.5, 2)
        ("sin.approx.f32", np.sin, -np.pi, np.pi, 2**-20.5),
        ("cos.approx.f32", np.cos, -np.pi, np.pi, 2**-20.5),
    ],
)
def test_approximations_with_absolute_errors(instruction, function, low, high, error):
    x = np.random.default_rng(0).uniform(low, high, 20_000).astype(np.float32)
    found = run(f"{instruction} %d, %s0;", [x], np.float32)
    assert np.abs(found - function(x.astype(np.float64))).max() <= error


def test_approximate_tanh():
    x = np.concatenate([-moderate(1e-6, 20), moderate(1e-6, 20)])
    found, wanted = run("tanh.approx.f32 %d, %s0;", [x], np.float32), np.tanh(x.astype(np.float64))
    assert (np.abs(found - wanted) <= 2**-10.987 * np.abs(wanted)).all()


@pytest.mark.parametrize(
    "instruction, table",
    [
        (
            "ex2.approx.ftz.f32",
            [(-np.inf, 0), (-0.0, 1), (0.0, 1), (np.inf, np.inf), (1e-40, 1), (200, np.inf), (-200, 0)],
        ),
        (
            "lg2.approx.f32",
            [(-np.inf, np.nan), (0.0, -np.inf), (-0.0, -np.inf), (np.inf, np.inf), (-1, np.nan), (8, 3)],
        ),
        ("rcp.approx.f32", [(-np.inf, -0.0), (0.0, np.inf), (-0.0, -np.inf), (np.inf, 0.0), (4, 0.25)]),
        ("rsqrt.approx.f32", [(0.0, np.inf), (-0.0, -np.inf), (np.inf, 0.0), (-1, np.nan), (4, 0.5)]),
        ("sqrt.approx.f32", [(0.0, 0.0), (-0.0, -0.0), (np.inf, np.inf), (-1, np.nan), (4, 2)]),
        ("tanh.approx.f32", [(-np.inf, -1), (np.inf, 1), (0.0, 0.0), (-0.0, -0.0)]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_special_values(instruction, table):
    x, wanted = np.array([*table, (np.nan, np.nan)], np.float32).T
    assert same(run(f"{instruction} %d, %s0;", [x], np.float32), wanted).all()


HALVES = {"f16": f16_values, "bf16": bf16_values}


def half_pairs():
    head = ALL16[np.random.default_rng(0).permutation(65536)]
    special = np.array(
        [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0xBC00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x7F80, 0xFF80]
    )
    a, b = (x.ravel().astype(np.uint16) for x in np.meshgrid(special, special))
    return np.concatenate([a, ALL16]), np.concatenate([b, head])


@pytest.mark.parametrize("form", HALVES)
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma"])
def test_halves(form, operation):
    a, b = half_pairs()
    x, y = HALVES[form](a), HALVES[form](b)
    if operation == "fma":  # the product and the sum of 16-bit numbers may need more than a float64
        product = x.astype(np.longdouble) * y
        wide = product + x
        back = wide - product
        rest = (product - (wide - back)) + (x - back)
        near = wide.astype(np.float64)
        z = make_odd(near, np.where(wide == near, np.sign(rest), np.sign(wide - near)).astype(np.float64))
        found = run(f"fma.rn.{form} %d, %s0, %s1, %s0;", [a, b], np.uint16)
    else:
        z = {"add": x + y, "sub": x - y, "mul": x * y}[operation]
        found = run(f"{operation}.rn.{form} %d, %s0, %s1;", [a, b], np.uint16)
    wanted = to_16(z, form, "rn")
    nan = np.isnan(z)
    assert (np.isnan(HALVES[form](found)) == nan).all()
    assert (found == wanted)[~nan].all()


@pytest.mark.parametrize("form", HALVES)
@pytest.mark.parametrize("operation", ["add", "mul", "min", "max", "fma"])
def test_pairs_of_halves_are_two_halves(form, operation):
    a, b = half_pairs()
    low = a.astype(np.uint32) | b.astype(np.uint32) << 16
    high = b.astype(np.uint32) | a.astype(np.uint32) << 16
    rounding = "" if operation in ("min", "max") else ".rn"
    more = ", %s0" if operation == "fma" else ""
    found = run(f"{operation}{rounding}.{form}x2 %d, %s0, %s1{more};", [low, high], np.uint32)
    one = run(f"{operation}{rounding}.{form} %d, %s0, %s1{more};", [a, b], np.uint16)
    assert ((found & 0xFFFF).astype(np.uint16) == one).all()
    other = run(f"{operation}{rounding}.{form} %d, %s0, %s1{more};", [b, a], np.uint16)
    assert ((found >> 16).astype(np.uint16) == other).all()


@pytest.mark.parametrize("form", HALVES)
def test_extremes_and_signs_of_halves(form):
    a, b = half_pairs()
    x, y = HALVES[form](a), HALVES[form](b)
    for name, function in (("min", np.fmin), ("max", np.fmax)):
        found = HALVES[form](run(f"{name}.{form} %d, %s0, %s1;", [a, b], np.uint16))
        wanted = function(x, y)
        assert ((found == wanted) | (np.isnan(found) & np.isnan(wanted))).all()
    numbers = ~np.isnan(x)
    assert (run(f"abs.{form} %d, %s0;", [a], np.uint16) == (a & 0x7FFF))[numbers].all()
    assert (run(f"neg.{form} %d, %s0;", [a], np.uint16) == (a ^ 0x8000))[numbers].all()


@pytest.mark.parametrize("form", HALVES)
def test_fma_relu(form):
    a, b = half_pairs()
    plain = run(f"fma.rn.{form} %d, %s0, %s1, %s0;", [a, b], np.uint16)
    found = run(f"fma.rn.relu.{form} %d, %s0, %s1, %s0;", [a, b], np.uint16)
    values = HALVES[form](plain)
    assert (found == plain)[values > 0].all() and (HALVES[form](found)[values <= 0] == 0).all()


@pytest.mark.parametrize(
    "instruction, form, function, error",
    [
        ("ex2.approx.f16", "f16", np.exp2, 2**-9.9),
        ("tanh.approx.f16", "f16", np.tanh, 2**-10.987),
        ("tanh.approx.bf16", "bf16", np.tanh, 2**-8),
        ("ex2.approx.ftz.bf16", "bf16", np.exp2, 2**-7),
    ],
)
def test_approximations_of_halves(instruction, form, function, error):
    x = HALVES[form](ALL16)
    wanted = function(x)
    largest = np.abs(HALVES[form](ALL16[np.isfinite(x)])).max()
    keep = np.isfinite(wanted) & (np.abs(wanted) <= largest) & (np.abs(wanted) >= 2.0**-14)
    found = HALVES[form](run(f"{instruction} %d, %s0;", [ALL16], np.uint16))
    tolerance = error * np.abs(wanted) + 2.0 ** (-11 if form == "f16" else -8) * np.abs(wanted)  # and its rounding
    assert (np.abs(found - wanted) <= tolerance)[keep].all()
