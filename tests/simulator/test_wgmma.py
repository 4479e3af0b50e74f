"""wgmma against matrix products in float64, for every layout of shared memory, and the errors of its protocol."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tests.simulator import SimulatorError
from tests.simulator.cuda import compile_cuda
from tests.simulator.ptx_kernels import (
    BYTES,
    MODES,
    accumulators,
    fill_shared,
    fragments,
    kernel,
    load,
    matrix,
    place,
    random_codes,
    run,
    store,
    values,
    vector,
    words,
)

FENCE_PROXY = "  fence.proxy.async.shared::cta;\n"
BARRIER = "  bar.sync 0;\n"
FENCE = "  wgmma.fence.sync.aligned;\n"
COMMIT = "  wgmma.commit_group.sync.aligned;\n"
WAIT = "  wgmma.wait_group.sync.aligned 0;\n"


@dataclass
class Case:
    """One warpgroup: d = d + scale a b, (64, n)."""

    n: int = 64
    steps: int = 2
    d: str = "f32"
    a: str = "f16"
    b: str = "f16"
    swizzle: int = 128
    a_from: str = "k"  # shared memory, "k" or "mn" major; "registers"
    b_major: str = "k"
    scale: tuple = (1, 1)
    adds: bool = True
    integers: bool = True

    @property
    def k(self):
        return 32 // BYTES[self.a]

    @property
    def sums(self):
        return self.n // 8 * (2 if self.d == "f16" else 4)

    def mma(self, step=0, d="%d"):
        """The instruction; %x<2 step> and %x<2 step + 1> describe A and B."""
        from_registers = self.a_from == "registers"
        a = "{" + ", ".join(f"%a{4 * step + r}" for r in range(4)) + "}" if from_registers else f"%x{2 * step}"
        options = []
        if self.d != "s32":
            options = list(self.scale)
            if BYTES[self.a] == 2:
                options += [] if from_registers else [int(self.a_from == "mn")]
                options += [int(self.b_major == "mn")]
        name = f"wgmma.mma_async.sync.aligned.m64n{self.n}k{self.k}.{self.d}.{self.a}.{self.b}"
        operands = [vector(d, self.sums), a, f"%x{2 * step + 1}", "%p0", *map(str, options)]
        return f"  {name} {', '.join(operands)};\n"

    def all_steps(self):
        return "".join(self.mma(step) for step in range(self.steps))


def _shared_image(placed_a, placed_b):
    at_b = -(-len(placed_a.data) // 1024) * 1024 if placed_a else 0
    image = np.zeros(-(-(at_b + len(placed_b.data)) // 1024) * 1024, np.uint8)
    if placed_a:
        image[: len(placed_a.data)] = placed_a.data
    image[at_b : at_b + len(placed_b.data)] = placed_b.data
    return image, at_b


def _prologue(case, placed_a, placed_b, size, at_b, before_barrier=FENCE_PROXY):
    text = fill_shared(size, threads=128) + before_barrier + BARRIER
    text += load("%d", case.sums, 1, threads=128) + load("%a", 4 * case.steps, 2, threads=128)
    text += f"  setp.ne.u32 %p0, {int(case.adds)}, 0;\n  cvt.u64.u32 %x31, %smem;\n  shr.u64 %x31, %x31, 4;\n"
    for step in range(case.steps):
        for which, placed, at in ((0, placed_a, 0), (1, placed_b, at_b)):
            if placed:
                bits = placed.descriptor(at, step)
                signed = bits - 2**64 if bits >> 63 else bits
                text += f"  add.s64 %x{2 * step + which}, %x31, {signed};\n"
    return text


def _a_registers(codes, per, steps):
    """[4 step + register][thread] of the four warps' rows."""
    warps = [codes[16 * w : 16 * w + 16] for w in range(4)]
    dummy = np.zeros((codes.shape[1], 8), codes.dtype)
    return np.concatenate([fragments(rows, dummy, per)[0] for rows in warps], 1).reshape(4 * steps, 128)


def _accumulator_words(c, d):
    warps = []
    for w in range(4):
        rows = c[16 * w : 16 * w + 16]
        warps.append(np.concatenate([accumulators(rows[:, n : n + 8], d) for n in range(0, c.shape[1], 8)]))
    return np.ascontiguousarray(np.concatenate(warps, 1))


def _result(out, d):
    per = 2 if d == "f16" else 4
    blocks = [
        np.concatenate([matrix(out[r : r + per, 32 * w : 32 * w + 32], d) for r in range(0, len(out), per)], 1)
        for w in range(4)
    ]
    return np.concatenate(blocks)


