"""The Triton kernels of linear_act beside tests/test_linear_act.py: interpreted, simulated, and compiled for GPUs that
are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlayers import backends, ops, reference
from tests import test_activations
from tests import test_linear_act as values
from tests import test_linear_act_api as api
from tests.backends import BACKENDS, INTERPRETED, SIMULATED, device_of
from tests.numerics import assert_accurate

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402

from fastlayers.triton import activations, launch, linear_act, tiles  # noqa: E402
from tests.triton_compiler import assert_fits, compile_kernel, stack  # noqa: E402

outside = pytest.mark.skipif(INTERPRETED, reason="for the compiler")
simulated = pytest.mark.skipif("triton" not in BACKENDS["adam"] or not SIMULATED or INTERPRETED, reason="needs nvcc")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@outside
def test_op_tests_in_the_interpreter():
    """The op's own tests, in another process, because the interpreter is chosen at import."""
    files = ["test_linear_act.py", "test_linear_act_api.py", "test_linear_act_triton.py"]
    seldom = "(every_activation and input and (float16 or float32)) or (strided and (float32 or float16))"
    chosen = f"triton and not (threads or compiles or {seldom} or (odd_shapes and float16) or (opcheck and False))"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", chosen]
    root, environment = Path(__file__).parents[1], {**os.environ, "TRITON_INTERPRET": "1"}
    command += [f"tests/{file}" for file in files]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@triton.jit
def _activation_kernel(x, y, slope, n, ACTIVATION: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    values = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(y + at, activations.activate(values, ACTIVATION), mask=at < n)
    tl.store(slope + at, activations.derivative(values, ACTIVATION), mask=at < n)


@pytest.mark.parametrize("backend", BACKENDS["adam"][-1:] if "triton" in BACKENDS["adam"] else [])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_alone(activation, backend):
    """Value and slope, near 0, far out, and where they are NaN."""
    small = torch.logspace(-30, 1, 500)
    x = torch.cat([torch.linspace(-20, 20, 2001), small, -small, torch.tensor([float("nan"), 0.0, -0.0])])
    y, slope = torch.zeros_like(x), torch.zeros_like(x)
    _activation_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, slope, x.numel(), ACTIVATION=activation)
    answers = []
    for dtype in (torch.float64, torch.float32):
        z = x.to(dtype).requires_grad_()
        value = reference.ACTIVATIONS[activation](z)
        answers.append((value.detach(), torch.autograd.grad(value.sum(), z)[0]))
    (value, derivative), (eager_value, eager_derivative) = answers
    known = ~x.isnan()
    assert_accurate(y, value, eager_value, "value")
    assert_accurate(slope[known], derivative[known], eager_derivative[known], "slope")
    near = known & (x.abs() < 1e-3)
    assert_accurate(y[near], value[near], eager_value[near], "value near 0")


@pytest.fixture
def arch(request):
    from tests import simulator

    simulator.install(f"sm_{request.param}")
    yield request.param
    simulator.uninstall()


# (op, activation, save, dtype, rows, in_features, out_features): each activation, dtype and option at least once; every
# second one on sm_90, too.
CASES = [
    ("linear_act", "gelu", "preactivation", torch.float16, 70, 72, 136),
    ("linear_act", "tanh", "input", torch.bfloat16, 5, 53, 61),
    ("linear_act", "leaky_relu", "preactivation", torch.float32, 67, 40, 72),
    ("linear_act", "relu_squared", "input", torch.float16, 33, 130, 24),
    ("linear_act", "identity", "preactivation", torch.bfloat16, 20, 64, 32),
    ("gated_linear_act", "silu", "preactivation", torch.bfloat16, 70, 72, 136),
    ("gated_linear_act", "sigmoid", "input", torch.float32, 67, 53, 61),
    ("gated_linear_act", "quick_gelu", "preactivation", torch.float16, 33, 40, 72),
    ("gated_linear_act", "gelu_tanh", "input", torch.bfloat16, 20, 64, 32),
    ("gated_linear_act", "relu", "preactivation", torch.float32, 17, 64, 32),
]


archs = pytest.mark.parametrize("arch", [80, 90], indirect=True, ids="sm_{}".format)


@simulated
@pytest.mark.parametrize(
    "arch,case", [*((80, case) for case in CASES), *((90, case) for case in CASES[::2])], indirect=["arch"], ids=str
)
def test_simulated(arch, case):
    op, activation, save, dtype, rows, in_features, out_features = case
    exact = activation in values.KINKED
    tensors, grad = values.make(op, (rows,), in_features, out_features, dtype, exact=exact)
    values.check(op, tensors, grad, activation, save=save, backend="triton")


