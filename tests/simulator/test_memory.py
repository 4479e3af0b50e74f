"""Loads, stores and atomics in every width, type and state space."""

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.simulator import Module, SimulatorError
from tests.simulator.cuda import compile_cuda
from tests.simulator.elementwise import edges
from tests.simulator.ptx_kernels import kernel
from tests.simulator.ptx_kernels import run as launch

KERNELS = Path(__file__).parent / "kernels"
memory = compile_cuda.__wrapped__  # a fresh module: its variables begin anew


def module():
    return memory(KERNELS / "memory.cu")


@pytest.mark.parametrize("type", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_narrow_loads_extend(type, space):
    """Into 64 bits, from memory that each thread owns 8 bytes of."""
    bits = int(type[1:])
    x = edges(np.uint64, 512)[:512]
    found = np.zeros(512, np.uint64)
    body = """.reg .b64 %in, %out, %v; .reg .b32 %s;
      mad.wide.u32 %in, %tid, 4, %base0; mad.wide.u32 %out, %tid, 4, %base1; ld.global.b64 %v, [%in];
      mad.lo.u32 %s, %tid, 8, %smem; st.shared.b64 [%s], %v;"""
    where = "%in" if space == "global" else "%s"
    body += f"ld.{space}.{type} %v, [{where}]; st.global.b64 [%out], %v;"
    launch(kernel(body, shared=4096), x, found, threads=512)
    low = x & np.uint64((1 << bits) - 1)
    wanted = low.astype(f"{'i' if type[0] == 's' else 'u'}{bits // 8}").astype(np.int64).view(np.uint64)
    wanted = wanted if type[0] == "s" else low
    assert (found == wanted).all()


@pytest.mark.parametrize("vector", [1, 2, 4])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("space", ["global", "shared", "local"])
def test_vectors(vector, bits, space):
    size = vector * bits // 8
    if size > 16:
        pytest.skip("vectors have up to 16 bytes")
    x = np.random.default_rng(0).integers(0, 256, (64, size), dtype=np.uint8)
    found = np.zeros_like(x)
    parts = ", ".join(f"%v{i}" for i in range(vector))
    one = f"{{{parts}}}" if vector > 1 else parts
    form = f"{f'v{vector}.' if vector > 1 else ''}b{bits}"
    body = f""".reg .b64 %in, %out, %l; .reg .b32 %s; .reg .b{max(bits, 16)} %v<4>; .local .align 16 .b8 mine[16];
      ld.param.u64 %in, [p0]; mad.wide.u32 %in, %tid, {size}, %in;
      ld.param.u64 %out, [p1]; mad.wide.u32 %out, %tid, {size}, %out;
      ld.global.{form} {one}, [%in]; mad.lo.u32 %s, %tid, {size}, %smem; mov.u64 %l, mine;"""
    if space == "shared":
        body += f"st.shared.{form} [%s], {one}; xor.b32 %s, %s, 0; ld.shared.{form} {one}, [%s];"
    if space == "local":
        body += f"st.local.{form} [%l], {one}; ld.local.{form} {one}, [%l];"
    body += f"st.global.{form} [%out], {one};"
    counts = launch(kernel(body, shared=1024), x, found, threads=64)
    assert (found == x).all()
    assert counts["global"]["bytes"] == 2 * 64 * size


def test_hints_change_nothing():
    body = """createpolicy.fractional.L2::evict_last.b64 %x1, 1.0;
      ld.global.L1::no_allocate.L2::cache_hint.v2.b32 {%a0, %a1}, [%x0], %x1;
      ld.global.nc.L1::evict_last.L2::128B.b32 %a2, [%x0 + 8]; ld.volatile.global.u32 %a3, [%x0 + 12];
      ld.relaxed.gpu.global.b32 %a4, [%x0]; ld.acquire.sys.global.b32 %a5, [%x0]; prefetch.global.L2 [%x0];
      st.global.cs.b32 [%base1], %a0; st.release.gpu.global.b32 [%base1], %a0; st.global.wt.b32 [%base1], %a3;"""
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    launch(kernel("ld.param.u64 %x0, [p0];" + body), x, out)
    assert (out == 3).all()


def test_constants_and_variables():
    out = np.zeros(33, np.int32)
    m = module()
    m.launch("constants", 1, 32, [out])
    line = [3, 5, 7, 9]
    assert out[:32].tolist() == [10 * (i % 4 + 1) + 100 * line[i % 4] for i in range(32)]
    assert out[32] == 1 + 2 * 7
    for start in (7, 39):  # variables keep their values from launch to launch
        m.launch("count", 1, 32, [out])
        assert sorted(out[:32].tolist()) == list(range(start, start + 32))


def test_parameters():
    data, out = np.array([5, 6], np.int32), np.zeros(10)
    mixed = struct.pack("<bxxxxxxxdhhhxxQ", -3, 2.25, 7, 8, -9, data.ctypes.data)
    module().launch("parameters", 1, 1, [-1, -300, -70000, -(2**40), 0.5, 0.1, mixed, out], buffers=[data])
    assert out.tolist() == [-1, -300, -70000, -(2.0**40), 0.5, 0.1, -3, 2.25, -9, 6]


def test_generic_addresses():
    x, out = np.arange(32, dtype=np.int32) * 7, np.zeros(64, np.int32)
    module().launch("generic", 1, 32, [x, out])
    wanted = [[7 * i, 1000, 3 + i, 40][i % 4] for i in range(32)]
    assert out[:32].tolist() == wanted
    assert out[32:].tolist() == [[1, 4, 2, 1][i % 4] for i in range(32)]


def test_dynamic_shared_memory_follows_the_static():
    out = np.zeros(32, np.float32)
    module().launch("two_arrays", 1, 32, [out], shared=256)
    assert out.tolist() == [31 - i + 2 * i for i in range(32)]


def test_compare_and_swap_loops_and_shared_atomics():
    total, pair, real = np.zeros(1, np.uint32), np.zeros(2, np.uint32), np.zeros(1, np.float32)
    module().launch("spin_sum", 8, 64, [total])
    assert total[0] == 8 * sum(range(64))
    module().launch("shared_sums", 1, 128, [pair, real])
    assert pair.tolist() == [sum(range(0, 128, 2)), sum(range(1, 128, 2))] and real[0] == 64


REDUCTIONS = [
    ("add.u32", np.uint32, np.add),
    ("add.u64", np.uint64, np.add),
    ("add.f64", np.float64, np.add),
    ("add.f32", np.float32, np.add),
    ("min.s32", np.int32, np.minimum),
    ("max.s32", np.int32, np.maximum),
    ("min.u64", np.uint64, np.minimum),
    ("max.s64", np.int64, np.maximum),
    ("and.b32", np.uint32, np.bitwise_and),
    ("or.b64", np.uint64, np.bitwise_or),
    ("xor.b32", np.uint32, np.bitwise_xor),
    ("add.noftz.f16", np.float16, np.add),
]


@pytest.mark.parametrize("form, dtype, function", REDUCTIONS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("opcode", ["atom", "red"])
def test_atomics(form, dtype, function, opcode):
    """1024 threads of four blocks update one number; small whole ones, so that no sum rounds."""
    kind = np.dtype(dtype).kind
    x = edges(dtype, 4096)[-1024:] if kind in "iu" else np.resize(np.arange(-1, 3), 1024).astype(dtype)
    start = x[:1].copy()
    total = start.copy()
    size, bits = x.itemsize, 8 * x.itemsize
    result = "%v, " if opcode == "atom" else ""
    body = f""".reg .b64 %in; .reg .b{bits} %v; mov.u32 %r0, %ctaid.x; mad.lo.u32 %r0, %r0, 256, %tid;
      ld.param.u64 %in, [p0]; mad.wide.u32 %in, %r0, {size}, %in; ld.global.b{bits} %v, [%in];
      ld.param.u64 %in, [p1]; {opcode}.global.{form} {result}[%in], %v;"""
    Module(kernel(body)).launch("kernel", 4, 256, [x, total])
    with np.errstate(over="ignore"):
        assert total[0] == function(start[0], function.reduce(x, dtype=dtype) if kind in "iu" else x.sum(dtype=dtype))


def test_atomics_give_what_was_there():
    for form, start, b in (("add.u32", 5, 3), ("inc.u32", 0, 2), ("dec.u32", 2, 5), ("exch.b32", 9, 4)):
        at, old = np.array([start], np.uint32), np.zeros(32, np.uint32)
        body = f"ld.param.u64 %x0, [p0]; atom.global.{form} %a0, [%x0], {b}; st.global.b32 [%base1], %a0;"
        launch(kernel(body), at, old)
        value, wanted = start, []
        for _ in range(32):
            wanted.append(value)
            if form.startswith("add"):
                value += b
            elif form.startswith("inc"):
                value = 0 if value >= b else value + 1
            elif form.startswith("dec"):
                value = b if value == 0 or value > b else value - 1
            else:
                value = b
        assert sorted(old.tolist()) == sorted(wanted) and at[0] == value


@pytest.mark.parametrize("form", ["f16x2", "bf16x2"])
def test_atomic_pairs(form):
    one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}[form]
    total = np.zeros(1, np.uint32)
    launch(kernel(f"ld.param.u64 %x0, [p0]; red.global.add.noftz.{form} [%x0], {one << 16 | one};", "sm_90a", 1), total)
    wanted = {"f16x2": 0x5000, "bf16x2": 0x4200}[form]  # 32
    assert total[0] == wanted << 16 | wanted


def test_atomic_vectors():
    total = np.zeros(4, np.float32)
    body = """ld.param.u64 %x0, [p0]; mov.b32 %a0, 0f3F800000; mov.b32 %a1, 0f40000000;
      red.global.v4.f32.add [%x0], {%a0, %a1, %a0, %a1};"""
    launch(kernel(body, "sm_90a", 1), total)
    assert total.tolist() == [32, 64, 32, 64]


def test_subnormal_sums_are_flushed_in_global_memory_only():
    total, kept = np.zeros(1, np.float32), np.zeros(32, np.uint32)
    body = """ld.param.u64 %x0, [p0]; red.global.add.f32 [%x0], 0f00000001; mov.b32 %a0, 0; st.shared.b32 [%smem], %a0;
      red.shared.add.f32 [%smem], 0f00000001; ld.shared.b32 %a1, [%smem]; st.global.b32 [%base1], %a1;"""
    launch(kernel(body, shared=16), total, kept)
    assert total[0] == 0 and (kept == 32).all()


UPDATES = {
    "add": lambda a, b: a + b,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "exch": lambda a, b: b,
    "inc": lambda a, b: 0 if a >= b else a + 1,
    "dec": lambda a, b: b if a == 0 or a > b else a - 1,
}
FORMS = ["add.u32", "add.s32", "add.u64", "inc.u32", "dec.u32", "exch.b32", "exch.b64"]
FORMS += [f"{f}.{t}" for f in ("min", "max") for t in ("u32", "s32", "u64", "s64")]
FORMS += [f"{f}.{t}" for f in ("and", "or", "xor") for t in ("b32", "b64")]


@pytest.mark.parametrize("space", ["global", "shared", ""])
@pytest.mark.parametrize("form", FORMS)
def test_one_atomic_of_every_kind(form, space):
    """Each thread on a place of its own, all pairs of special values; without a space the address is generic."""
    name, type = form.split(".")
    bits = int(type[1:])
    dtype = np.dtype(f"{'i' if type[0] == 's' else 'u'}{bits // 8}")
    special = edges(dtype, 0)[-16:]
    a, b = (v.ravel().copy() for v in np.meshgrid(special, special))
    place, old = a.copy(), np.zeros_like(a)
    size = dtype.itemsize
    body = f""".reg .b64 %at, %b, %out, %s64; .reg .b{bits} %v, %w;
      mul.lo.u32 %r0, %tid, {size}; cvt.u64.u32 %s64, %r0;
      ld.param.u64 %at, [p0]; add.u64 %at, %at, %s64; ld.param.u64 %b, [p1]; add.u64 %b, %b, %s64;
      ld.param.u64 %out, [p2]; add.u64 %out, %out, %s64; ld.global.b{bits} %v, [%b]; add.u32 %r1, %smem, %r0;"""
    if space == "shared":
        body += f"ld.global.b{bits} %w, [%at]; st.shared.b{bits} [%r1], %w;"
        body += f"atom.shared.{form} %w, [%r1], %v; st.global.b{bits} [%out], %w;"
        body += f"ld.shared.b{bits} %w, [%r1]; st.global.b{bits} [%at], %w;"
    else:
        body += f"atom{space and '.'}{space}.{form} %w, [%at], %v; st.global.b{bits} [%out], %w;"
    launch(kernel(body, params=3, shared=8 * len(a)), place, b, old, threads=len(a))
    assert (old == a).all()
    wanted = [UPDATES[name](x, y) % 2**bits for x, y in zip(a.tolist(), b.tolist())]
    assert place.view(f"u{size}").tolist() == wanted


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_compare_and_swap(bits):
    """Of 64 threads that would put their number in place of a 7, one does; where there is no 7, none."""
    places, old = np.array([7, 8, 9, 9], f"u{bits // 8}"), np.zeros(64, f"u{bits // 8}")
    size = bits // 8
    body = f""".reg .b64 %at, %out; .reg .b{bits} %v, %w; ld.param.u64 %at, [p0]; ld.param.u64 %out, [p1];
      mad.wide.u32 %out, %tid, {size}, %out; add.u32 %r0, %tid, 100; cvt.u{bits}.u32 %v, %r0;
      atom.global.cas.b{bits} %w, [%at], 7, %v; st.global.b{bits} [%out], %w;
      atom.global.cas.b{bits} %w, [%at + {size}], 7, %v;"""
    launch(kernel(body), places, old, threads=64)
    assert places[0] in range(100, 164) and places[1:].tolist() == [8, 9, 9]
    assert sorted(old.tolist()).count(7) == 1 and set(old.tolist()) == {7, int(places[0])}
    assert old[int(places[0]) - 100] == 7


@pytest.mark.parametrize("form, value", [("f16", 0x3C00), ("bf16", 0x3F80)])
def test_sums_and_extremes_of_halves(form, value):
    """Scalars of two bytes from many blocks, then the vectors of sm_90: what is beside them stays."""
    total = np.array([0, 0xABCD], np.uint16)
    body = f".reg .b16 %v; ld.param.u64 %x0, [p0]; mov.b16 %v, {value}; red.global.add.noftz.{form} [%x0], %v;"
    Module(kernel(body, "sm_90a", 1)).launch("kernel", 4, 32, [total])
    assert total.tolist() == [{"f16": 0x5800, "bf16": 0x4300}[form], 0xABCD]  # 128
    places, old = np.array([value, 0, value | 0x8000, 0x7FFF], np.uint16), np.zeros(4, np.uint16)
    parts = ", ".join(f"%v{i}" for i in range(4))
    body = f""".reg .b16 %v<4>, %w; mov.b16 %w, 0; ld.param.u64 %x0, [p0]; ld.param.u64 %x1, [p1];
      atom.global.max.noftz.v4.{form} {{{parts}}}, [%x0], {{%w, %w, %w, %w}}; st.global.v4.b16 [%x1], {{{parts}}};"""
    before = places.copy()
    launch(kernel(body, "sm_90a"), places, old, threads=1)
    assert old.tolist() == before.tolist() and places.tolist() == [value, 0, 0, 0]


@pytest.mark.parametrize("count", [2, 4])
def test_vectors_of_sums_give_what_was_there(count):
    places, old = np.arange(4, dtype=np.float32), np.full(4, -1, np.float32)
    parts = ", ".join(f"%d{i}" for i in range(count))
    body = f"""ld.param.u64 %x0, [p0]; ld.param.u64 %x1, [p1]; mov.b32 %a0, 0f3FC00000;
      atom.global.add.v{count}.f32 {{{parts}}}, [%x0], {{{", ".join(["%a0"] * count)}}};
      st.global.v{count}.b32 [%x1], {{{parts}}};"""
    launch(kernel(body, "sm_90a"), places, old, threads=1)
    assert old.tolist() == [*range(count), *[-1] * (4 - count)]
    assert places.tolist() == [i + 1.5 * (i < count) for i in range(4)]
    with pytest.raises(SimulatorError) as caught:
        launch(kernel(body, "sm_80"), places, old, threads=1)
    assert caught.value.kind == "unsupported"


def test_subnormal_sums_at_generic_addresses():
    """It is the memory behind the address that flushes or not."""
    total, kept = np.zeros(1, np.float32), np.zeros(32, np.uint32)
    body = """ld.param.u64 %x0, [p0]; red.add.f32 [%x0], 0f00000001; mov.b32 %a0, 0; st.shared.b32 [%smem], %a0;
      cvt.u64.u32 %x1, %smem; cvta.shared.u64 %x1, %x1; red.add.f32 [%x1], 0f00000001;
      ld.shared.b32 %a1, [%smem]; st.global.b32 [%base1], %a1;"""
    launch(kernel(body, shared=16), total, kept)
    assert total[0] == 0 and (kept == 32).all()


@pytest.mark.parametrize("type", ["u8", "s8", "u16", "s16", "b32", "s32"])
@pytest.mark.parametrize("space", ["local", "generic"])
def test_narrow_stores_leave_what_is_beside(type, space):
    """Stored from a wider register at bytes 4.. of 8, then loaded into one of 32 bits."""
    size = int(type[1:]) // 8
    out = np.zeros((3, 32), np.uint32)
    x = edges(np.uint32, 32)[-32:].copy()
    body = """.local .align 8 .b8 mine[8]; .reg .b64 %l; mov.u64 %l, mine; ld.global.b32 %a0, [%base0];
      mov.b32 %a1, -1; st.local.v2.b32 [%l], {%a1, %a1};"""
    body += "cvta.local.u64 %l, %l;" if space == "generic" else ""
    dot = ".local" if space == "local" else ""
    body += f"st{dot}.{type} [%l + 4], %a0; ld{dot}.{type} %a2, [%l + 4]; ld{dot}.v2.b32 {{%a3, %a4}}, [%l];"
    body += "".join(f"st.global.b32 [%base1 + {128 * i}], %a{i + 2};" for i in range(3))
    launch(kernel(body), x, out)
    low = x.view(np.uint8).reshape(32, 4)[:, :size].copy().view(f"{'i' if type[0] == 's' else 'u'}{size}")[:, 0]
    mask = 2 ** (8 * size) - 1
    assert (out[0] == low.astype(np.int64).astype(np.uint32)).all()
    assert (out[1] == 0xFFFFFFFF).all() and (out[2] == (x & mask | ~np.uint32(mask))).all()


def test_spaces_of_addresses():
    """isspacep in each space; cvta there and back."""
    out = np.zeros((8, 32), np.uint32)
    body = """.local .align 4 .b8 mine[4]; .reg .b64 %l, %s, %g<8>; mov.u64 %l, mine; cvt.u64.u32 %s, %smem;
      cvta.local.u64 %g0, %l; cvta.shared.u64 %g1, %s; ld.param.u64 %g2, [p0]; cvta.global.u64 %g2, %g2;
      cvta.to.local.u64 %g3, %g0; cvta.to.shared.u64 %g4, %g1; cvta.to.global.u64 %g5, %g2;
      setp.eq.u64 %p1, %g3, %l; setp.eq.u64 %p2, %g4, %s; setp.eq.u64 %p3, %g5, %g2;
      selp.u32 %d6, 1, 0, %p1; @!%p2 mov.u32 %d6, 0; @!%p3 mov.u32 %d6, 0; mov.u32 %d7, 0;"""
    for i, (space, address) in enumerate(
        [("local", 0), ("shared", 1), ("global", 2), ("local", 1), ("shared", 2), ("global", 0)]
    ):
        body += f"isspacep.{space} %p4, %g{address}; selp.u32 %d{i}, 1, 0, %p4;"
    body += "".join(f"st.global.b32 [%base0 + {128 * i}], %d{i};" for i in range(8))
    launch(kernel(body, params=1, shared=16), out)
    assert out[:, 0].tolist() == [1, 1, 1, 0, 0, 0, 1, 0] and (out == out[:, :1]).all()
