"""cvt between all types and roundings: every pattern of 16 and 8 bits, edges and random ones of wider types.

Expected values come from exact arithmetic: every source is a float64 or an integer that Python holds exactly, and the
nearest numbers of the target below and above it are found in the sorted list of all of them (16 bits) or by numpy's
nextafter (float32).
"""

import numpy as np
import pytest
import torch

from tests.simulator.elementwise import edges, run, same

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast", "ignore:overflow encountered")

ALL16 = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def bf16_values(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def f16_values(bits):
    return bits.view(np.float16).astype(np.float64)


_VALUES = {"f16": f16_values(ALL16), "bf16": bf16_values(ALL16)}
_CANONICAL = 0x7FFF


def _table(form):
    """Finite values in ascending order, and their bit patterns; of the zeros the positive one."""
    values = _VALUES[form]
    keep = np.isfinite(values) & (ALL16 != 0x8000)
    order = np.argsort(values[keep], kind="stable")
    return values[keep][order], ALL16[keep][order]


def to_16(x, form, mode):
    """Bits of float64 numbers in f16 or bf16; the next number beyond the largest one rounds to infinity."""
    table, bits = _table(form)
    step = table[-1] - table[-2]
    grid = np.concatenate([[-np.inf], table, [np.inf]])
    infinity = 0x7C00 if form == "f16" else 0x7F80
    codes = np.concatenate([[0x8000 | infinity], bits, [infinity]])
    finite = np.concatenate([[table[0] - step], table, [table[-1] + step]])  # for distances
    up = np.clip(np.searchsorted(grid, x, "left"), 0, len(grid) - 1)
    exact = grid[up] == x
    down = np.where(exact, up, np.maximum(up - 1, 0))
    low, high = x - finite[down], finite[up] - x
    odd = codes[down] & 1 == 1
    nearest = np.where((low < high) | ((low == high) & ~odd), down, up)
    toward_zero = np.where(x > 0, down, up)
    index = {"rn": nearest, "rz": toward_zero, "rm": down, "rp": up}[mode]
    result = codes[index]
    result = np.where((result & 0x7FFF) == 0, np.where(np.signbit(x), 0x8000, 0), result)
    result = np.where(np.isinf(x), np.where(x > 0, infinity, 0x8000 | infinity), result)
    return np.where(np.isnan(x), _CANONICAL, result).astype(np.uint16)


def to_f32(x, mode):
    """float64 to float32 with a rounding."""
    with np.errstate(all="ignore"):
        near = x.astype(np.float32)
        wide = near.astype(np.float64)
        below = np.where(wide > x, np.nextafter(near, np.float32(-np.inf)), near)
        above = np.where(wide < x, np.nextafter(near, np.float32(np.inf)), near)
        zero = np.where(x > 0, below, above)
        result = {"rn": near, "rz": zero, "rm": below, "rp": above}[mode]
    return np.where(result == 0, np.copysign(np.float32(0), x), result).astype(np.float32)


def assert_bits(found, wanted, source):
    wrong = np.flatnonzero(found != wanted)
    assert not len(wrong), [(source[i], hex(found[i]), hex(wanted[i])) for i in wrong[:5]]


@pytest.mark.parametrize("form", ["f16", "bf16"])
def test_from_16_bits(form):
    found = run(f"cvt.f32.{form} %d, %s0;", [ALL16], np.float32)
    assert same(found, _VALUES[form].astype(np.float32)).all()


def test_f16_to_f64():
    assert same(run("cvt.f64.f16 %d, %s0;", [ALL16], np.float64), _VALUES["f16"]).all()


@pytest.mark.parametrize("form, mode", [(f, m) for f in ("f16", "bf16") for m in ("rn", "rz", "rm", "rp")])
def test_f32_to_16_bits(form, mode):
    halves = (ALL16.astype(np.uint32) << 16) | 0x8000  # between two bf16
    x = np.concatenate([edges(np.float32), _VALUES[form].astype(np.float32), halves.view(np.float32)])
    found = run(f"cvt.{mode}.{form}.f32 %d, %s0;", [x], np.uint16)
    assert_bits(found, to_16(x.astype(np.float64), form, mode), x)


@pytest.mark.parametrize("form", ["f16", "bf16"])
def test_f32_to_16_bits_as_torch_does(form):
    x = edges(np.float32, 200_000)
    x = x[~np.isnan(x)]
    wanted = torch.from_numpy(x).to({"f16": torch.float16, "bf16": torch.bfloat16}[form]).view(torch.int16).numpy()
    assert_bits(run(f"cvt.rn.{form}.f32 %d, %s0;", [x], np.uint16), wanted.view(np.uint16), x)


@pytest.mark.parametrize("form", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("relu", ["", ".relu"])
def test_f32_pairs_to_16_bits(form, mode, relu):
    x, y = edges(np.float32), edges(np.float32)[::-1].copy()
    found = run(f"cvt.{mode}{relu}.{form}x2.f32 %d, %s0, %s1;", [x, y], np.uint32)
    high, low = (to_16(v.astype(np.float64), form, mode) for v in (x, y))
    if relu:
        high, low = (np.where((v & 0x8000) != 0, 0, v) for v in (high, low))
    assert_bits(found, high.astype(np.uint32) << 16 | low, x)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_f64_to_f32(mode):
    x = np.concatenate([edges(np.float64), edges(np.float32).astype(np.float64)])
    assert same(run(f"cvt.{mode}.f32.f64 %d, %s0;", [x], np.float32), to_f32(x, mode)).all()


def test_f32_to_f64():
    x = edges(np.float32)
    assert same(run("cvt.f64.f32 %d, %s0;", [x], np.float64), x.astype(np.float64)).all()


INTEGERS = ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"]


def numpy_type(name):
    return np.dtype({"s": "i", "u": "u"}[name[0]] + str(int(name[1:]) // 8))


def register_type(name):
    """8-bit numbers live in 16-bit registers."""
    return np.dtype("u2") if name.endswith("8") else numpy_type(name)


def rounded(x, mode):
    with np.errstate(all="ignore"):
        return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)


@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_to_integers(source, target, mode):
    """Out of range they saturate; NaN is 0 below 64 bits and from f16."""
    x = ALL16 if source == "f16" else edges({"f32": np.float32, "f64": np.float64}[source], 20_000)
    values = _VALUES["f16"] if source == "f16" else x.astype(np.float64)
    keep = ~np.isnan(values)
    x, values = x[keep], values[keep]
    found = run(f"cvt.{mode}.{target}.{source} %d, %s0;", [x], register_type(target))
    info = np.iinfo(numpy_type(target))
    whole = np.clip(rounded(values, mode), float(info.min), float(info.max))
    wanted = np.array([min(max(int(v), info.min), info.max) for v in whole], numpy_type(target))
    found = found.astype(numpy_type(target)) if target.endswith("8") else found
    assert_bits(found, wanted, values)


@pytest.mark.parametrize("source", ["f16", "f32"])
@pytest.mark.parametrize("target", ["s32", "u32", "s16"])
def test_nan_to_integers(source, target):
    x = np.full(8, np.nan, {"f16": np.float16, "f32": np.float32}[source])
    assert not run(f"cvt.rzi.{target}.{source} %d, %s0;", [x], register_type(target)).any()


@pytest.mark.parametrize("source", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("target", ["f16", "f32", "f64"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_from_integers(source, target, mode):
    x = edges(numpy_type(source), 8192)
    if source in ("s16", "u16"):
        x = ALL16.view(numpy_type(source))
    found = run(f"cvt.{mode}.{target}.{source} %d, %s0;", [x], {"f16": "u2", "f32": "f4", "f64": "f8"}[target])
    if target == "f16":
        # Beyond 2^53 a float64 is inexact, and f16 has overflowed long before.
        return assert_bits(found, to_16(x.astype(np.float64), "f16", mode), x)
    wanted = np.array([exactly(int(v), target, mode) for v in x], found.dtype)
    assert same(found, wanted).all()


def exactly(value, target, mode):
    """An integer in float32 or float64 with a rounding, by shifting it."""
    digits = {"f32": 24, "f64": 53}[target]
    size, sign = abs(value), -1 if value < 0 else 1
    shift = max(size.bit_length() - digits, 0)
    kept, rest = size >> shift, size & ((1 << shift) - 1)
    half = 1 << shift >> 1
    away = {"rz": False, "rm": sign < 0, "rp": sign > 0, "rn": rest > half or (rest == half and kept & 1 == 1)}[mode]
    if rest and away:
        kept += 1
    return float(sign * (kept << shift))


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("saturate", ["", ".sat"])
def test_between_integers(source, target, saturate):
    x = edges(numpy_type(source))
    given = x.astype(np.int16).view(np.uint16) if source.endswith("8") else x
    found = run(f"cvt{saturate}.{target}.{source} %d, %s0;", [given], register_type(target)).astype(numpy_type(target))
    info = np.iinfo(numpy_type(target))
    if saturate:
        wanted = np.array([min(max(int(v), info.min), info.max) for v in x], numpy_type(target))
    else:
        wanted = x.astype(numpy_type(target))
    assert_bits(found, wanted, x)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("type, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_to_whole_numbers(mode, type, dtype):
    x = edges(dtype)
    found = run(f"cvt.{mode}.{type}.{type} %d, %s0;", [x], dtype)
    assert same(found, np.copysign(rounded(x, mode), x)).all()


@pytest.mark.parametrize("type", ["f32", "f64"])
def test_saturated(type):
    x = edges({"f32": np.float32, "f64": np.float64}[type])
    found = run(f"cvt.sat.{type}.{type} %d, %s0;", [x], x.dtype)
    wanted = np.where(np.isnan(x) | (x <= 0), x.dtype.type(0), np.minimum(x, 1))
    assert same(found, wanted).all()


def test_flushed():
    x = edges(np.float32)
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    x = np.concatenate([x, np.arange(1, 100, dtype=np.uint32).view(np.float32)])
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    flushed = np.where(tiny, np.copysign(np.float32(0), x), x)
    assert_bits(run("cvt.rn.ftz.f16.f32 %d, %s0;", [x], np.uint16), to_16(flushed.astype(float), "f16", "rn"), x)
    found = run("cvt.ftz.f64.f32 %d, %s0;", [x], np.float64)
    assert same(found, flushed.astype(np.float64)).all()


FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ALL8 = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("form", FP8)
def test_from_8_bits(form):
    both = ALL16  # every pair
    found = run(f"cvt.rn.f16x2.{form}x2 %d, %s0;", [both], np.uint32)
    values = ALL8.view(FP8[form]).to(torch.float16).numpy().view(np.uint16)
    values = np.where(np.isnan(values.view(np.float16)), _CANONICAL, values).astype(np.uint32)
    assert_bits(found, values[both >> 8] << 16 | values[both & 255], both)


@pytest.mark.parametrize("form", FP8)
@pytest.mark.parametrize("source", ["f16", "f32"])
def test_to_8_bits(form, source):
    """To the nearest, ties to even; beyond the largest number it stays there (.satfinite)."""
    x = _VALUES["f16"].astype(np.float32)
    if source == "f32":
        x = np.concatenate([x, edges(np.float32)])
    largest = torch.finfo(FP8[form]).max
    clipped = torch.from_numpy(x).clamp(-largest, largest)
    wanted = clipped.to(FP8[form]).view(torch.uint8).numpy().astype(np.uint16)
    wanted = np.where(np.isnan(x), 0x7F, wanted)
    if source == "f16":
        given = [ALL16.astype(np.uint32) << 16 | ALL16]
        found = run(f"cvt.rn.satfinite.{form}x2.f16x2 %d, %s0;", given, np.uint16)
    else:
        found = run(f"cvt.rn.satfinite.{form}x2.f32 %d, %s0, %s1;", [x, x], np.uint16)
    assert_bits(found, wanted << 8 | wanted, x)


def test_tf32():
    """10 bits of mantissa, ties away from zero."""
    x = edges(np.float32, 50_000)
    x = x[np.isfinite(x)]
    found = run("cvt.rna.tf32.f32 %d, %s0;", [x], np.uint32)
    bits = x.view(np.uint32).astype(np.uint64) + 0x1000
    assert_bits(found & np.uint32(0xFFFFE000), (bits & 0xFFFFE000).astype(np.uint32), x)