@simulated
@archs
@pytest.mark.parametrize("op", values.OPS)
def test_simulated_layouts(arch, op):
    """Operands that are dense along rows, doubly strided, broadcast, or not there; and no rows at all."""
    lead, k, n = (3, 20), 48, 40
    tensors, grad = values.make(op, lead, k, n, torch.float16)
    tensors = [t.t().contiguous().t() if t.dim() == 2 else t for t in tensors]
    input = values.draw(3, k, 20, dtype=torch.float16).transpose(1, 2)
    values.check(op, [input, *tensors[1:]], grad, "silu", backend="triton")
    biases = [values.draw(2 * n, dtype=torch.float16)[::2] for _ in range(values.OPS[op])]
    strided = values.draw(*lead, 2 * k, dtype=torch.float16)[..., ::2]
    tensors = [strided, *tensors[1 : 1 + values.OPS[op]], *biases]
    values.check(op, tensors, grad[:, :1, :1].expand(*lead, n), "identity", backend="triton")
    tensors = [*tensors[: 1 + values.OPS[op]], *[None] * values.OPS[op]]
    values.check(op, tensors, grad.mT.contiguous().mT, "gelu", save="input", backend="triton")
    tensors[0] = tensors[0][:, :0]
    values.check(op, tensors, grad[:, :0], "gelu", backend="triton")


@simulated
@archs
@pytest.mark.parametrize("op,dtype", [(op, torch.float16) for op in values.OPS] + [("gated_linear_act", torch.float32)])
def test_simulated_tiles(arch, op, dtype, monkeypatch):
    """Every tile of the table, over an edge in every direction; a persistent program computes several."""
    tensors, grad = values.make(op, (136,), 72, 144, dtype)
    weights = values.OPS[op]
    for tile in tiles.candidates(arch, dtype.itemsize, weights, tiles.SHARED[arch]):
        monkeypatch.setattr(tiles, "choose", lambda *_, tile=tile: tile)
        monkeypatch.setattr(tiles, "multiprocessors", lambda: 2)
        values.check(op, tensors, grad, "silu", what=str(tile), backend="triton")


