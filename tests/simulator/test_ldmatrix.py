"""ldmatrix, stmatrix and movmatrix against the lane to element mapping of the PTX ISA."""

import numpy as np
import pytest

from tests.simulator import SimulatorError
from tests.simulator.ptx_kernels import fill_shared, kernel, load, run, store, vector, words

LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4

# The 16-byte row of lane i, for matrices of 8 rows behind one another.
ROWS = "  shl.b32 %r0, %tid, 4;\n  add.u32 %r0, %r0, %smem;\n"
BARRIER = "  bar.sync 0;\n"


def _held(matrices, trans):
    """[matrix][lane] words: elements (g, 2 t), (g, 2 t + 1), or (2 t, g), (2 t + 1, g)."""
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    low, high = matrices[:, GROUP, 2 * THREAD], matrices[:, GROUP, 2 * THREAD + 1]
    return np.ascontiguousarray(low.astype(np.uint32) | high.astype(np.uint32) << 16)


def _matrices(count=4):
    return np.random.default_rng(1).integers(0, 2**16, (count, 8, 8)).astype(np.uint16)


def _load(count, trans="", address="[%r0]", rows=ROWS, filled=512, space=".shared", guard=""):
    body = fill_shared(filled) + BARRIER + rows
    body += f"  {guard} ldmatrix.sync.aligned.m8n8.x{count}{trans}{space}.b16 {vector('%d', count)}, {address};\n"
    return body + store("%d", count)


def _counts(text, *arrays):
    shared = [line["shared"] for line in run(text, *arrays)["lines"] if "matrix" in line["instruction"]]
    assert len(shared) == 1
    return shared[0]


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    matrices, out = _matrices(), words(count, 32)
    counted = run(kernel(_load(count, trans), "sm_75", shared=512), matrices, out)
    assert (out == _held(matrices, trans)[:count]).all()
    assert counted["classes"]["ldmatrix"] == 1


@pytest.mark.parametrize("address, rows", [("[%r0 + 128]", ROWS), ("[%x0]", ROWS + "  cvt.u64.u32 %x0, %r0;\n")])
def test_addresses(address, rows):
    matrices, out = _matrices(), words(2, 32)
    run(kernel(_load(2, "", address, rows), shared=512), matrices, out)
    first = 1 if "128" in address else 0
    assert (out == _held(matrices, "")[first : first + 2]).all()


def test_generic_address():
    rows = ROWS + "  cvt.u64.u32 %x0, %r0;\n  cvta.shared.u64 %x0, %x0;\n"
    matrices, out = _matrices(), words(4, 32)
    run(kernel(_load(4, "", "[%x0]", rows, space=""), shared=512), matrices, out)
    assert (out == _held(matrices, "")).all()
    with pytest.raises(SimulatorError, match="not in shared memory") as error:
        run(kernel(_load(4, "", "[%base0]", space=""), shared=512), matrices, out)
    assert error.value.kind == "out_of_bounds"


def test_any_row_order():
    """Every lane names its row: here they come backwards."""
    rows = "  sub.u32 %r0, 31, %tid;\n  shl.b32 %r0, %r0, 4;\n  add.u32 %r0, %r0, %smem;\n"
    matrices, out = _matrices(), words(4, 32)
    run(kernel(_load(4, "", rows=rows), shared=512), matrices, out)
    assert (out == _held(matrices[::-1, ::-1], "")).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, trans):
    matrices, out = _matrices(count), words(count * 32)
    body = load("%a", count) + ROWS
    body += f"  stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r0], {vector('%a', count)};\n" + BARRIER
    for word in range(count):
        body += f"  mad.lo.u32 %r2, %tid, 4, %smem;\n  ld.shared.b32 %d{word}, [%r2 + {128 * word}];\n"
    run(kernel(body + store("%d", count), "sm_90", shared=128 * count), _held(matrices, trans), out)
    assert (out.view(np.uint16).reshape(count, 8, 8) == matrices).all()


