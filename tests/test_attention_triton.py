"""The Triton kernels of attention beside the op's own tests: interpreted, simulated, and compiled for GPUs that are not
here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlayers import backends, ops
from fastlayers.reference.philox import dropout_keep, dropout_threshold
from tests import test_attention_api as api
from tests.attention_cases import check, qkv, randn
from tests.backends import BACKENDS, INTERPRETED, SIMULATED
from tests.test_attention import OPTIONS, rng
from tests.test_attention_decode import DECODE, cached, check_decoding, in_pages
from tests.test_attention_packed import VARLEN, longest, packed

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402

from fastlayers.triton import attention_decode_kernels, attention_rules, attention_tiles, tiles  # noqa: E402
from fastlayers.triton.attention_forward import forward_kernel  # noqa: E402
from fastlayers.triton.attention_key_gradient import key_gradient_kernel  # noqa: E402
from fastlayers.triton.attention_query_gradient import query_gradient_kernel  # noqa: E402
from tests.triton_compiler import assert_fits, compile_kernel  # noqa: E402

outside = pytest.mark.skipif(INTERPRETED, reason="for the compiler")
simulated = pytest.mark.skipif("triton" not in BACKENDS["adam"] or not SIMULATED or INTERPRETED, reason="needs nvcc")
runs = pytest.mark.skipif("triton" not in BACKENDS["adam"], reason="needs the interpreter, or a GPU")

# What of the op's tests runs in the interpreter, where a call takes seconds; test_simulated has the other options.
FILES = ["attention", "attention_packed", "attention_decode", "attention_api", "attention_triton"]
CHOSEN = [
    "test_options and plain",
    "test_options and bfloat16 and (causal-longer or bottom-right-longer or bool-mask-keys or additive-full)",
    "test_options and bfloat16 and (additive-rows or window-outside or softcap-mask or dropout-mask)",
    "test_head_dims and -float16 and (3-5 or 256)",
    "(rows_that_see or test_empty or nan_stays or dropout_mask_is_philox and 0.1) and not (bfloat16 or float32)",
    "test_strides and not_dense and float32",
    *("laid_out", "other_numbers", "beyond_32_bits", "dropout_of", "generator", "deterministic_follows", "upstream"),
    "deterministic_is_bitwise and mqa",
    "varlen_options and -float16 and (window-bottom-right or alibi-per or none)",
    "varlen_is_attention",
    "decode_options and -float16 and -1- and not (everything or plain)",
    "(decode_pages or decode_several or decode_head_dims) and -float16 and (64 or 33 or 100)",
    "(decode_long or decode_extreme or decode_pages_that) and -float16",
    "decode_without",
    "bad_calls or double_backward or only_where or left_alone or test_compile or test_autocast and -float16",
    "(varlen_options and sinks or decode_head_dims and 256) and float32",
    "alone or test_errors",
]


@outside
def test_op_tests_in_the_interpreter():
    """The op's own tests, in another process, because the interpreter is chosen at import."""
    chosen = " or ".join(f"triton and ({some})" for some in CHOSEN)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", chosen]
    root, environment = Path(__file__).parents[1], {**os.environ, "TRITON_INTERPRET": "1"}
    command += [f"tests/test_{file}.py" for file in FILES]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


# The rules that all kernels share, alone.


@triton.jit
def _keep_kernel(keep, random, threshold, seqlen_k, ROWS: tl.constexpr, KEYS: tl.constexpr):
    start, bh = tl.program_id(0) * KEYS, tl.program_id(1)
    rows, keys = tl.arange(0, ROWS), start + tl.arange(0, KEYS)
    kept = attention_rules.dropout_keep(random, threshold, bh, rows, start, KEYS)
    at = (bh * ROWS + rows[:, None]) * seqlen_k + keys[None, :]
    tl.store(keep + at, kept.to(tl.uint8), mask=keys[None, :] < seqlen_k)


@runs
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("keys", [16, 32, 64, 128])
def test_dropout_alone(keys, backend):
    """The decisions of every other backend, however many keys a tile has."""
    seqlen_k, heads, seed = 150, 3, rng(-(2**62) - 12345, 2**40 + 7)
    keep = torch.zeros(1, heads, 16, seqlen_k, dtype=torch.uint8)
    grid = (triton.cdiv(seqlen_k, keys), heads)
    _keep_kernel[grid](keep, seed, dropout_threshold(0.4), seqlen_k, ROWS=16, KEYS=keys)
    assert torch.equal(keep.bool(), dropout_keep(seed, 0.4, 1, heads, 16, seqlen_k))