@simulated
@pytest.mark.parametrize("arch", [80], indirect=True)
def test_simulated_offsets_of_64_bits(arch):
    """Rows, and then columns, of the input 2^30 elements apart: in memory that is reserved, but for a few pages."""
    try:
        far = torch.empty(3 * 2**30, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 6 GB of address space")
    for rows, in_features, strides in ((3, 16, (2**30, 1)), (16, 3, (1, 2**30))):
        tensors, grad = values.make("linear_act", (rows,), in_features, 32, torch.float16)
        tensors[0] = far.as_strided((rows, in_features), strides).copy_(tensors[0])
        values.check("linear_act", tensors, grad, "gelu", backend="triton")


@simulated
@archs
def test_simulated_long_sums_are_split(arch):
    from tests import simulator

    tensors, grad = values.make("linear_act", (2048,), 24, 40, torch.bfloat16)
    needed = [False, True, False]
    with simulator.record() as launches:
        values.check("linear_act", tensors, grad, "identity", needed, backend="triton")
    assert [launch.grid[1] for launch in launches if "product" in launch.name] == [4]


@simulated
@pytest.mark.parametrize("arch", [80], indirect=True)
@pytest.mark.parametrize("op", values.OPS)
def test_simulated_as_an_operator(arch, op):
    api.test_compile(op, "triton", "input")
    api.test_double_backward_is_refused(op, "triton")
    api.test_inference_mode_and_no_grad(op, "triton")
    if op == "linear_act":
        api.test_opcheck(op, "triton", True, torch.float32)
        api.test_autocast_as_linear(op, "triton")


@simulated
@archs
def test_simulated_precision(arch):
    """float32 takes three TF32 products, or one where torch allows it, which is exact for numbers of few bits."""
    from tests import simulator

    (x, weight, bias), grad = values.make("linear_act", (40,), 64, 32, torch.float32, exact=True)
    flops = []
    for allow_tf32 in (False, True):
        with simulator.record() as launches:
            operators = backends.operators("triton")
            out, _ = operators.linear_act_forward(x, weight, bias, "identity", False, allow_tf32)
            dinput, *_ = operators.linear_act_backward(
                grad, None, weight, None, None, "identity", True, False, False, allow_tf32
            )
        assert torch.equal(out, x @ weight.t() + bias) and torch.equal(dinput, grad @ weight)
        flops.append([launch.counts["mma_flops"] for launch in launches])
    assert flops[0] == [3 * one for one in flops[1]] and all(flops[1])


@simulated
@archs
def test_simulated_short_sums(arch):
    """Exact where there is one term: three TF32 products, which tensor cores cut off, would show there."""
    assert [launch.precision(torch.float32, terms=terms) for terms in (1, 8, 9)] == ["ieee", "ieee", "tf32x3"]
    test_activations.test_value_and_slope("triton", "relu_squared")
    x, weight, weight_up = (values.draw(rows, 1, dtype=torch.float32) for rows in (300, 20, 20))
    forward = backends.operators("triton").gated_linear_act_forward
    _, gate, up = forward(x, weight, weight_up, None, None, "identity", True, False)
    assert torch.equal(gate, x * weight.t()) and torch.equal(up, x * weight_up.t())


@simulated
@pytest.mark.parametrize("op", values.OPS)
def test_simulated_counts(op, monkeypatch):
    """On sm_80 a tile's operands are read once, in whole sectors, and shared memory without conflicts."""
    from tests import simulator

    rows, out_features, (tile, *_) = 256, 256, tiles.TILES[80][2]
    tile = tile if op == "linear_act" else tile.half()
    monkeypatch.setattr(tiles, "choose", lambda *_: tile)
    simulator.install("sm_80")
    try:
        counts = [_counts(op, rows, in_features, out_features) for in_features in (256, 512)]
    finally:
        simulator.uninstall()
    blocks = rows // tile.rows * (out_features // tile.columns)
    for counted, in_features in zip(counts, (256, 512)):
        read = blocks * (tile.rows + values.OPS[op] * tile.columns) * in_features * 2
        assert counted["global"]["bytes"] == read + rows * out_features * 2
        assert counted["global"]["sectors"] == counted["global"]["minimum"]
        assert counted["shared"]["wavefronts"] == counted["shared"]["minimum"]
    more = {kind: counts[1]["classes"][kind] - counts[0]["classes"][kind] for kind in counts[1]["classes"]}
    issued = sum(more.values()) - more["move"]  # which ptxas removes
    assert more["tensor"] >= 0.39 * issued


def _counts(op, rows, in_features, out_features):
    from tests import simulator

    weights = [torch.randn(out_features, in_features).bfloat16() for _ in range(values.OPS[op])]
    with simulator.record() as launches, torch.no_grad():
        getattr(ops, op)(torch.randn(rows, in_features).bfloat16(), *weights, activation="gelu", backend="triton")
    return launches[0].counts


_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def compiled(kernel, arch, dtype, tile, constants):
    """The kernel as Triton compiles it for operands that are aligned and whose sizes are multiples of 16."""

    def signature(name):
        if name.startswith("sums"):
            return "*fp64"
        return "i32" if name in ("m", "n", "k", "k_part") or name.startswith("stride") else _TYPES[dtype]

    return compile_kernel(kernel, arch, signature, constants, tile)


def compiled_product(kernel, arch, dtype, tile, **constants):
    precision = "ieee" if dtype != torch.float32 or arch < 80 else "tf32x3"
    sizes = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.inner}
    sizes |= {"PERSISTENT": tile.persistent, "DESCRIPTORS": tile.descriptors, "SPECIALISED": tile.specialised}
    sizes |= {"A_DENSE": tile.descriptors, "B_DENSE": tile.descriptors}
    return compiled(kernel, arch, dtype, tile, {"PRECISION": precision, "GROUP": 8, **sizes, **constants})


GPUS = pytest.mark.parametrize("gpu", tiles.TILES, ids="sm_{}".format)


@outside
@GPUS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_compiles(gpu, dtype):
    """Every tile of the table, with the largest epilogue; the product of the backward with the largest tile."""
    dense = dict(stride_xk=1, stride_wk=1, stride_uk=1, stride_b=1, stride_bu=1, ACTIVATION="gelu")
    for weights in (1, 2):
        absent = {} if weights == 2 else {"weight_up": None, "bias_up": None, "up": None}
        for tile in tiles.candidates(gpu, dtype.itemsize, weights, tiles.SHARED[gpu]):
            kernel = compiled_product(linear_act.forward_kernel, gpu, dtype, tile, **dense, **absent)
            assert_fits(kernel, gpu, tile, tile.rows >= 64)
    largest, *others = tiles.candidates(gpu, dtype.itemsize, 1, tiles.SHARED[gpu])
    for tile in [largest, *(tile for tile in others if tile.descriptors)]:
        for stride_a in ("stride_ak", "stride_am"):
            dense = {stride_a: 1, "stride_bn": 1, "stride_un": 1}
            dense |= {"A_DENSE": tile.descriptors and stride_a == "stride_ak", "B_DENSE": False}
            dense |= {"a_up": None, "b_up": None} if tile.specialised else {}
            kernel = compiled_product(linear_act.product_kernel, gpu, dtype, tile, **dense)
            assert_fits(kernel, gpu, tile, tile.rows >= 64)
    kernel = compiled_gradient(gpu, dtype)
    assert stack(kernel) == 0 and kernel.metadata.shared <= tiles.SHARED[gpu]


