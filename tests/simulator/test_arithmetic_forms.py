"""Forms of floating-point instructions beside the plain ones: flushed, saturated, rounded elsewhere, two halves."""

from fractions import Fraction

import numpy as np
import pytest

from tests.simulator.elementwise import edges, pairs, run, same
from tests.simulator.test_arithmetic import HALVES, MODES, exact_f32, exact_fma, flush, half_pairs, odd_to_f32
from tests.simulator.test_convert import ALL16, to_16

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def saturate(x):
    """PTX ISA, .sat: into [0, 1], NaN to +0."""
    return np.where(x > 0, np.minimum(x, 1), 0).astype(x.dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_f32_flushed_or_saturated_in_every_mode(operation, mode):
    x, y = pairs(np.float32, 1)
    flushed = flush(exact_f32(flush(x), flush(y), operation, mode))
    wanted = {".ftz": flushed, ".sat": saturate(exact_f32(x, y, operation, mode)), ".ftz.sat": saturate(flushed)}
    for form, value in wanted.items():
        found = run(f"{operation}.{mode}{form}.f32 %d, %s0, %s1;", [x, y], np.float32)
        assert same(found, value).all(), form


@pytest.mark.parametrize("mode", MODES)
def test_f32_fma_flushed_or_saturated(mode):
    x, y = pairs(np.float32, 2)
    z = np.random.default_rng(5).permutation(np.resize(edges(np.float32), len(x)))
    keep = np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(z))[-2500:]
    x, y, z = x[keep], y[keep], z[keep]
    saturated = saturate(exact_fma(x, y, z, mode))
    assert same(run(f"fma.{mode}.sat.f32 %d, %s0, %s1, %s2;", [x, y, z], np.float32), saturated).all()
    flushed = flush(exact_fma(flush(x), flush(y), flush(z), mode))
    found = run(f"fma.{mode}.ftz.f32 %d, %s0, %s1, %s2;", [x, y, z], np.float32)
    assert same(found, flushed)[flushed != 0].all() and (found[flushed == 0] == 0).all()


def test_f32_fma_of_infinities_and_zeros():
    special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -3e38], np.float32)
    x, y, z = (v.ravel().copy() for v in np.meshgrid(special, special, special))
    product = x.astype(np.float64) * y
    for mode in MODES:
        found = run(f"fma.{mode}.f32 %d, %s0, %s1, %s2;", [x, y, z], np.float32)
        wanted = product + z
        if mode == "rm":
            wanted = np.where((wanted == 0) & (np.signbit(product) | np.signbit(z)), -0.0, wanted)
        plain = ~np.isfinite(wanted) | (wanted == 0)
        assert same(found, wanted.astype(np.float32))[plain].all()


@pytest.mark.parametrize("mode", MODES)
def test_f32_division_and_roots_flushed(mode):
    x, y = pairs(np.float32, 3)
    a, b = flush(x).astype(np.longdouble), flush(y).astype(np.longdouble)
    for text, wide in (("div", a / b), ("rcp", 1 / a), ("sqrt", np.sqrt(a))):
        operands = "%s0, %s1" if text == "div" else "%s0"
        found = run(f"{text}.{mode}.ftz.f32 %d, {operands};", [x, y], np.float32)
        assert same(found, flush(odd_to_f32(wide, mode))).all(), text


def round_f64(value, mode):
    """A fraction that is not 0 as a double."""
    try:
        near = float(value)
    except OverflowError:
        near = np.inf if value > 0 else -np.inf
    if mode == "rn" or (np.isfinite(near) and Fraction(near) == value):
        return near
    above = near > 0 if np.isinf(near) else Fraction(near) > value
    down = mode == "rm" or (mode == "rz" and value > 0)
    return np.nextafter(near, -np.inf if above else np.inf) if above == down else near