class Problem:
    def __init__(self, case, seed=0, **prologue):
        rng = np.random.default_rng(seed)
        self.case = case
        k = case.k * case.steps
        self.a = random_codes(rng, case.a, (64, k), case.integers)
        self.b = random_codes(rng, case.b, (case.n, k), case.integers)
        self.c = rng.integers(-8, 9, (64, case.n)).astype(float)
        in_shared = case.a_from != "registers"
        placed_a = place(self.a, case.swizzle, case.a_from == "k") if in_shared else None
        placed_b = place(self.b, case.swizzle, case.b_major == "k")
        self.image, at_b = _shared_image(placed_a, placed_b)
        self.prologue = _prologue(case, placed_a, placed_b, len(self.image), at_b, **prologue)
        per = 4 // BYTES[case.a]
        self.registers = words(4 * case.steps, 128) if in_shared else _a_registers(self.a, per, case.steps)

    @property
    def exact(self):
        product = values(self.a, self.case.a) @ values(self.b, self.case.b).T
        return self.case.scale[0] * self.case.scale[1] * product + self.case.adds * self.c

    def run(self, body, threads=128, target="sm_90a"):
        self.out = words(self.case.sums, 128)
        text = kernel(self.prologue + body, target, params=4, shared=len(self.image))
        arrays = self.image, _accumulator_words(self.c, self.case.d), self.registers, self.out
        return run(text, *arrays, threads=threads)

    def result(self):
        return _result(self.out, self.case.d)


def _store(case):
    return store("%d", case.sums, 3, threads=128)


def _check(case):
    problem = Problem(case)
    counted = problem.run(FENCE + case.all_steps() + COMMIT + WAIT + _store(case))
    got, exact = problem.result(), problem.exact
    if case.integers:
        assert (got == exact).all()
    else:
        # Every step rounds the sums once.
        epsilon = {"f32": 2.0**-23, "f16": 2.0**-10}[case.d]
        assert np.abs(got - exact).max() <= case.steps * epsilon * np.abs(exact).max()
    assert counted["mma_flops"] == 2 * 64 * case.n * case.k * case.steps
    assert counted["classes"]["tensor"] == 4 * (case.steps + 3)


@pytest.mark.parametrize("b_major", ["k", "mn"])
@pytest.mark.parametrize("a_from", ["k", "mn", "registers"])
@pytest.mark.parametrize("swizzle", MODES)
def test_layouts(swizzle, a_from, b_major):
    _check(Case(swizzle=swizzle, a_from=a_from, b_major=b_major, steps=4))


@pytest.mark.parametrize("b_major", ["k", "mn"])
@pytest.mark.parametrize("swizzle", MODES)
@pytest.mark.parametrize("n", [8, 24, 128, 256])
def test_widths(n, swizzle, b_major):
    _check(Case(n=n, swizzle=swizzle, b_major=b_major))