def compiled_gradient(gpu, dtype):
    sizes = dict(ROWS=linear_act._GRADIENT_ROWS, COLUMNS=linear_act._GRADIENT_COLUMNS, STEP=linear_act._GRADIENT_STEP)
    constants = {"stride_gn": 1, "ACTIVATION": "gelu", **sizes}
    return compiled(linear_act.gradient_kernel, gpu, dtype, tiles.Tile(0, 0, 0, 4, 3), constants)


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """A GPU on which the second tile is the fastest; what was measured."""
    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTLAYERS_TRITON_AUTOTUNE", raising=False)
    monkeypatch.setattr(tiles, "current_gpu", lambda: tiles.Gpu(80, "GPU", tiles.SHARED[80], 108))
    monkeypatch.setattr(tiles, "_median", lambda run: (run(), measured[-1] != tiles.TILES[80][2][1])[1])
    tiles._remembered.cache_clear()
    yield measured
    tiles._remembered.cache_clear()


@outside
def test_tiles_are_measured_once(tuner, monkeypatch):
    first, second, _ = tiles.TILES[80][2]
    for _ in range(2):
        assert tiles.choose(4096, 4096, 512, torch.float16, measure=tuner.append) == second
        assert tuner == [first, second]
        tiles._remembered.cache_clear()  # as in the next process
    tiles.choose(4096, 4096, 8192, torch.float16, measure=tuner.append)
    assert len(tuner) == 4
    tiles.cache_path().write_text("{ this is no JSON")
    tiles._remembered.cache_clear()
    tiles.choose(4096, 4096, 512, torch.float16, measure=tuner.append)
    assert len(tuner) == 6
    monkeypatch.setenv("FASTLAYERS_TRITON_AUTOTUNE", "0")
    assert tiles.choose(4096, 4096, 512, torch.float16, measure=tuner.append) == first
    assert tiles.choose(4096, 4096, 512, torch.float16) == first and len(tuner) == 6


@outside
def test_tiles_without_measuring(tuner):
    """The largest with enough programs for the GPU; that for few rows only where there are few."""
    large, small, few = tiles.TILES[80][2]
    assert tiles.choose(4096, 4096, 512, torch.float16) == large
    assert tiles.choose(512, 1024, 512, torch.float16) == tiles.choose(64, 64, 64, torch.float16) == small
    assert tiles.choose(8, 1024, 512, torch.float16) == few
    assert tiles.choose(4096, 4096, 512, torch.float16, 2) == large.half()
    assert tiles.candidates(89, 2, 1, 101376) == [large, small, few]  # the nearest older entry, as far as it fits
    assert tiles.candidates(89, 2, 1, 65536) == [small, few]


@outside
def test_tiles_with_descriptors(tuner, monkeypatch):
    """Where they can read the operands; several products at once have no specialised warps; taken where measured."""
    monkeypatch.setattr(tiles, "current_gpu", lambda: tiles.Gpu(90, "GPU", tiles.SHARED[90], 132))
    monkeypatch.setattr(tiles, "_median", lambda run: (run(), not tuner[-1].specialised)[1])
    form = tiles.SPECIALISED, tuner.append
    assert tiles.choose(4096, 4096, 512, torch.float16, 1, *form).specialised
    assert not tiles.choose(4096, 4096, 512, torch.float16, 1, tiles.DESCRIPTORS, tuner.append).specialised
    assert tuner[-1].descriptors and not any(tile.descriptors for tile in tiles.candidates(90, 2, 1, 232448, 0))
    assert not any(
        tile.specialised for tile in tiles.candidates(90, 2, 2, 232448) + tiles.candidates(101, 2, 1, 232448)
    )
    for rows in (4096, 1):  # not measured
        assert not tiles.choose(rows, 4096, 512, torch.float16, 1, tiles.SPECIALISED).descriptors


@outside
def test_what_descriptors_can_read():
    x = torch.zeros(10, 64, dtype=torch.float16)
    assert launch.describable(x, x.t(), x[1:, 8:], x.view(2, 5, 64))
    for other in (x[:, 1:], x[:, ::2], torch.zeros(10, 60, dtype=torch.float16), x.expand(2, 10, 64)[..., 4:]):
        assert not launch.describable(x, other)
    assert not launch.describable(x[:1].expand(10, 64))  # rows that are one
    with torch._subclasses.FakeTensorMode():
        assert not launch.describable(torch.zeros(10, 64))


@outside
def test_errors():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(backends.BackendError, match="on cpu, not on cuda"):
        ops.linear_act(x, w, backend="triton")
    with device_of("triton" if "triton" in BACKENDS["adam"] else None):
        forward = backends.operators("triton").linear_act_forward
        with pytest.raises(ValueError, match=r"weight or bias has to be \(5, 4\), torch.float32; got \(5, 3\)"):
            forward(x, w[:, :3], None, "gelu", False, False)
