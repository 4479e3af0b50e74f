"""linear_act and gated_linear_act against PyTorch: values, every gradient, layouts, extremes, threads."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlayers import _native, ops, reference
from tests.backends import BACKENDS, SIMULATED, dtypes_of
from tests.numerics import assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = tuple(reference.ACTIVATIONS)
KINKED = ("relu", "leaky_relu")  # a slope that jumps: rounding z across 0 would decide the gradient
OPS = {"linear_act": 1, "gated_linear_act": 2}  # weights of each

pytestmark = pytest.mark.tensor_cores
cases = pytest.mark.parametrize("op,backend", [(op, backend) for op in OPS for backend in BACKENDS[op]])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
saves = pytest.mark.parametrize("save", ["preactivation", "input"])


def draw(*shape, dtype, exact=False):
    """Standard normal values, or, where exact, small multiples of 1/4 whose products sum without rounding."""
    values = torch.randint(-4, 5, shape) / 4 if exact else torch.randn(shape)
    return values.to(dtype)


def make(op, lead, in_features, out_features, dtype, exact=False):
    """input, weights, biases in the order of the op's arguments, and a gradient for the output."""
    scale = 1 if exact else max(in_features, 1) ** -0.5
    weights = [draw(out_features, in_features, dtype=dtype, exact=exact) * scale for _ in range(OPS[op])]
    biases = [draw(out_features, dtype=dtype, exact=exact) for _ in range(OPS[op])]
    tensors = [draw(*lead, in_features, dtype=dtype, exact=exact), *weights, *biases]
    return tensors, draw(*lead, out_features, dtype=dtype, exact=exact)


def run(function, tensors, grad, needed=None, **options):
    """Output and gradients; tensors keep their strides. needed: which of them require a gradient."""
    needed = needed or [True] * len(tensors)
    tensors = [t.detach().requires_grad_(n) if t is not None else None for t, n in zip(tensors, needed)]
    out = function(*tensors, **options)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, wanted, grad.to(out.dtype)) if wanted else ())]


def check(op, tensors, grad, activation, needed=None, what="", **options):
    ours = run(getattr(ops, op), tensors, grad, needed, activation=activation, **options)
    plain = getattr(reference, op)
    eager = run(plain, tensors, grad, needed, activation=activation)
    doubled = [t if t is None else t.detach().double() for t in tensors]
    exact = run(plain, doubled, grad, needed, activation=activation)
    for i, triple in enumerate(zip(ours, exact, eager)):
        assert_accurate(*triple, f"{op} {activation} {what} {'output' if i == 0 else f'gradient {i - 1}'}")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@cases
@dtypes
@saves
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(op, backend, dtype, save, activation):
    tensors, grad = make(op, (3, 67), 53, 61, dtype, exact=activation in KINKED)
    check(op, tensors, grad, activation, save=save, backend=backend)


SHAPES = [((1823,), 37, 781), ((2, 3, 50), 200, 100), ((257,), 400, 3), ((16,), 384, 96), ((7,), 1, 130)]


@cases
@dtypes
@pytest.mark.parametrize("lead,in_features,out_features", SHAPES, ids=str)
def test_odd_shapes(op, backend, dtype, lead, in_features, out_features):
    if backend != "cpu" and SIMULATED:  # which takes its time
        lead, out_features = [min(size, 323) for size in lead], min(out_features, 181)
    tensors, grad = make(op, lead, in_features, out_features, dtype)
    check(op, tensors, grad, "gelu", backend=backend)


@cases
@dtypes
@pytest.mark.parametrize(
    "lead,in_features,out_features",
    [((1,), 1, 1), ((), 3, 2), ((0,), 5, 7), ((4, 0, 2), 5, 7), ((4,), 0, 3), ((4,), 5, 0)],
    ids=str,
)
def test_smallest_shapes(op, backend, dtype, lead, in_features, out_features):
    tensors, grad = make(op, lead, in_features, out_features, dtype, exact=True)
    for save in ("preactivation", "input"):
        check(op, tensors, grad, "identity", save=save, backend=backend)
        check(op, tensors, grad, "relu", save=save, backend=backend)