TYPES = [
    ("f32", "f16", "f16"),
    ("f16", "f16", "f16"),
    ("f32", "bf16", "bf16"),
    ("f32", "tf32", "tf32"),
    *(("f32", a, b) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
    ("f16", "e4m3", "e5m2"),
]
INTEGERS = [("s32", a, b) for a in ("s8", "u8") for b in ("s8", "u8")]


@pytest.mark.parametrize("a_from", ["k", "registers"])
@pytest.mark.parametrize("d, a, b", TYPES + INTEGERS)
def test_types(d, a, b, a_from):
    for n, swizzle in ((16, 128), (64, 0)):
        _check(Case(n=n, d=d, a=a, b=b, a_from=a_from, swizzle=swizzle))


@pytest.mark.parametrize("a_from", ["k", "registers"])
@pytest.mark.parametrize("d, a, b", TYPES)
def test_real_numbers(d, a, b, a_from):
    _check(Case(d=d, a=a, b=b, a_from=a_from, integers=False, steps=1))


@pytest.mark.parametrize("scale", [(1, -1), (-1, 1), (-1, -1)])
def test_scales(scale):
    _check(Case(scale=scale))


def test_without_adding():
    """scale-d false: the first step forgets what the accumulators held, even NaN."""
    case = Case(adds=False, steps=1)
    problem = Problem(case)
    problem.c[:] = np.nan
    problem.run(FENCE + case.mma() + COMMIT + WAIT + _store(case))
    product = values(problem.a, "f16") @ values(problem.b, "f16").T
    assert (problem.result() == product).all()


# The protocol.

ONE = Case(steps=1)
FIRST = FENCE + ONE.mma() + COMMIT
OTHER = Case(steps=1, a_from="registers")
ZEROS = "".join(f"  mov.b32 %c{i}, 0;\n" for i in range(ONE.sums))  # a second set of accumulators
LANE = "  and.b32 %r0, %tid, 31;\n"
OVERWRITE = "  st.shared.b32 [%r31 + 8192], %tid;\n"  # B, which every warp reads


@pytest.mark.parametrize(
    "case, body",
    [
        (ONE, FIRST + "  st.global.b32 [%base3], %d0;\n"),
        (ONE, FIRST + "  mov.b32 %d31, 0;\n  add.f32 %d30, %d31, %d31;\n"),  # writes
        (ONE, FENCE + ONE.mma() + WAIT + "  st.global.b32 [%base3], %d0;\n"),  # never committed
        (ONE, FIRST + "  mov.b32 %c0, %d5;\n  st.global.b32 [%base3], %c0;\n"),
        (ONE, FIRST + "  @%p0 mov.b32 %c0, %d5;\n  mov.b32 %c1, %c0;\n  st.global.b32 [%base3], %c1;\n"),
        (ONE, FIRST + "  wgmma.wait_group.sync.aligned 1;\n  st.global.b32 [%base3], %d0;\n"),
        (ONE, ONE.mma() + COMMIT + WAIT),  # no wgmma.fence
        (OTHER, FENCE + OTHER.mma() + COMMIT + "  add.u32 %a2, %a2, 1;\n"),
        (OTHER, FENCE + OTHER.mma() + COMMIT + OTHER.mma(d="%c").replace("%a3", "%d3") + COMMIT + WAIT),
        (OTHER, FENCE + OTHER.mma() + COMMIT + OTHER.mma(d="%c").replace("%c3,", "%a3,") + COMMIT + WAIT),
        (ONE, FIRST + OVERWRITE + WAIT),
        (ONE, FENCE + ONE.mma() + WAIT + OVERWRITE),
    ],
)
def test_not_waited_for(case, body):
    with pytest.raises(SimulatorError) as error:
        Problem(case).run(body)
    assert error.value.kind == "async"


def test_without_proxy_fence():
    with pytest.raises(SimulatorError, match=r"without fence\.proxy\.async") as error:
        Problem(ONE, before_barrier="").run(FIRST + WAIT)
    assert error.value.kind == "async"


def test_groups_complete_in_order():
    """wait_group 1 gives the first of two groups; the second goes on."""
    problem = Problem(ONE)
    second = ONE.mma(d="%c")
    two = ZEROS + FIRST + second + COMMIT + "  wgmma.wait_group.sync.aligned 1;\n" + _store(ONE)
    problem.run(two + WAIT)
    assert (problem.result() == problem.exact).all()
    with pytest.raises(SimulatorError) as error:
        problem.run(two + "  st.global.b32 [%base3], %c0;\n")
    assert error.value.kind == "async"
    problem.run(two + WAIT + store("%c", ONE.sums, 3, threads=128))
    assert (problem.result() == problem.exact - problem.c).all()


def test_copies_of_pending_registers():
    """As compilers emit them: accumulators move to other registers between two operations."""
    case = Case(steps=2)
    problem = Problem(case)
    moves = "".join(f"  mov.b32 %c{i}, %d{i};\n" for i in range(case.sums))
    body = FENCE + case.mma(0) + moves + case.mma(1, d="%c") + COMMIT + WAIT
    problem.run(body + store("%c", case.sums, 3, threads=128))
    assert (problem.result() == problem.exact).all()


def test_registers_are_free_after_a_move():
    """A register that got another value while its wgmma was pending holds that value."""
    problem = Problem(ONE)
    problem.run(FIRST + "  mov.b32 %d0, 7;\n  st.global.b32 [%base3], %d0;\n" + WAIT)
    assert (problem.out[0] == 7).all()


def test_one_warp_speaks_for_all():
    """Once one warp has waited, the operands of all four may be overwritten: the group completes as a whole."""
    problem = Problem(ONE)
    overwrite = "  setp.eq.u32 %p1, %tid, 0;\n  @%p1 st.shared.b32 [%smem + 8192], %tid;\n"
    problem.run(FIRST + WAIT + overwrite + _store(ONE))
    assert (problem.result() == problem.exact).all()


@pytest.mark.parametrize(
    "kind, body",
    [
        ("divergence", "  setp.ne.u32 %p1, %tid, 40;\n  @%p1" + ONE.mma()),
        ("divergence", "  shr.u32 %r0, %tid, 5;\n  cvt.u64.u32 %x2, %r0;\n  add.u64 %x0, %x0, %x2;\n" + FIRST + WAIT),
        ("divergence", LANE + "  cvt.u64.u32 %x2, %r0;\n  add.u64 %x0, %x0, %x2;\n" + FIRST + WAIT),
        ("divergence", LANE + "  setp.lt.u32 %p0, %r0, 9;\n" + FIRST + WAIT),
        ("deadlock", "  setp.gt.u32 %p1, %tid, 95;\n  @%p1 ret;\n" + FIRST + WAIT),
        ("out_of_bounds", "  add.u64 %x1, %x1, 16;\n" + FIRST + WAIT),
        ("unsupported", "  or.b64 %x1, %x1, 0x2000000000000;\n" + FIRST + WAIT),  # base offset
        ("unsupported", "  or.b64 %x1, %x1, 0x8000;\n" + FIRST + WAIT),  # a reserved bit
        ("unsupported", FENCE + ONE.mma().replace("m64n64", "m64n60")),
        ("unsupported", FENCE + ONE.mma().replace("k16", "k32")),
        ("unsupported", FENCE + ONE.mma().replace(", 1, 1, 0, 0", ", 1, 2, 0, 0")),
        ("unsupported", FENCE + ONE.mma().replace(", 1, 1, 0, 0", ", 1, 1")),
        ("unsupported", FENCE + ONE.mma().replace(".f32.f16", ".f32.sp.f16")),
        ("unsupported", FENCE + replace(ONE, n=40, d="s32", a="s8", b="s8").mma()),
    ],
)
def test_errors(kind, body):
    body = body if FENCE in body else FENCE + body
    with pytest.raises(SimulatorError) as error:
        Problem(ONE).run(body)
    assert error.value.kind == kind


@pytest.mark.parametrize("kind, threads, target", [("divergence", 96, "sm_90a"), ("unsupported", 128, "sm_80")])
def test_needs(kind, threads, target):
    with pytest.raises(SimulatorError) as error:
        run(kernel(FENCE, target), words(1), words(1), threads=threads)
    assert error.value.kind == kind


# What nvcc makes of inline assembly: accumulators that live in a loop.

SUMS = ", ".join(f"%{i}" for i in range(32))
TIED = ", ".join(f'"+f"(d[{i}])' for i in range(32))
GEMM = f"""
#include <stdint.h>
__device__ uint64_t describe(const void* tile) {{
  const uint64_t at = __cvta_generic_to_shared(tile);
  return (at & 0x3ffff) >> 4 | uint64_t{{1024 >> 4}} << 32 | uint64_t{{1}} << 62;
}}
__device__ void mma(float (&d)[32], uint64_t a, uint64_t b) {{
  asm volatile("{{ .reg .pred p; setp.ne.b32 p, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{SUMS}}}, %32, %33, p, 1, 1, 0, 0; }}"
               : {TIED} : "l"(a), "l"(b));
}}
// out (64, 64) = a (64, k) b (64, k)^T, rows of bf16, k a multiple of 64.
extern "C" __global__ void gemm(const uint4* a, const uint4* b, float* out, int k) {{
  __shared__ __align__(1024) uint4 sa[64][8], sb[64][8];
  float d[32] = {{}};
  for (int k0 = 0; k0 < k; k0 += 64) {{
    for (int i = threadIdx.x; i < 512; i += 128) {{
      const int row = i / 8, chunk = i % 8, from = (row * k + k0) / 8 + chunk;
      sa[row][chunk ^ row % 8] = a[from];
      sb[row][chunk ^ row % 8] = b[from];
    }}
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int step = 0; step < 4; ++step) mma(d, describe(sa) + 2 * step, describe(sb) + 2 * step);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    __syncthreads();
  }}
  for (int i = 0; i < 32; ++i) {{
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
    out[row * 64 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i];
  }}
}}
"""


def _gemm(source):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (64, 256), generator=generator).bfloat16() for _ in range(2))
    out = torch.zeros(64, 64)
    compile_cuda(source, "90a").launch("gemm", 1, 128, [a, b, out, 256])
    assert torch.equal(out, a.float() @ b.float().T)


def test_nvcc():
    _gemm(GEMM)


@pytest.mark.parametrize("forgotten", ["wgmma.wait_group.sync.aligned 0;", "fence.proxy.async.shared::cta;"])
def test_nvcc_forgets(forgotten):
    assert forgotten in GEMM
    with pytest.raises(SimulatorError) as error:
        _gemm(GEMM.replace(forgotten, ""))
    assert error.value.kind == "async"
