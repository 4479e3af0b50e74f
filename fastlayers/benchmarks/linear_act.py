"""Linear + GELU in one op beside torch's two."""

import torch
import torch.nn.functional as F

from fastlayers import ops
from fastlayers.agreement import deviation
from fastlayers.benchmarks.runner import OURS, Candidate, Case, Rotation


def _inputs(tokens, in_features, out_features, dtype):
    tensors = (
        torch.randn(tokens, in_features),
        torch.randn(out_features, in_features) * in_features**-0.5,
        torch.randn(out_features),
    )
    return [tensor.to(dtype) for tensor in tensors]


def _eager(input, weight, bias):
    return F.gelu(F.linear(input, weight, bias))


def _candidates(tokens, in_features, out_features, dtype):
    elements = tokens * in_features + out_features * (in_features + 1)
    inputs = Rotation(lambda: _inputs(tokens, in_features, out_features, dtype), elements * dtype.itemsize)

    def candidate(function):
        @torch.no_grad()
        def step():
            return function(*next(inputs))

        @torch.no_grad()
        def check():
            small, weight, bias = inputs.items[0]
            small = small[:256]
            exact = _eager(small.double(), weight.double(), bias.double())
            return deviation(function(small, weight, bias), exact, _eager(small, weight, bias))

        return Candidate(step, check)

    return {OURS: candidate(ops.linear_act), "F.gelu(F.linear)": candidate(_eager)}


def _case(tokens, in_features, out_features, dtype=torch.float32, *, wanted):
    return Case(
        suite="linear_act",
        name=f"linear+gelu forward, {str(dtype).removeprefix('torch.')}, {tokens} x {in_features} x {out_features}",
        candidates=lambda: _candidates(tokens, in_features, out_features, dtype),
        targets={"F.gelu(F.linear)": wanted},
        flops=2 * tokens * in_features * out_features,
        bytes=(tokens * in_features + out_features * (in_features + 1) + tokens * out_features) * dtype.itemsize,
    )


CASES = [_case(2048, 768, 3072, wanted=1.15), _case(4096, 1024, 4096, wanted=1.15)]
