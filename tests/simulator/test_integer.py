"""Integer and bit operations, comparisons and selections, against Python's integers."""

import operator

import numpy as np
import pytest

from tests.simulator.elementwise import edges, pairs, run
from tests.simulator.ptx_kernels import kernel
from tests.simulator.ptx_kernels import run as launch

TYPES = {"s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64}
each_type = pytest.mark.parametrize("type", TYPES)


def wrapped(values, dtype):
    """Python integers modulo the width of a type."""
    bits = 8 * np.dtype(dtype).itemsize
    unsigned = np.array([int(v) & (1 << bits) - 1 for v in values], f"u{bits // 8}")
    return unsigned.view(dtype)


def signed_pairs(type, nonzero=False):
    x, y = pairs_of(TYPES[type])
    if nonzero:
        keep = (y != 0) & ~((y == -1 if type[0] == "s" else y == 0) & (x == np.iinfo(TYPES[type]).min))
        x, y = x[keep], y[keep]
    return x, y


def pairs_of(dtype):
    head = edges(dtype, 0)[:14]
    a, b = (v.ravel() for v in np.meshgrid(head, head))
    return np.concatenate([a, edges(dtype, 1000, 1)]), np.concatenate([b, edges(dtype, 1000, 2)])


def check(instruction, inputs, function, out):
    found = run(instruction, inputs, out)
    wanted = wrapped([function(*map(int, values)) for values in zip(*inputs)], out)
    wrong = np.flatnonzero(found != wanted)
    assert not len(wrong), [(*(v[i] for v in inputs), found[i], wanted[i]) for i in wrong[:4]]


def truncated(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


@each_type
@pytest.mark.parametrize("name, function", [("add", operator.add), ("sub", operator.sub), ("min", min), ("max", max)])
def test_simple(type, name, function):
    check(f"{name}.{type} %d, %s0, %s1;", signed_pairs(type), function, TYPES[type])


@pytest.mark.parametrize("name, function", [("min", min), ("max", max)])
def test_larger_than_zero(name, function):
    check(f"{name}.relu.s32 %d, %s0, %s1;", signed_pairs("s32"), lambda a, b: max(function(a, b), 0), TYPES["s32"])


@each_type
def test_products(type):
    x, y = signed_pairs(type)
    bits = int(type[1:])
    check(f"mul.lo.{type} %d, %s0, %s1;", (x, y), operator.mul, TYPES[type])
    check(f"mul.hi.{type} %d, %s0, %s1;", (x, y), lambda a, b: a * b >> bits, TYPES[type])
    check(f"mad.lo.{type} %d, %s0, %s1, %s0;", (x, y), lambda a, b: a * b + a, TYPES[type])
    if bits < 64:
        wide = TYPES[f"{type[0]}{2 * bits}"]
        check(f"mul.wide.{type} %d, %s0, %s1;", (x, y), operator.mul, wide)
        z = x.astype(wide)
        check(f"mad.wide.{type} %d, %s0, %s1, %s2;", (x, y, z), lambda a, b, c: a * b + c, wide)


@each_type
def test_quotients(type):
    x, y = signed_pairs(type, nonzero=True)
    check(f"div.{type} %d, %s0, %s1;", (x, y), truncated, TYPES[type])
    check(f"rem.{type} %d, %s0, %s1;", (x, y), lambda a, b: a - b * truncated(a, b), TYPES[type])


@pytest.mark.parametrize("type", ["s16", "s32", "s64"])
def test_signed(type):
    (x, _) = signed_pairs(type)
    check(f"abs.{type} %d, %s0;", (x,), abs, TYPES[type])
    check(f"neg.{type} %d, %s0;", (x,), operator.neg, TYPES[type])


@pytest.mark.parametrize("type", ["s32", "u32"])
def test_of_24_bits_and_differences(type):
    x, y = signed_pairs(type)

    def low(a):
        a &= 0xFFFFFF
        return a - (1 << 24) if type == "s32" and a >> 23 else a

    check(f"mul24.lo.{type} %d, %s0, %s1;", (x, y), lambda a, b: low(a) * low(b), TYPES[type])
    check(f"mul24.hi.{type} %d, %s0, %s1;", (x, y), lambda a, b: low(a) * low(b) >> 16, TYPES[type])
    check(f"mad24.lo.{type} %d, %s0, %s1, %s1;", (x, y), lambda a, b: low(a) * low(b) + b, TYPES[type])
    check(f"sad.{type} %d, %s0, %s1, %s0;", (x, y), lambda a, b: a + abs(a - b), TYPES[type])


@pytest.mark.parametrize("type", ["s32", "u32"])
def test_dot_products(type):
    x, y = signed_pairs("u32")
    z = edges(TYPES[type], len(x))[: len(x)]
    view = np.int8 if type == "s32" else np.uint8

    def dp4a(a, b, c):
        parts = (np.array([v], np.uint32).view(view).astype(int) for v in (a, b))
        return int(np.dot(*parts)) + c

    check(f"dp4a.{type}.{type} %d, %s0, %s1, %s2;", (x, y, z), dp4a, TYPES[type])


def test_carry_chain():
    """256 bits from eight words."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 8, 32), dtype=np.uint64).astype(np.uint32)
    a[:, :8] = b[:, 8:16] = 0xFFFFFFFF
    for name, function in (("add", operator.add), ("sub", operator.sub)):
        body = ""
        for i in range(8):
            body += f"  ld.global.b32 %a{i}, [%base0 + {128 * i}];\n  ld.global.b32 %b{i}, [%base1 + {128 * i}];\n"
        for i in range(8):
            form = f"{name}.cc" if i == 0 else f"{name}c.cc" if i < 7 else f"{name}c"
            body += f"  {form}.u32 %c{i}, %a{i}, %b{i};\n"
        body += "".join(f"  st.global.b32 [%base2 + {128 * i}], %c{i};\n" for i in range(8))
        out = np.zeros((8, 32), np.uint32)
        launch(kernel(body, params=3), a, b, out)

        def whole(words):
            return [sum(int(w) << 32 * i for i, w in enumerate(column)) for column in words.T]

        assert whole(out) == [function(x, y) % 2**256 for x, y in zip(whole(a), whole(b))]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bitwise(bits):
    dtype = np.dtype(f"u{bits // 8}").type
    x, y = pairs_of(dtype)
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        check(f"{name}.b{bits} %d, %s0, %s1;", (x, y), function, dtype)
    check(f"not.b{bits} %d, %s0;", (x,), operator.invert, dtype)
    check(f"cnot.b{bits} %d, %s0;", (x,), lambda a: int(a == 0), dtype)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    unsigned, signed = np.dtype(f"u{bits // 8}").type, np.dtype(f"i{bits // 8}").type
    x = pairs_of(unsigned)[0]
    by = (np.arange(len(x)) % (2 * bits)).astype(np.uint32)
    check(f"shl.b{bits} %d, %s0, %s1;", (x, by), lambda a, n: a << n if n < bits else 0, unsigned)
    check(f"shr.u{bits} %d, %s0, %s1;", (x, by), lambda a, n: a >> n, unsigned)
    check(f"shr.s{bits} %d, %s0, %s1;", (x.view(signed), by), lambda a, n: a >> min(n, bits - 1), signed)


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shift(side, mode):
    x, y = pairs_of(np.uint32)
    by = (np.arange(len(x)) % 70).astype(np.uint32)

    def shifted(a, b, n):
        n = min(n, 32) if mode == "clamp" else n & 31
        both = b << 32 | a
        return both << n >> 32 if side == "l" else both >> n

    check(f"shf.{side}.{mode}.b32 %d, %s0, %s1, %s2;", (x, y, by), shifted, np.uint32)


def test_every_table_of_lop3():
    rng = np.random.default_rng(0)
    x, y, z = rng.integers(0, 2**32, (3, 256), dtype=np.uint64).astype(np.uint32)
    for table in range(0, 256, 5):

        def function(a, b, c, table=table):
            result = 0
            for row in range(8):
                if table >> row & 1:
                    terms = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                    result |= terms
            return result

        check(f"lop3.b32 %d, %s0, %s1, %s2, {table};", (x, y, z), function, np.uint32)


@pytest.mark.parametrize("mode", ["", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"])
def test_prmt(mode):
    x, y = pairs_of(np.uint32)
    select = edges(np.uint32, len(x))[: len(x)]

    def permuted(a, b, c):
        source = (b << 32 | a).to_bytes(8, "little")
        n = c & 3
        picks = {
            "": [c >> 4 * i & 15 for i in range(4)],
            "f4e": [n + i for i in range(4)],
            "b4e": [n - i & 7 for i in range(4)],
            "rc8": [n] * 4,
            "ecl": [max(i, n) for i in range(4)],
            "ecr": [min(i, n) for i in range(4)],
            "rc16": [2 * (n & 1) + i % 2 for i in range(4)],
        }[mode]
        result = 0
        for i, pick in enumerate(picks):
            byte = source[pick & 7]
            if not mode and pick & 8:
                byte = 255 if byte & 128 else 0
            result |= byte << 8 * i
        return result

    check(f"prmt.b32{'.' * bool(mode)}{mode} %d, %s0, %s1, %s2;", (x, y, select), permuted, np.uint32)


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(bits):
    dtype = np.dtype(f"u{bits // 8}").type
    x = pairs_of(dtype)[0]
    x = np.concatenate([x, dtype(1) << np.arange(bits).astype(dtype)])
    check(f"popc.b{bits} %d, %s0;", (x,), lambda a: a.bit_count(), np.uint32)
    check(f"clz.b{bits} %d, %s0;", (x,), lambda a: bits - a.bit_length(), np.uint32)
    check(f"brev.b{bits} %d, %s0;", (x,), lambda a: int(f"{a:0{bits}b}"[::-1], 2), dtype)
    check(f"bfind.u{bits} %d, %s0;", (x,), lambda a: a.bit_length() - 1, np.uint32)
    signed = x.view(np.dtype(f"i{bits // 8}"))
    check(f"bfind.s{bits} %d, %s0;", (signed,), lambda a: (a if a >= 0 else ~a).bit_length() - 1, np.uint32)


@pytest.mark.parametrize("type", ["u32", "s32", "u64", "s64"])
def test_bit_fields(type):
    bits = int(type[1:])
    x, y = signed_pairs(type)
    start = (np.arange(len(x)) * 7 % (bits + 9)).astype(np.uint32)
    length = (np.arange(len(x)) * 5 % (bits + 5)).astype(np.uint32)

    def extracted(a, p, n):
        """PTX ISA, bfe: beyond the top, the sign (or 0)."""
        if n == 0:
            return 0
        a &= (1 << bits) - 1
        sign = (a >> min(p + n - 1, bits - 1)) & 1 if type[0] == "s" else 0
        field = a >> p if p < bits else 0
        kept = min(n, max(bits - p, 0))
        field &= (1 << kept) - 1
        return field | (-1 << kept if sign else 0)

    check(f"bfe.{type} %d, %s0, %s1, %s2;", (x, start, length), extracted, TYPES[type])
    if type[0] == "u":

        def inserted(a, b, p, n):
            mask = ((1 << n) - 1) << p & (1 << bits) - 1 if p < bits else 0
            return b & ~mask | a << p & mask

        check(f"bfi.b{bits} %d, %s0, %s1, %s2, %s3;", (x, y, start, length), inserted, TYPES[type])


COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@each_type
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(type, name):
    x, y = signed_pairs(type)
    check(
        f"{{ setp.{name}.{type} %p, %s0, %s1; selp.b32 %d, 7, 9, %p; }}",
        (x, y),
        lambda a, b: 7 if COMPARISONS[name](a, b) else 9,
        np.uint32,
    )


@pytest.mark.parametrize("type, dtype", [("f32", np.float32), ("f64", np.float64)])
@pytest.mark.parametrize("name", [*COMPARISONS, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_comparisons_of_floats(type, dtype, name):
    x, y = pairs(dtype)
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        wanted = unordered == (name == "nan")
    else:
        with np.errstate(invalid="ignore"):
            wanted = COMPARISONS[name[:2]](x, y)
        wanted = np.where(unordered, len(name) == 3, wanted)
    found = run(f"{{ setp.{name}.{type} %p, %s0, %s1; selp.b32 %d, 1, 0, %p; }}", [x, y], np.uint32)
    assert (found == wanted).all()


@pytest.mark.parametrize("join", ["and", "or", "xor"])
def test_comparisons_joined_with_a_predicate(join):
    x, y = signed_pairs("s32")
    text = f"""{{ setp.gt.s32 %q, %s0, 5; setp.lt.{join}.s32 %p|%q, %s0, %s1, %q;
      selp.b32 %d, 1, 0, %p; selp.b32 %t, 2, 0, %q; or.b32 %d, %d, %t; }}"""
    function = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[join]

    def wanted(a, b):
        return function(a < b, a > 5) + 2 * function(not a < b, a > 5)

    check(text, (x, y), wanted, np.uint32)


def test_set_and_select():
    x, y = signed_pairs("s32")
    check("set.lt.u32.s32 %d, %s0, %s1;", (x, y), lambda a, b: -1 if a < b else 0, np.uint32)
    check("set.lt.f32.s32 %d, %s0, %s1;", (x, y), lambda a, b: 0x3F800000 if a < b else 0, np.uint32)
    check("slct.b32.s32 %d, %s0, %s1, %s0;", (x, y), lambda a, b: a if a >= 0 else b, np.int32)
