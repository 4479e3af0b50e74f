"""The CUDA kernels of linear_act: what they move and multiply, exactly, and that broken copies are found out."""

import pytest
import torch

from fastlayers import ops
from tests.backends import BACKENDS
from tests.numerics import assert_accurate
from tests.simulator import SimulatorError, install, record, rewrite_ptx, uninstall

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["linear_act"], reason="needs nvcc to compile the kernels")


@pytest.fixture(autouse=True)
def device():
    torch.manual_seed(0)
    install("sm_80")
    yield
    uninstall()


def product(rows, in_features, out_features, dtype=torch.bfloat16, op="linear_act", activation="gelu"):
    """The output and the launches."""
    weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(2 if op == "gated_linear_act" else 1)]
    input = torch.randn(rows, in_features).to(dtype)
    with record() as launches, torch.no_grad():
        out = getattr(ops, op)(input, *weights, activation=activation, backend="cuda")
    return out, launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_main_loop(dtype):
    """A tile of 64 more of k: three fifths of its instructions are products, nothing conflicts or is read twice."""
    few, many = (product(256, in_features, 128, dtype)[1][0].counts for in_features in (192, 256))
    tensor = many["classes"]["tensor"] - few["classes"]["tensor"]
    assert tensor == 2 * 4 * 4 * 32  # blocks, warps, steps, 16 x 8 tiles of 64 x 64
    assert tensor >= 0.60 * (many["total"] - few["total"])
    for counts in (few, many):
        assert counts["shared"]["wavefronts"] == counts["shared"]["minimum"]
        assert counts["global"]["sectors"] <= 1.02 * counts["global"]["minimum"]


@pytest.mark.parametrize("op", ["linear_act", "gated_linear_act"])
def test_bytes(op):
    """Each block reads its rows of input and its columns of the weights once, and writes its outputs once."""
    rows, in_features, out_features = 256, 192, 256
    _, (launch,) = product(rows, in_features, out_features, op=op)
    columns = 64 if op == "gated_linear_act" else 128  # of the output, per block
    blocks = rows // 128 * (out_features // columns)
    assert launch.grid == (blocks, 1, 1)
    read = blocks * (128 + 128) * in_features * 2
    assert launch.counts["global"]["bytes"] == read + rows * out_features * 2


def test_long_sums_are_split():
    """Where few blocks would work, k is shared out, and the parts are added in order."""
    torch.manual_seed(1)
    first, launches = product(40, 1024, 72, torch.float16)
    assert [launch.grid[1] for launch in launches] == [4, 1]
    torch.manual_seed(1)
    again, _ = product(40, 1024, 72, torch.float16)
    assert torch.equal(first, again)


@pytest.mark.parametrize("op", ["linear_act", "gated_linear_act"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_split_sums_are_accurate(op, dtype):
    tensors = [torch.randn(40, 1100), *[torch.randn(77, 1100) / 33 for _ in range(1 if op == "linear_act" else 2)]]
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    results = []
    for backend, cast in (("cuda", dtype), ("reference", torch.float64), ("reference", dtype)):
        given = [t.detach().to(cast).requires_grad_() for t in tensors]
        out = getattr(ops, op)(*given, activation="silu", backend=backend)
        grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(cast)
        results.append([out, *torch.autograd.grad(out, given, grad)])
    for triple in zip(*results):
        assert_accurate(*triple, op)


@pytest.mark.parametrize("compiled", [False, True])
def test_tf32_where_torch_allows_it(compiled):
    """One product instead of three, and only while it is asked for, also of code that was compiled before."""
    torch._dynamo.reset()
    function = torch.compile(ops.linear_act, backend="aot_eager") if compiled else ops.linear_act
    input, weight = torch.randn(128, 192), torch.randn(128, 192)
    matmul, counts = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision
    try:
        for matmul.allow_tf32 in (False, True, False):
            with record() as launches:
                function(input, weight, backend="cuda")
            counts.append(launches[0].counts["classes"]["tensor"])
    finally:
        matmul.fp32_precision = before
    assert counts[0] == counts[2] == 3 * counts[1] > 0


BREAKS = {  # what is broken -> pattern, replacement, the errors one of which is raised; None: the answer is wrong
    "the barrier between tiles": ("bar.sync", "bar.warp.sync -1; //", {"race", "uninitialised", "async"}),
    "the wait for copies": ("cp.async.wait_group 0", "cp.async.wait_group 1", {"async"}),
    "the commit of copies": ("cp.async.commit_group;", "", {"async"}),
    "the other rows of a tile": (
        "ldmatrix.sync.aligned.m8n8.x4.shared",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared",
        None,
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_found_out(name):
    pattern, replacement, kinds = BREAKS[name]
    right, _ = product(100, 200, 130)
    torch.manual_seed(0)
    with rewrite_ptx(lambda text: text.replace(pattern, replacement)):
        try:
            found, _ = product(100, 200, 130)
        except SimulatorError as error:
            assert kinds is not None and error.kind in kinds, error
            return
    assert kinds is None and not torch.equal(found, right)