@cases
@dtypes
def test_strided_arguments(op, backend, dtype):
    """Transposed, sliced, permuted, broadcast and doubly strided tensors are read where they lie."""
    lead, k, n = (6, 40), 70, 50
    tensors, grad = make(op, lead, k, n, dtype)
    inputs = {
        "sliced rows": draw(6, 80, k, dtype=dtype)[:, ::2],
        "sliced columns": draw(6, 40, 2 * k, dtype=dtype)[..., :k],
        "every second column": draw(6, 40, 2 * k, dtype=dtype)[..., ::2],
        "permuted": draw(40, 6, k, dtype=dtype).transpose(0, 1),
        "broadcast": draw(1, 1, k, dtype=dtype).expand(6, 40, k),
        "offset by one": draw(6 * 40 * k + 1, dtype=dtype)[1:].view(6, 40, k),
    }
    for what, input in inputs.items():
        check(op, [input, *tensors[1:]], grad, "silu", what=what, backend=backend)
    check(op, [draw(k, 240, dtype=dtype).t(), *tensors[1:]], grad.view(240, n), "silu", backend=backend)
    weights = [w.t().contiguous().t() for w in tensors[1 : 1 + OPS[op]]]
    check(op, [tensors[0], *weights, *tensors[1 + OPS[op] :]], grad, "silu", what="weight view", backend=backend)
    weights = [draw(n, 2 * k, dtype=dtype)[:, ::2] * k**-0.5 for _ in weights]
    biases = [draw(2 * n, dtype=dtype)[::2] for _ in weights]
    check(op, [tensors[0], *weights, *biases], grad, "silu", what="strided", backend=backend)
    grads = {
        "broadcast grad": draw(1, dtype=dtype).expand(6, 40, n),
        "transposed grad": draw(n, 40, 6, dtype=dtype).permute(2, 1, 0),
        "sliced grad": draw(6, 40, 2 * n, dtype=dtype)[..., n:],
    }
    for what, strided in grads.items():
        check(op, tensors, strided, "silu", what=what, backend=backend)
        check(op, tensors, strided, "identity", what=what, backend=backend)


@cases
@saves
@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_only_the_needed_gradients(op, backend, save, activation):
    tensors, grad = make(op, (20,), 30, 40, torch.float32)
    for i in range(len(tensors)):
        needed = [j == i for j in range(len(tensors))]
        check(op, tensors, grad, activation, needed, save=save, backend=backend)
    check(op, tensors, grad, activation, [False] * len(tensors), save=save, backend=backend)
    without_bias = [*tensors[: 1 + OPS[op]], *[None] * OPS[op]]
    check(op, without_bias, grad, activation, save=save, backend=backend)