def test_movmatrix():
    matrices, out = _matrices(1), words(1, 32)
    body = load("%a", 1) + "  movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;\n" + store("%d", 1)
    run(kernel(body, "sm_75"), _held(matrices, ""), out)
    assert (out == _held(matrices, "trans")).all()


def _strided(stride, swizzled):
    """Lane i reads 16 bytes of row i, `stride` bytes each; swizzled: chunk 1 ^ row % 8, else chunk 1."""
    chunk = "  and.b32 %r1, %tid, 7;\n  xor.b32 %r1, %r1, 1;\n" if swizzled else "  mov.u32 %r1, 1;\n"
    return chunk + f"  shl.b32 %r1, %r1, 4;\n  mad.lo.u32 %r0, %tid, {stride}, %smem;\n  add.u32 %r0, %r0, %r1;\n"


@pytest.mark.parametrize(
    "rows, wavefronts",
    [
        (ROWS, 4),
        (_strided(128, swizzled=False), 32),
        (_strided(128, swizzled=True), 4),
        (_strided(144, swizzled=False), 4),
        (_strided(64, swizzled=False), 16),
        (_strided(32, swizzled=False), 8),
    ],
)
def test_wavefronts(rows, wavefronts):
    text = kernel(_load(4, rows=rows, filled=5120), shared=5120)
    shared = _counts(text, words(1280), words(4, 32))
    assert shared == {"accesses": 1, "wavefronts": wavefronts, "minimum": 4, "bytes": 512}


def test_wavefronts_of_two_matrices():
    shared = _counts(kernel(_load(2), shared=512), words(128), words(2, 32))
    assert shared == {"accesses": 1, "wavefronts": 2, "minimum": 2, "bytes": 256}


@pytest.mark.parametrize(
    "kind, changed",
    [
        ("misaligned", {"rows": ROWS + "  add.u32 %r0, %r0, 8;\n"}),
        ("uninitialised", {"filled": 384}),
        ("out_of_bounds", {"rows": ROWS + "  add.u32 %r0, %r0, 16;\n"}),
        ("divergence", {"guard": "@%p0", "rows": ROWS + "  setp.ne.u32 %p0, %tid, 9;\n"}),
    ],
)
def test_errors(kind, changed):
    with pytest.raises(SimulatorError) as error:
        run(kernel(_load(4, **changed), shared=512), words(128), words(4, 32))
    assert error.value.kind == kind


def test_rows_beyond_the_matrices_are_not_read():
    """x2 takes addresses of lanes 0 to 15; the others may hold anything."""
    rows = ROWS + "  setp.gt.u32 %p0, %tid, 15;\n  @%p0 mov.u32 %r0, 0x3fff3;\n"
    matrices, out = _matrices(), words(2, 32)
    run(kernel(_load(2, rows=rows), shared=512), matrices, out)
    assert (out == _held(matrices, "")[:2]).all()


def test_race():
    """The first warp overwrites what the second one reads, with no barrier between."""
    rows = ROWS.replace("%tid", "%r3").replace("  shl", "  and.b32 %r3, %tid, 31;\n  shl")
    body = fill_shared(512, threads=64) + BARRIER + rows
    body += f"  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {vector('%d', 4)}, [%r0];\n"
    run(kernel(body, shared=512), words(128), words(4, 32), threads=64)
    with pytest.raises(SimulatorError) as error:
        run(kernel(body + "  st.shared.b32 [%r31], %tid;\n", shared=512), words(128), words(4, 32), threads=64)
    assert error.value.kind == "race"


@pytest.mark.parametrize(
    "instruction, target",
    [
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%smem], {%a0}", "sm_80"),
        ("ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%a0, %a1, %a2}, [%smem]", "sm_80"),
        ("ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b6x16_p32 {%a0}, [%smem]", "sm_100"),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%a0}, [%smem]", "sm_80"),
        ("movmatrix.sync.aligned.m8n8.b16 %a0, %a1", "sm_80"),
    ],
)
def test_unsupported(instruction, target):
    with pytest.raises(SimulatorError) as error:
        run(kernel(f"  {instruction};\n", target, shared=512), words(1), words(1))
    assert error.value.kind == "unsupported"
