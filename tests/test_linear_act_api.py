"""linear_act and gated_linear_act as PyTorch citizens: opcheck, compile, autocast, checkpoints, bad calls."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F

import fastlayers
from fastlayers import _native, backends, ops, reference
from tests.backends import BACKENDS

OPS = {"linear_act": 1, "gated_linear_act": 2}  # weights of each
cases = pytest.mark.parametrize("op,backend", [(op, backend) for op in OPS for backend in BACKENDS[op]])
native = pytest.mark.skipif(_native.error is not None, reason=str(_native.error))


def make(op, lead=(4, 5), in_features=6, out_features=7, dtype=torch.float32):
    torch.manual_seed(0)
    weights = [torch.randn(out_features, in_features, dtype=dtype, requires_grad=True) for _ in range(OPS[op])]
    biases = [torch.randn(out_features, dtype=dtype, requires_grad=True) for _ in range(OPS[op])]
    return [torch.randn(*lead, in_features, dtype=dtype, requires_grad=True), *weights, *biases]


@native
@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("saves", [True, False])
def test_opcheck(op, backend, saves, dtype):
    tensors = make(op, dtype=dtype)
    operators = backends.operators(backend)
    forward, backward = getattr(operators, f"{op}_forward"), getattr(operators, f"{op}_backward")
    torch.library.opcheck(forward, (*tensors, "gelu", saves, False))
    torch.library.opcheck(forward, (*tensors[: 1 + OPS[op]], *[None] * OPS[op], "relu", saves, True))
    plain = [t.detach() for t in tensors]
    out, *saved = forward(*plain, "gelu", saves, False)
    saved = saved if saves else [None] * OPS[op]
    for needed in (True, False):
        flags = (*[needed] * len(plain), False)
        torch.library.opcheck(backward, (torch.randn_like(out), *plain, *saved, "gelu", *flags))


@cases
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_compile(op, backend, save):
    torch._dynamo.reset()  # or the graphs of the other cases would count as recompilations

    def loss(*tensors):
        return getattr(ops, op)(*tensors, save=save, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lead in ((4, 5), (3, 2)):
        tensors = make(op, lead)
        wanted = torch.autograd.grad(loss(*tensors), tensors)
        found = torch.autograd.grad(compiled(*tensors), tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@cases
def test_double_backward_is_refused(op, backend):
    tensors = make(op)
    out = getattr(ops, op)(*tensors, backend=backend)
    (first,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
        first.sum().backward()
    tensors = [tensors[0], *(t.detach() for t in tensors[1:])]  # nothing that the gradient reads requires one
    loss = getattr(ops, op)(*tensors, backend=backend).sum() + tensors[0].square().sum()
    (first,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
        first.sum().backward()


@cases
def test_autocast_as_linear(op, backend):
    tensors = make(op)
    lower = torch.float16 if backend == "cuda" else torch.bfloat16  # which every such GPU has
    with torch.autocast(tensors[0].device.type, lower):
        out = getattr(ops, op)(*tensors, backend=backend)
        assert out.dtype == F.linear(*tensors[:2]).dtype == lower
    half = [t.detach().to(lower) for t in tensors]
    assert torch.equal(out, getattr(ops, op)(*half, backend=backend))
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert all(g.dtype == torch.float32 for g in gradients)
    with torch.autocast(tensors[0].device.type, lower, enabled=False):
        assert getattr(ops, op)(*tensors, backend=backend).dtype == torch.float32


@cases
def test_activation_checkpointing(op, backend):
    tensors = make(op)

    def function(*args):
        return getattr(ops, op)(*args, backend=backend)

    wanted = torch.autograd.grad(function(*tensors).sum(), tensors)
    out = torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), tensors), wanted))


@cases
def test_backward_twice_with_retained_graph(op, backend):
    tensors = make(op)
    out = getattr(ops, op)(*tensors, backend=backend).sum()
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, tensors)))


@cases
def test_inference_mode_and_no_grad(op, backend):
    tensors = make(op)
    with torch.no_grad():
        out = getattr(ops, op)(*tensors, backend=backend)
    assert not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(getattr(ops, op)(*tensors, backend=backend), out)


@pytest.mark.parametrize("op", OPS)
def test_float64_and_meta_are_served_by_reference(op):
    tensors = make(op, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: getattr(ops, op)(*args, activation="tanh"), tensors)
    meta = [t.detach().float().to("meta") for t in tensors]
    assert getattr(ops, op)(*meta).shape == (4, 5, 7)
    with pytest.raises(fastlayers.BackendError, match="float64"):
        getattr(ops, op)(*tensors, backend="cpu")


@pytest.mark.parametrize("op", OPS)
def test_explain(op, capsys):
    answers = fastlayers.explain(op, *make(op))
    assert answers["reference"] is None and f"{op}: reference" in capsys.readouterr().out
    assert set(answers) == set(backends.NAMES)


def test_torch_serves_16_bit_where_it_has_tile_instructions(monkeypatch):
    """On CPUs with AMX the choice falls on torch's GEMM, and the compiled kernels still serve who asks for them."""
    module = sys.modules["fastlayers.ops.linear_act"]
    x, w = torch.randn(300, 4, dtype=torch.bfloat16), torch.randn(5, 4, dtype=torch.bfloat16)
    for amx in (True, False):
        monkeypatch.setitem(module._TORCH_GEMM_IS_FASTER, torch.bfloat16, amx)
        facts = backends.facts("linear_act", x, w)
        assert (backends.choose("linear_act", facts) == "reference") == amx or backends.native_reason(facts)
        assert ops.linear_act(x, w).shape == (300, 5)
        assert backends.why_not("linear_act", "cpu", facts) == backends.native_reason(facts)