@triton.jit
def _seen_kernel(
    seen, full, blocks, seqlen_q, seqlen_k, begin_offset, end_offset, TURNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Which pairs the mask rule shows, which blocks of keys or rows are whole, and which are looked at."""
    here = tl.program_id(0) * BLOCK
    i, j = tl.arange(0, 128)[:, None], tl.arange(0, 128)[None, :]
    place = seqlen_q, seqlen_k, 0, begin_offset, end_offset
    zero = tl.zeros((128, 128), tl.float32)
    x, _ = attention_rules.scores_of(zero, i, j, place, (1.0, None, None, None, 0, 0), False)
    if tl.program_id(0) == 0:
        tl.store(seen + i * 128 + j, (x == 0).to(tl.uint8))
    if TURNED:
        last = tl.minimum(here + BLOCK, seqlen_k)
        split = attention_rules.split_queries(here, last, begin_offset, end_offset, seqlen_q, BLOCK)
    else:
        last = tl.minimum(here + BLOCK, seqlen_q)
        split = attention_rules.split_keys(here, last, begin_offset, end_offset, seqlen_k, BLOCK)
    for start in range(split[1], split[2], BLOCK):
        tl.store(full + tl.program_id(0) * 128 + start, 1)
    for index in range(split[3]):
        start = attention_rules.edge_block(index, split[0], split[1], split[2], BLOCK)
        tl.store(blocks + tl.program_id(0) * 128 + start, 1)


@runs
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_alone(turned, backend):
    """Whole blocks are whole, what is visible lies in a block, and no block is looked at twice."""
    far = 1 << 29
    for lengths in ((100, 70), (33, 128), (1, 40)):
        for begin, end in ((-far, far), (-far, 1), (-20, 1), (-9, 5), (-far, -50), (60, far), (10, 31), (-200, -128)):
            seen, full, blocks = (torch.zeros(128, 128, dtype=torch.uint8) for _ in range(3))
            programs = triton.cdiv(lengths[1 if turned else 0], 16)
            _seen_kernel[(programs,)](seen, full, blocks, *lengths, begin, end, TURNED=turned, BLOCK=16)
            i, j = torch.arange(128).view(-1, 1), torch.arange(128)
            wanted = (j >= i + begin) & (j < i + end) & (i < lengths[0]) & (j < lengths[1])
            assert torch.equal(seen.bool(), wanted)
            shown = (wanted.mT if turned else wanted)[: programs * 16].unflatten(0, (programs, 16))
            shown = shown.unflatten(2, (8, 16)).transpose(1, 2)  # (programs, blocks, 16, 16)
            full, blocks = full[:programs, ::16], blocks[:programs, ::16]
            assert not (full & blocks).any() and ((full | blocks).bool() >= shown.any(-1).any(-1)).all()
            inside = (torch.arange(programs * 16) < lengths[1 if turned else 0]).view(programs, 1, 16, 1)
            assert (shown | ~inside)[full.bool()].all()


# The compiled kernels on the simulator.


@pytest.fixture
def arch(request):
    from tests import simulator

    simulator.install(f"sm_{request.param}")
    yield request.param
    simulator.uninstall()


# (name in OPTIONS, dtype): each option at least once, forward and backward; every third one on sm_90, too.
CASES = [
    ("causal", torch.bfloat16),
    ("bottom-right-shorter", torch.float16),
    ("mqa-causal", torch.float32),
    ("bool-mask-2d", torch.bfloat16),
    ("additive-keys", torch.float32),
    ("additive-float16-gqa", torch.bfloat16),
    ("additive-infinite", torch.float16),
    ("window", torch.float16),
    ("softcap", torch.bfloat16),
    ("everything", torch.float16),
    ("alibi-batch", torch.bfloat16),
    ("sinks-window", torch.float16),
    ("dropout", torch.bfloat16),
    ("scale-negative", torch.float32),
]
ARCHS = [*((80, case) for case in CASES), *((90, case) for case in CASES[::3])]


@simulated
@pytest.mark.parametrize("arch,case", ARCHS, indirect=["arch"], ids=str)
def test_simulated(arch, case):
    name, dtype = case
    sizes, tensors, options = OPTIONS[name]
    inputs = dict(zip(("query", "key", "value"), qkv(dtype, **sizes)))
    check(ops.attention, {**inputs, **tensors}, "triton", name, **options)


@simulated
@pytest.mark.parametrize("arch", [80, 90], indirect=True, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_simulated_head_dims(arch, dtype):
    """A tile of each kind, and dimensions that do not fill it; several blocks in both directions."""
    for head_dim, head_dim_v in ((40, 72), (256, 130)):
        sizes = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": 70, "seqlen_k": 150}
        tensors = qkv(dtype, **sizes, head_dim=head_dim, head_dim_v=head_dim_v)
        inputs = dict(zip(("query", "key", "value"), tensors))
        options = {"is_causal": True, "causal_alignment": "bottom_right", "enable_gqa": True}
        check(ops.attention, inputs, "triton", f"{head_dim} {head_dim_v}", **options)


@simulated
@pytest.mark.parametrize("arch", [80, 90], indirect=True, ids="sm_{}".format)
def test_simulated_single_rows(arch):
    """Where no sum over rows evens out how float32 is multiplied: three TF32 products were seen to fail."""
    tensors = qkv(torch.float32, batch=32, heads_q=3, seqlen_q=1, seqlen_k=257, head_dim=16)
    inputs = dict(zip(("query", "key", "value"), tensors))
    check(ops.attention, inputs, "triton", dropout_p=0.2, dropout_rng=rng())


@simulated
@pytest.mark.parametrize("arch", [90], indirect=True, ids="sm_{}".format)
def test_simulated_descriptors(arch, monkeypatch):
    """Whole blocks through the TMA unit, blocks at an edge as ever: causal, packed, columns behind the head; forward
    and backward."""
    taken = []

    def last(found, *_):
        taken.append(found[-1])
        return found[-1]

    monkeypatch.setattr(tiles, "pick", last)
    names = ("query", "key", "value")
    for head_dim, head_dim_v in ((64, 64), (40, 72), (256, 16)):
        sizes = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": 200, "seqlen_k": 330}
        tensors = qkv(torch.bfloat16, **sizes, head_dim=head_dim, head_dim_v=head_dim_v)
        options = {"is_causal": True, "causal_alignment": "bottom_right", "enable_gqa": True}
        with torch.set_grad_enabled(head_dim < 256):  # the backward's tiles there have no descriptors
            check(ops.attention, dict(zip(names, tensors)), "triton", f"{head_dim} {head_dim_v}", **options)
    tensors = packed(torch.bfloat16, [3, 200, 0, 70], [150, 300, 5, 0], head_dim=32)
    check(ops.varlen_attention, tensors, "triton", **longest([3, 200, 0, 70], [150, 300, 5, 0]))
    assert len(taken) == 10 and all(tile.descriptors for tile in taken)


@simulated
@pytest.mark.parametrize("arch", [80, 90], indirect=True, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_simulated_varlen_and_decode(arch, dtype):
    lengths, extra, options = VARLEN["everything"]
    tensors = {**packed(dtype, *lengths, heads_k=2, head_dim_v=24, rest=3), **extra}
    check(ops.varlen_attention, tensors, "triton", **longest(*lengths), enable_gqa=True, **options)
    for name, paged in (("plain", False), ("everything", True)):
        extra, options = DECODE[name]
        tensors = {**cached(dtype, [300, 1, 0, 129, 3], 3, head_dim_v=40), **extra}
        check_decoding(in_pages(tensors, 16) if paged else tensors, "triton", name, enable_gqa=True, **options)
    tensors = cached(dtype, [1200], 1, capacity=1200, heads_q=8)  # split over programs
    check_decoding(tensors, "triton", "split", enable_gqa=True)


@simulated
@pytest.mark.parametrize("arch", [80], indirect=True)
def test_simulated_as_an_operator(arch):
    for check_operator in (api.test_compile, api.test_compile_varlen_and_decode):
        torch._dynamo.reset()
        check_operator("triton", None)
    api.test_double_backward("triton")


def _lies_in_values(changes):
    """What is wrong is what cu_seqlens holds, which only the kernels read."""
    arguments = api.raw_arguments(**changes)
    lengths = [arguments[name] for name in ("cu_seqlens_q", "cu_seqlens_k")]
    if arguments["query"].dim() == 4 or arguments["attn_mask"] is not None or arguments["max_seqlen_k"] < 0:
        return False
    return all(t is not None and t.shape == (3,) and t.dtype == torch.int32 for t in lengths)


def test_errors():
    query = randn(1, 2, 5, 8)
    if not INTERPRETED:
        with pytest.raises(backends.BackendError, match="on cpu, not on cuda"):
            ops.attention(query, query, query, backend="triton")
    operators = backends.operators("triton")
    for changes in api.RAW:
        if not _lies_in_values(changes):
            with pytest.raises(ValueError, match="attention: "):
                operators.attention_forward(*api.raw_arguments(**changes).values())
    for changes in api.RAW_DECODE:
        wrong = next(iter(changes.values()))
        if len(changes) > 1 or wrong.dtype != torch.int32 or wrong.shape[0] != 2 or wrong.dim() > 2:  # not its values
            with pytest.raises(ValueError, match="attention: "):
                operators.attention_decode(*api.raw_decode_arguments(**changes).values())


# Instructions of a warp per 64 x 64 scores on sm_80, head_dim 64, bfloat16, without moves, which ptxas removes.
INSTRUCTIONS = {"forward_kernel": 1600, "query_gradient_kernel": 1300, "key_gradient_kernel": 2050}


@simulated
@pytest.mark.parametrize("arch", [80], indirect=True)
def test_simulated_counts(arch):
    """Global memory is read in whole sectors, shared memory without conflicts; a tile takes few instructions."""
    base, more_keys, more_queries = _counts(128, 256), _counts(128, 512), _counts(384, 256)
    tiles = {"forward_kernel": 2 * 4, "query_gradient_kernel": 2 * 4, "key_gradient_kernel": 4 * 4}
    for name, most in INSTRUCTIONS.items():
        more = more_queries[name] if name == "key_gradient_kernel" else more_keys[name]
        issued = [sum(counts["classes"].values()) - counts["classes"]["move"] for counts in (base[name], more)]
        assert (issued[1] - issued[0]) / tiles[name] <= most, name
        for counts in (base[name], more):
            assert counts["global"]["sectors"] == counts["global"]["minimum"], name
            assert counts["shared"]["wavefronts"] == counts["shared"]["minimum"], name


def _counts(seqlen_q, seqlen_k):
    """{kernel: counts} of a call, forward and backward."""
    from tests import simulator

    sizes = {"batch": 1, "heads_q": 1, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": 64}
    tensors = [tensor.requires_grad_() for tensor in qkv(torch.bfloat16, **sizes)]
    with simulator.record() as launches:
        out = ops.attention(*tensors, backend="triton")
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    return {launch.name: launch.counts for launch in launches}


# Compiled for GPUs that are not here.


_POINTERS = {
    "rng": "*i64",
    "cache_seqlens": "*i32",
    "page_table": "*i32",
    "cu_seqlens_q": "*i32",
    "cu_seqlens_k": "*i32",
}
_ROWS = ("lse", "delta", "share", "grad_lse", "dmask", "alibi_slopes", "sinks", "outs", "lses", "mask")
_TENSORS = ("query", "key", "value", "out", "grad_out", "dquery", "dkey", "dvalue")


def compiled(kernel, arch, dtype, dim, tile, **constants):
    """The kernel without options, but for those in constants."""
    float32 = dtype == torch.float32

    def signature(name):
        if name in _TENSORS:
            return "*fp32" if float32 else "*fp16"
        return "*fp32" if name in _ROWS else "fp32" if name in ("scale", "kept_scale") else _POINTERS.get(name, "i32")

    absent = ["mask", "alibi_slopes", "sinks", "rng", "cu_seqlens_q", "cu_seqlens_k", "softcap", "grad_lse"]
    absent += [] if float32 else ["share"]
    sizes = {"HEAD_DIM": dim, "HEAD_DIM_V": dim, "BLOCK_D": dim, "BLOCK_DV": dim}
    sizes |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "INNER": tile.inner}
    sizes |= {"DESCRIPTORS": tile.descriptors}
    rules = {"BOTTOM_RIGHT": False, "NATURAL": float32, "PRECISION": "ieee"}
    if float32 and arch >= 80:
        rules["PRECISION"] = attention_tiles.parts(arch)
    known = {**dict.fromkeys(absent), **sizes, **rules, **constants}
    return compile_kernel(kernel, arch, signature, known, tile)


KERNELS = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
    "decode": attention_decode_kernels.decode_kernel,
}


@outside
@pytest.mark.parametrize("gpu", attention_tiles.TILES, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KERNELS)
def test_compiles(kind, dtype, gpu):
    """Every tile of the table, for the widest head that it is meant for."""
    for dim in attention_tiles.TILES[gpu][dtype.itemsize][kind]:
        for tile in attention_tiles.candidates(gpu, dtype.itemsize, kind, dim, kind != "decode"):
            kernel = compiled(KERNELS[kind], gpu, dtype, dim, tile)
            wide = (tile.columns if kind == "key_gradient" else tile.rows) >= 64
            assert_fits(kernel, gpu, tile, wide)
