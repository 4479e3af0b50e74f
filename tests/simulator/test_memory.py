"""Loads, stores and atomics in every width, type and state space."""

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.simulator import Module
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