@pytest.mark.skipif("cpu" not in BACKENDS["linear_act"], reason="for the CPU")
def test_torch_serves_few_rows():
    """They do not pay for the packing of the weight."""
    facts = functools.partial(backends.facts, "linear_act")
    for rows, wanted in ((64, "reference"), (65, "cpu"), ((8, 8), "reference"), ((5, 13), "cpu")):
        x = torch.randn(*(rows if isinstance(rows, tuple) else (rows,)), 4)
        assert backends.choose("linear_act", facts(x, torch.randn(5, 4))) == wanted
        assert backends.why_not("linear_act", "cpu", facts(x, torch.randn(5, 4))) is None


def test_triton_refuses_a_gpu_that_is_not_the_current_one(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_current_gpu", lambda: 0)
    facts = {"device": backends.cuda_device, "index": 0, "dtype": torch.float32}
    assert backends.triton_reason(facts) is None
    assert "the current GPU, cuda:0, and the tensors are on cuda:1" in backends.triton_reason({**facts, "index": 1})


def test_torch_serves_on_a_gpu_what_has_nothing_to_fuse(monkeypatch):
    """In 16 bits; in float32 it multiplies without tensor cores there."""
    x, w = torch.randn(3, 4).half(), torch.randn(5, 4).half()
    facts = backends.facts("linear_act", x, w, activation="identity")
    assert facts["is_plain"] and not backends.facts("linear_act", x, w)["is_plain"]
    assert not backends.facts("linear_act", x.float(), w.float(), activation="identity")["is_plain"]
    gated = x, w, w, None, None, "identity"
    assert not backends.facts("gated_linear_act", *gated)["is_plain"]
    monkeypatch.setattr(backends, "cuda_device", "cpu")
    assert backends.choose("linear_act", facts) == "reference"


X, W, B = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
BAD_CALLS = [
    ((None, W, B), {}, TypeError, "input has to be a torch.Tensor, got NoneType"),
    (([[1.0]], W, B), {}, TypeError, "input has to be a torch.Tensor, got list"),
    ((X, None, B), {}, TypeError, "weight.* has to be a torch.Tensor, got NoneType"),
    ((X, W, 1.0), {}, TypeError, "bias.* has to be a torch.Tensor, got float"),
    ((X, W, B), {"activation": "swoosh"}, ValueError, "'swoosh' is not one of identity, relu, gelu"),
    ((X, W, B), {"activation": ""}, ValueError, "'' is not one of"),
    ((X, W, B), {"activation": None}, TypeError, "activation has to be a string, got NoneType"),
    ((X, W, B), {"activation": F.gelu}, TypeError, "activation has to be a string"),
    ((X, W, B), {"save": "everything"}, ValueError, "save has to be .* got 'everything'"),
    ((X, W, B), {"save": None}, ValueError, "save has to be .* got None"),
    ((X, W, B), {"backend": "gpu"}, ValueError, "backend 'gpu' is not one of"),
    ((X, W, B), {"backend": "cuda"}, fastlayers.BackendError, "'cuda' cannot serve this call"),
    ((torch.tensor(1.0), W, B), {}, ValueError, "got a scalar"),
    ((X, W[0], B), {}, ValueError, r"has to be \(out_features, in_features\), got \(4,\)"),
    ((X, W[None], B), {}, ValueError, r"has to be \(out_features, in_features\), got \(1, 5, 4\)"),
    ((X, W.t(), B), {}, ValueError, "in_features 5, input has 4"),
    ((X, W, B[:4]), {}, ValueError, r"bias.* has to be \(5,\), got \(4,\)"),
    ((X, W, B[None]), {}, ValueError, r"bias.* has to be \(5,\), got \(1, 5\)"),
    ((X.long(), W.long(), B.long()), {}, TypeError, "got torch.int64"),
    ((X.cfloat(), W.cfloat(), B.cfloat()), {}, TypeError, "got torch.complex64"),
    ((X.half(), W, B), {}, ValueError, "weight.* is torch.float32, input is torch.float16"),
    ((X, W.double(), B), {}, ValueError, "weight.* is torch.float64, input is torch.float32"),
    ((X, W, B.bfloat16()), {}, ValueError, "bias.* is torch.bfloat16, input is torch.float32"),
    ((X, W.to("meta"), B), {}, ValueError, "weight.* is on meta, input is on cpu"),
    ((X, W, B.to("meta")), {}, ValueError, "bias.* is on meta, input is on cpu"),
]


@pytest.mark.parametrize("args,kwargs,error,message", BAD_CALLS, ids=[case[3] for case in BAD_CALLS])
@pytest.mark.parametrize("op", OPS)
def test_bad_calls(op, args, kwargs, error, message):
    input, weight, bias = args
    repeated = (input, *[weight] * OPS[op], *[bias] * OPS[op])
    with pytest.raises(error, match=message) as caught:
        getattr(ops, op)(*repeated, **kwargs)
    assert "backend" in kwargs or str(caught.value).startswith(f"{op}: ")


def test_gated_weights_have_to_agree():
    with pytest.raises(ValueError, match=r"weight_gate has shape \(5, 4\), weight_up \(6, 4\)"):
        ops.gated_linear_act(X, W, torch.randn(6, 4))
    with pytest.raises(ValueError, match=r"gated_linear_act: bias_up has to be \(5,\)"):
        ops.gated_linear_act(X, W, W, B, B[:4])


@native
def test_native_ops_refuse_what_would_read_beyond():
    """torch.ops can be called directly: every mismatch that could touch foreign memory is an error."""
    forward, backward = torch.ops.fastlayers.linear_act_forward, torch.ops.fastlayers.linear_act_backward
    grad, flags = torch.randn(3, 5), (True, True, True, False)
    for call in (
        lambda: forward(X, W[:, :3], None, "gelu", False, False),
        lambda: forward(X, W[0], None, "gelu", False, False),
        lambda: forward(X, W, B[:4], "gelu", False, False),
        lambda: forward(X, W.half(), None, "gelu", False, False),
        lambda: forward(X, W, B.double(), "gelu", False, False),
        lambda: forward(X.long(), W.long(), None, "gelu", False, False),
        lambda: forward(X, W, None, "swoosh", False, False),
        lambda: forward(torch.tensor(1.0), W, None, "gelu", False, False),
        lambda: backward(grad, X[:2], W, None, grad, "gelu", *flags),
        lambda: backward(grad, X, W[:4], None, grad, "gelu", *flags),
        lambda: backward(grad, X, W, None, grad[:2], "gelu", *flags),
        lambda: backward(grad, X, W, None, grad.half(), "gelu", *flags),
        lambda: backward(grad, None, None, None, None, "gelu", *flags),
        lambda: backward(grad, X, None, None, grad, "gelu", *flags),
        lambda: backward(grad, None, W, None, grad, "gelu", *flags),
        lambda: backward(torch.tensor(1.0), X, W, None, grad, "identity", *flags),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_every_activation_is_in_the_documentation():
    for name in reference.ACTIVATIONS:
        assert name in ops.linear_act.__doc__
