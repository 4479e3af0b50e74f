"""Linear + activation in one op, and the gated form, beside torch's own operations."""

from dataclasses import dataclass, replace

import torch

from fastlayers import backends, ops, reference
from fastlayers.benchmarks import others
from fastlayers.benchmarks.runner import Case, Place, Skip
from fastlayers.benchmarks.work import BOTH, FORWARD, Work, compiled, gather, our_makers

SUITE = "linear_act"
EAGER, COMPILED = "PyTorch eager", "torch.compile"
SMALL_TOKENS = 256  # of the check


@dataclass(frozen=True)
class Layer:
    """The first half of a transformer's feed-forward block; with `gated` two products of the same size."""

    model: str
    activation: str
    in_features: int
    out_features: int
    gated: bool = False

    @property
    def weights(self):
        return self.in_features * self.out_features * (2 if self.gated else 1)


LAYERS = {
    "cpu": (
        Layer("BERT-base", "gelu", 768, 3072),
        Layer("GPT-2 medium", "gelu_tanh", 1024, 4096),
        Layer("Llama 1B", "silu", 2048, 5632, gated=True),
    ),
    "cuda": (
        Layer("BERT-large", "gelu", 1024, 4096),
        Layer("GPT-2 XL", "gelu_tanh", 1600, 6400),
        Layer("Llama 8B", "silu", 4096, 14336, gated=True),
    ),
}
TOKENS = {"cpu": (1, 16, 128, 1024), "cuda": (1, 16, 256, 4096, 16384)}
BERT_LARGE = LAYERS["cuda"][0]
TARGETS = [  # on CPU, float32: layer, tokens, and how many times as fast as eager it has to be
    (LAYERS["cpu"][0], 2048, 1.15),
    (BERT_LARGE, 4096, 1.15),
]


@dataclass(frozen=True)
class Call:
    device: str
    dtype: str
    layer: Layer
    tokens: int


def cases(setting):
    if setting.device == "cpu" and "float32" in setting.dtypes:
        for layer, tokens, wanted in TARGETS:
            call = Call("cpu", "float32", layer, tokens)
            yield _case(setting, call, FORWARD, Place(), {EAGER: wanted})
    for dtype in setting.dtypes:
        for layer in LAYERS[setting.device]:
            for passes in (FORWARD, BOTH):
                for tokens in TOKENS[setting.device]:
                    gated = ", gated" if layer.gated else ""
                    line = f"{layer.activation}{gated}, {layer.model}"
                    place = Place(f"linear+{line}, {dtype}", f"{line}, {passes}, {dtype}", "tokens", tokens)
                    yield _case(setting, Call(setting.device, dtype, layer, tokens), passes, place)


def _case(setting, call, passes, place, targets=None):
    layer, products = call.layer, 1 if passes == FORWARD else 3
    outer = call.tokens * (layer.in_features + layer.out_features)
    kind = "gated linear" if layer.gated else "linear"
    sizes = f"{call.tokens} x {layer.in_features} x {layer.out_features}"
    return Case(
        suite=SUITE,
        name=f"{kind}+{layer.activation} {passes}, {call.dtype}, {sizes}",
        candidates=lambda: _candidates(setting, call, passes),
        targets=targets or {},
        flops=2 * call.tokens * layer.weights * products,
        bytes=(outer + layer.weights) * getattr(torch, call.dtype).itemsize * (1 if passes == FORWARD else 2),
        place=place,
        dtype=call.dtype,
        setting=setting,
    )


def inputs(call):
    """(input, weight, bias) or (input, weight_gate, weight_up), and the gradient of the output."""
    layer = call.layer
    shape, scale = (layer.out_features, layer.in_features), layer.in_features**-0.5
    tensors = [torch.randn(call.tokens, layer.in_features), torch.randn(shape) * scale]
    tensors.append(torch.randn(shape) * scale if layer.gated else torch.randn(layer.out_features))
    tensors.append(torch.randn(call.tokens, layer.out_features))
    *tensors, dout = (tensor.to(call.device, getattr(torch, call.dtype)) for tensor in tensors)
    return tensors, dout


def eager(call):
    function = reference.gated_linear_act if call.layer.gated else reference.linear_act
    return lambda *tensors: function(*tensors, activation=call.layer.activation)


def ours(call, backend=None):
    function = ops.gated_linear_act if call.layer.gated else ops.linear_act
    return lambda *tensors: function(*tensors, activation=call.layer.activation, backend=backend)


def _candidates(setting, call, passes):
    layer = call.layer
    small = replace(call, tokens=min(call.tokens, SMALL_TOKENS))
    elements = call.tokens * (layer.in_features + layer.out_features) + layer.weights
    work = Work(setting, passes, call, small, inputs, eager, elements * getattr(torch, call.dtype).itemsize)
    op = "gated_linear_act" if layer.gated else "linear_act"
    facts = backends.facts(op, *inputs(small)[0])
    makers = our_makers(op, facts, lambda backend: work.candidate(lambda one: ours(one, backend)))
    makers[EAGER] = lambda: work.candidate(eager)
    makers[COMPILED] = lambda: _compiled(work, call)
    if layer.gated:
        makers |= others.makers(others.GATED, work.candidate)
    return gather(makers)


def _compiled(work, call):
    if call.device == "cpu" and call.tokens < TOKENS["cpu"][-1]:
        raise Skip(f"compiling takes seconds: on a CPU only from {TOKENS['cpu'][-1]} tokens on")
    return work.candidate(lambda one: compiled(eager(one), one.device))