def exact_f64(operation, x, y, z, mode):
    """One by one; nan where the operands or the result are no number or 0, which test_f64 covers."""
    functions = {
        "add": lambda a, b, _: a + b,
        "sub": lambda a, b, _: a - b,
        "mul": lambda a, b, _: a * b,
        "fma": lambda a, b, c: a * b + c,
        "div": lambda a, b, _: a / b if b else 0,
        "rcp": lambda a, *_: 1 / a if a else 0,
    }
    out = np.full(len(x), np.nan)
    for i, numbers in enumerate(zip(x.tolist(), y.tolist(), z.tolist())):
        if np.isfinite(numbers).all() and (value := functions[operation](*map(Fraction, numbers))):
            out[i] = round_f64(value, mode)
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma", "div", "rcp"])
def test_f64_in_every_mode(operation, mode):
    x, y = pairs(np.float64)
    z = np.random.default_rng(7).permutation(np.resize(edges(np.float64), len(x)))
    z[::3] = -(x[::3] * y[::3])  # cancels
    keep = np.r_[: len(x) : 4]
    x, y, z = x[keep], y[keep], z[keep]
    operands = {"fma": "%s0, %s1, %s2", "rcp": "%s0"}.get(operation, "%s0, %s1")
    found = run(f"{operation}.{mode}.f64 %d, {operands};", [x, y, z], np.float64)
    wanted = exact_f64(operation, x, y, z, mode)
    known = ~np.isnan(wanted)
    assert known.sum() > 500 and same(found, wanted)[known].all()


@pytest.mark.parametrize("mode", MODES)
def test_f64_roots_and_zeros_in_every_mode(mode):
    x = np.abs(edges(np.float64, 500))
    x = x[np.isfinite(x) & (x > 0)]
    found = run(f"sqrt.{mode}.f64 %d, %s0;", [x], np.float64)
    for a, root in zip(x.tolist(), found.tolist()):
        below = Fraction(np.nextafter(root, 0)) if mode != "rm" and mode != "rz" else Fraction(root)
        above = Fraction(np.nextafter(root, np.inf)) if mode != "rp" else Fraction(root)
        if mode == "rn":  # no root is half way between two doubles
            below, above = (below + Fraction(root)) / 2, (above + Fraction(root)) / 2
        assert below**2 <= Fraction(a) <= above**2
    zeros = np.array([0.0, -0.0, 1.5, -1.5])
    a, b = (v.ravel().copy() for v in np.meshgrid(zeros, zeros))
    cancelled = -0.0 if mode == "rm" else 0.0  # of two signs
    wanted = np.where((a + b == 0) & (np.signbit(a) != np.signbit(b)), cancelled, a + b)
    assert same(run(f"add.{mode}.f64 %d, %s0, %s1;", [a, b], np.float64), wanted).all()


def test_f64_approximations_leave_the_lower_word_zero():
    """PTX ISA: rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 give the upper 32 bits, the lower ones are 0."""
    x = np.exp(np.random.default_rng(0).uniform(-600, 600, 4096))
    for name, wanted in (("rcp", 1 / x), ("rsqrt", x**-0.5)):
        found = run(f"{name}.approx.ftz.f64 %d, %s0;", [x], np.float64)
        assert not (found.view(np.uint64) & np.uint64(0xFFFFFFFF)).any()
        assert (np.abs(found - wanted) <= 2.0**-19 * wanted).all()  # 20 bits of mantissa
    special = np.array([0.0, -0.0, 5e-324, -5e-324, np.inf, np.nan])
    found = run("rcp.approx.ftz.f64 %d, %s0;", [special], np.float64)
    assert same(found, np.array([np.inf, -np.inf, np.inf, -np.inf, 0, np.nan])).all()
    # A root and a reciprocal, each rounded once, against numpy's power.
    found = run("rsqrt.approx.f64 %d, %s0;", [x], np.float64)
    assert (np.abs(found - x**-0.5) <= 2.0**-51 * x**-0.5).all()