@cases
def test_frozen_weight_saves_no_input(op, backend):
    """With nothing but the input's gradient wanted, the input itself is not kept alive."""
    tensors, _ = make(op, (20,), 30, 40, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        getattr(ops, op)(tensors[0].requires_grad_(), *tensors[1:], backend=backend)
    assert not any(t.data_ptr() == tensors[0].data_ptr() for t in kept)


@cases
@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(op, backend, dtype, activation):
    """NaN, infinities, and values that overflow or underflow: the answer is torch's, or the exact one rounded.

    (torch's own answers differ between dtypes: gelu(inf) is NaN in float32, gelu(largest) is inf.)
    """
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    values = [float("nan"), float("inf"), -float("inf"), largest, -largest, least, -least, 0.0, -0.0, 90.0, -90.0, 1.5]
    input = torch.tensor(values, dtype=dtype).view(-1, 1)
    weights = [torch.ones(1, 1, dtype=dtype) for _ in range(OPS[op])]
    function = getattr(ops, op)
    ours = function(input, *weights, activation=activation, backend=backend)
    eager = getattr(reference, op)(input, *weights, activation=activation)
    exact = getattr(reference, op)(input.double(), *[w.double() for w in weights], activation=activation).to(dtype)
    same = torch.zeros(input.shape, dtype=torch.bool)
    for right in (eager, exact):
        same |= torch.isclose(ours.float(), right.float(), rtol=torch.finfo(dtype).eps * 4, atol=0, equal_nan=True)
        same |= (right.abs() < least) & (ours.abs() <= least)  # the denormal range may be flushed
    assert same.all(), list(zip(values, ours.flatten().tolist(), eager.flatten().tolist(), exact.flatten().tolist()))


@cases
@dtypes
def test_nan_reaches_its_row_and_no_other(op, backend, dtype):
    tensors, grad = make(op, (50,), 60, 70, dtype)
    clean = getattr(ops, op)(*tensors, backend=backend)
    tensors[0][7, 11] = float("nan")
    out, dinput, *_ = run(getattr(ops, op), tensors, grad, backend=backend)
    assert out[7].isnan().all() and dinput[7].isnan().all()
    others = torch.arange(50) != 7
    assert torch.equal(out[others], clean[others]) and torch.isfinite(dinput[others]).all()


@cases
@dtypes
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), None])
def test_what_is_not_finite_stays_in_its_rows(op, backend, dtype, value):
    """Infinities, and products of the largest numbers (None), are as in float64, and other rows the same to the bit."""
    tensors, _ = make(op, (50,), 60, 70, dtype)
    clean = getattr(ops, op)(*tensors, activation="identity", backend=backend)
    for row in (0, 7, 8, 49):
        tensors[0][row, 11] = torch.finfo(dtype).max if value is None else value
    out = getattr(ops, op)(*tensors, activation="identity", backend=backend)
    eager = getattr(reference, op)(*tensors, activation="identity")
    exact = getattr(reference, op)(*[t.double() for t in tensors], activation="identity")
    rounded = exact.to(dtype)
    finite = rounded.isfinite() & eager.isfinite()
    assert torch.equal(out[rounded.isinf()], rounded[rounded.isinf()]) and not out.isnan().any()
    assert_accurate(out[finite], exact[finite], eager[finite])
    others = [row for row in range(50) if row not in (0, 7, 8, 49)]
    assert torch.equal(out[others], clean[others])


@cases
def test_arguments_are_left_alone(op, backend):
    tensors, grad = make(op, (20,), 30, 40, torch.float32)
    before = [t.clone() for t in [*tensors, grad]]
    run(getattr(ops, op), tensors, grad, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip([*tensors, grad], before))


@cases
@dtypes
def test_the_same_bits_for_any_number_of_threads(op, backend, dtype):
    tensors, grad = make(op, (300,), 450, 130, dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(getattr(ops, op), tensors, grad, backend=backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@cases
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call(op, backend, data):
    size = st.integers(0, 70)
    lead = data.draw(st.lists(st.integers(0, 9), max_size=3))
    k, n = data.draw(size), data.draw(size)
    dtype, activation = data.draw(st.sampled_from(dtypes_of(backend))), data.draw(st.sampled_from(ACTIVATIONS))
    tensors, grad = make(op, lead, k, n, dtype, exact=True)
    for i, tensor in enumerate(tensors):
        if tensor.dim() == 2 and data.draw(st.booleans()):
            tensors[i] = tensor.t().contiguous().t()
    tensors = [None if t.dim() == 1 and len(lead) and data.draw(st.booleans()) else t for t in tensors]
    needed = [data.draw(st.booleans()) for _ in tensors]
    save = data.draw(st.sampled_from(["preactivation", "input"]))
    check(op, tensors, grad, activation, needed, save=save, backend=backend)


BELOW = {"avx2": "none", "avx512": "avx2", "avx512_bf16": "avx512", "amx": "avx512_bf16"}


@pytest.mark.skipif(_native.cpu_isa == "none", reason="the CPU kernels do not run here")
def test_lower_instruction_sets():
    """The kernels compiled for lesser CPUs than this one give right results, too."""
    isa = BELOW[_native.cpu_isa]
    while isa != "none":
        chosen = "cpu and (test_any_call or test_special_values or (test_odd_shapes and 200-100))"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
        result = subprocess.run(command, env={**os.environ, "FASTLAYERS_CPU_ISA": isa}, capture_output=True, text=True)
        assert result.returncode == 0, f"{isa}:\n{result.stdout[-3000:]}{result.stderr[-1000:]}"
        isa = BELOW[isa]
