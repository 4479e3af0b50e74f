"""linear_act by torch's own product and one CUDA pass: accuracy, what it refuses, the operators by themselves."""

import pytest
import torch

import fastlayers
from fastlayers import backends, ops, reference
from tests.backends import BACKENDS, device_of
from tests.numerics import assert_accurate
from tests.test_linear_act import ACTIVATIONS, DTYPES, KINKED, check, make

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["linear_act"], reason="needs nvcc to compile the kernels")
on_ops = pytest.mark.parametrize("op", ["linear_act", "gated_linear_act"])
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def device():
    torch.manual_seed(0)
    with device_of("cublas"):
        yield


@on_ops
@on_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(op, dtype, activation):
    tensors, grad = make(op, (3, 67), 53, 61, dtype, exact=activation in KINKED)
    check(op, tensors, grad, activation, backend="cublas")


@on_ops
@on_dtypes
@pytest.mark.parametrize("lead, in_features, out_features", [((257,), 40, 3), ((2, 0), 4, 8), ((5,), 4, 0), ((), 3, 2)])
def test_shapes(op, dtype, lead, in_features, out_features):
    tensors, grad = make(op, lead, in_features, out_features, dtype)
    check(op, tensors, grad, "silu", backend="cublas")


@on_ops
def test_strides_and_wanted_gradients(op):
    tensors, grad = make(op, (6, 40), 24, 50, torch.float16)
    tensors = [t.t().contiguous().t() if t.dim() == 2 else t for t in tensors]
    grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    for wanted in range(len(tensors)):
        check(op, tensors, grad, "gelu", [i == wanted for i in range(len(tensors))], backend="cublas")
    without_bias = [t if t.dim() > 1 else None for t in tensors]
    check(op, without_bias, grad, "gelu", backend="cublas")


@on_ops
def test_compile_and_autocast(op):
    tensors = [t.requires_grad_() for t in make(op, (4, 5), 6, 7, torch.float32)[0]]

    def loss(*tensors):
        return getattr(ops, op)(*tensors, backend="cublas").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(loss(*tensors), tensors)
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(compiled(*tensors), tensors), wanted))
    with torch.autocast(tensors[0].device.type, torch.float16):
        assert getattr(ops, op)(*tensors, backend="cublas").dtype == torch.float16


def test_what_it_refuses():
    input, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    with pytest.raises(fastlayers.BackendError, match="computes the product again"):
        ops.linear_act(input, weight, save="input", backend="cublas")
    assert ops.linear_act(input.detach(), weight, save="input", backend="cublas").shape == (3, 5)
    with pytest.raises(fastlayers.BackendError, match="float64"):
        ops.linear_act(input.double(), weight.double(), backend="cublas")
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        out = ops.linear_act(input, weight, backend="cublas")
        torch.autograd.grad(out.sum(), input, create_graph=True)[0].sum().backward()
    operator = backends.operators("cublas").linear_act_epilogue
    with pytest.raises(RuntimeError, match="product_up has to be of the shape of product"):
        operator(torch.randn(3, 4), torch.randn(3, 5), None, None, "gelu")
    with pytest.raises(RuntimeError, match="bias has to be"):
        operator(torch.randn(3, 4), None, torch.randn(3), None, "gelu")


@pytest.mark.parametrize("gated", [False, True])
@on_dtypes
def test_epilogue(dtype, gated):
    """The activation of products from elsewhere, and the gradients of what is in them: odd sizes, strides."""
    products = [torch.randn(70, 2 * 43)[:, :43].to(dtype) for _ in range(1 + gated)]
    biases = [torch.randn(43).to(dtype) for _ in range(1 + gated)]
    none = [None] * (1 - gated)
    operator = backends.operators("cublas").linear_act_epilogue
    leaves = [t.requires_grad_() for t in (*products, *biases)]
    upstream = torch.randn(70, 43).to(dtype)
    answers = []
    for cast in (torch.float64, dtype):
        z = [x.detach().to(cast).requires_grad_() for x in products]
        active = reference.ACTIVATIONS["gelu"](z[0])
        out = active * z[1] if gated else active
        grads = torch.autograd.grad(out, z, upstream.to(cast))
        answers.append([out, *grads, *(grad.sum(0) for grad in grads)])
    out = operator(*products, *none, *biases, *none, "gelu")
    for ours, exact, eager in zip([out, *torch.autograd.grad(out, leaves, upstream)], *answers):
        assert_accurate(ours, exact, eager)
    torch.library.opcheck(operator, (*products, *none, *biases, *none, "gelu"))
    backward = backends.operators("cublas").linear_act_epilogue_backward
    saved = [*(x.detach().contiguous() for x in products), *none]
    torch.library.opcheck(backward, (torch.randn_like(out), *saved, "gelu", True, gated, True, gated))