def test_divisors_beyond_the_range_of_the_approximation():
    """PTX ISA, div.approx.f32: for 2^126 < |b| < 2^128 the result is 0, NaN where a is infinite; div.full is not so."""
    x = np.array([1e38, -1e38, 3e38, np.inf, -np.inf, np.nan, 1e38, 1.0], np.float32)
    y = np.array([2e38, 2e38, -3e38, 2e38, -2e38, 2e38, 2.0**126, np.inf], np.float32)
    found = run("div.approx.f32 %d, %s0, %s1;", [x, y], np.float32)
    assert (found[:3] == 0).all() and np.isnan(found[3:6]).all()
    assert found[6] == np.float32(1e38) / np.float32(2.0**126) and found[7] == 0
    full = run("div.full.f32 %d, %s0, %s1;", [x, y], np.float32)
    assert np.allclose(full[:3], x[:3] / y[:3], rtol=2.0**-22, atol=0) and np.isinf(full[3:5]).all()


@pytest.mark.parametrize("dtype, type", [(np.float32, "f32"), (np.float64, "f64")])
def test_properties(dtype, type):
    x = edges(dtype)
    small = np.abs(x) < np.finfo(dtype).tiny
    wanted = {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": ~np.isnan(x),
        "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & (~small | (x == 0)),  # PTX ISA: zeros are considered normal
        "subnormal": small & (x != 0),
    }
    for name, value in wanted.items():
        found = run(f"testp.{name}.{type} %p, %s0; selp.u32 %d, 1, 0, %p;", [x], np.uint32)
        assert (found == value).all(), name


def extreme(operation, x, y, nan=False, xorsign=False):
    """PTX ISA, the semantics of min and max."""
    sign = np.signbit(x) ^ np.signbit(y)
    if xorsign:
        x, y = np.abs(x), np.abs(y)
    smaller = (x < y) | ((x == y) & np.signbit(x))
    out = np.where(smaller == (operation == "min"), x, y)
    out = np.where(np.isnan(x), y, np.where(np.isnan(y), x, out))
    if nan:
        out = np.where(np.isnan(x) | np.isnan(y), np.nan, out)
    return np.where(np.isnan(out), out, np.copysign(out, np.where(sign, -1, 1))) if xorsign else out


EXTREMES = [(nan, xorsign) for nan in ("", ".NaN") for xorsign in ("", ".xorsign.abs")]


@pytest.mark.parametrize("nan, xorsign", EXTREMES)
@pytest.mark.parametrize("operation", ["min", "max"])
def test_forms_of_extremes(operation, nan, xorsign):
    x, y = pairs(np.float32)
    x[-500:] = -y[-500:]
    wanted = extreme(operation, x, y, bool(nan), bool(xorsign))
    assert same(run(f"{operation}{nan}{xorsign}.f32 %d, %s0, %s1;", [x, y], np.float32), wanted).all()
    wanted = extreme(operation, flush(x), flush(y), bool(nan), bool(xorsign))
    assert same(run(f"{operation}.ftz{nan}{xorsign}.f32 %d, %s0, %s1;", [x, y], np.float32), wanted).all()
    a, b = half_pairs()
    for form, values in HALVES.items():
        wanted = extreme(operation, values(a), values(b), bool(nan), bool(xorsign))
        found = run(f"{operation}{nan}{xorsign}.{form} %d, %s0, %s1;", [a, b], np.uint16)
        assert same(values(found), wanted).all(), form
        assert (found == 0x7FFF)[np.isnan(wanted)].all()  # the canonical NaN


def test_signs_flushed():
    x = edges(np.float32)
    assert same(run("abs.ftz.f32 %d, %s0;", [x], np.float32), np.abs(flush(x))).all()
    assert same(run("neg.ftz.f32 %d, %s0;", [x], np.float32), -flush(x)).all()


def flush16(x):
    return np.where(np.abs(x) < 2.0**-14, np.copysign(0.0, x), x)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma"])
def test_f16_flushed_or_saturated(operation):
    a, b = half_pairs()
    values = HALVES["f16"]

    def exact(x, y):
        return {"add": x + y, "sub": x - y, "mul": x * y, "fma": x * y + 0.5}[operation]  # in 53 bits

    more = ", 0x3800" if operation == "fma" else ""
    plain, flushed = exact(values(a), values(b)), exact(flush16(values(a)), flush16(values(b)))
    rounded = flush16(values(to_16(flushed, "f16", "rn")))
    wanted = {
        "ftz": rounded,
        "sat": values(to_16(saturate(plain), "f16", "rn")),
        "ftz.sat": saturate(rounded),
    }
    for form, value in wanted.items():
        found = values(run(f"{operation}.rn.{form}.f16 %d, %s0, %s1{more};", [a, b], np.uint16))
        assert same(found, value).all(), form


@pytest.mark.parametrize("form", HALVES)
def test_relu_gives_zero_or_nan(form):
    a, b = half_pairs()
    values = HALVES[form]
    plain = values(run(f"fma.rn.{form} %d, %s0, %s1, %s0;", [a, b], np.uint16))
    found = run(f"fma.rn.relu.{form} %d, %s0, %s1, %s0;", [a, b], np.uint16)
    assert same(values(found), np.where(np.isnan(plain), np.nan, np.where(plain > 0, plain, 0.0))).all()
    assert (found == 0x7FFF)[np.isnan(plain)].all()  # PTX ISA, .relu: NaN becomes the canonical one


@pytest.mark.parametrize("form", HALVES)
@pytest.mark.parametrize(
    "operation", ["sub.rn", "fma.rn.relu", "abs", "neg", "tanh.approx", "ex2.approx", "max.NaN", "min.xorsign.abs"]
)
def test_two_halves_are_each_for_itself(form, operation):
    if (form, operation) == ("bf16", "ex2.approx"):
        operation += ".ftz"
    a, b = half_pairs()
    low = a.astype(np.uint32) | b.astype(np.uint32) << 16
    high = b.astype(np.uint32) | a.astype(np.uint32) << 16
    name = operation.split(".")[0]
    operands = {"fma": "%s0, %s1, %s0", "sub": "%s0, %s1", "max": "%s0, %s1", "min": "%s0, %s1"}.get(name, "%s0")
    found = run(f"{operation}.{form}x2 %d, {operands};", [low, high], np.uint32)
    assert (found & 0xFFFF == run(f"{operation}.{form} %d, {operands};", [a, b], np.uint16)).all()
    assert (found >> 16 == run(f"{operation}.{form} %d, {operands};", [b, a], np.uint16)).all()


# PTX ISA, ex2 and tanh of half precision: their largest errors.
@pytest.mark.parametrize(
    "instruction, form, function, error, relative",
    [
        ("ex2.approx", "f16", np.exp2, 2**-9.9, True),
        ("ex2.approx.ftz", "bf16", np.exp2, 2**-7, True),
        ("tanh.approx", "f16", np.tanh, 2**-10.987, False),
        ("tanh.approx", "bf16", np.tanh, 2**-8, False),
    ],
)
def test_approximations_of_all_halves(instruction, form, function, error, relative):
    values, (least, smallest, largest) = (
        HALVES[form],
        {
            "f16": (2.0**-24, 2.0**-14, 65504),
            "bf16": (2.0**-133, 2.0**-126, 3.39e38),
        }[form],
    )
    x = values(ALL16)
    found, wanted = values(run(f"{instruction}.{form} %d, %s0;", [ALL16], np.uint16)), function(x)
    assert np.isnan(found[np.isnan(x)]).all()
    inside = np.isfinite(x) & (wanted <= largest)
    least = smallest if "ftz" in instruction else least  # an error of one unit where the result is subnormal
    most = np.maximum(error * np.abs(wanted), least) if relative else error
    assert (np.abs(found - wanted) <= most)[inside].all()
    assert same(found, function(x))[np.isinf(x)].all()
    assert np.isinf(found[wanted > 2 * largest]).all()
