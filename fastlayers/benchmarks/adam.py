"""FusedAdamW beside torch.optim.AdamW, its default and its fused form."""

import torch

from fastlayers import optim
from fastlayers.agreement import deviation
from fastlayers.benchmarks.runner import OURS, Candidate, Case

BYTES_PER_PARAMETER = 28  # float32: reads parameter, gradient and both moments, writes all but the gradient


def bert_base_shapes():
    """108 M parameters in 220 tensors: BERT-base's word embedding, 12 layers' matrices, and 147 vectors."""
    layer = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    vectors = [(3072,)] + [(768,)] * 11
    return [(30522, 768), *layer * 12, *vectors * 12, *[(768,)] * 3]


def _check(make):
    """Three steps of a few of the tensors, each beside torch's own steps in float64 and in float32."""
    shapes = [(768, 3072), (4096,), (768,), (1,), (31, 7)]
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(3)]

    def trained(make_optimizer, dtype):
        params = [tensor.to(dtype, copy=True).requires_grad_() for tensor in start]
        optimizer = make_optimizer(params)
        for step_grads in grads:
            for param, grad in zip(params, step_grads):
                param.grad = grad.to(dtype)
            optimizer.step()
        return params

    exact, eager = trained(torch.optim.AdamW, torch.float64), trained(torch.optim.AdamW, torch.float32)
    return max(map(deviation, trained(make, torch.float32), exact, eager), key=lambda found: found.ratio)


def _candidates(shapes, others):
    grads = [torch.randn(shape) for shape in shapes]

    def candidate(make):
        params = [torch.randn(shape, requires_grad=True) for shape in shapes]
        for param, grad in zip(params, grads):
            param.grad = grad
        return Candidate(step=make(params).step, check=lambda: _check(make))

    makers = {
        OURS: optim.FusedAdamW,
        "AdamW": torch.optim.AdamW,
        "AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
    }
    return {name: candidate(make) for name, make in makers.items() if name == OURS or name in others}


def _case(name, shapes, wanted):
    return Case(
        suite="adam",
        name=f"FusedAdamW step, float32, {name}",
        candidates=lambda: _candidates(shapes, wanted),
        targets=wanted,
        bytes=BYTES_PER_PARAMETER * sum(torch.Size(shape).numel() for shape in shapes),
    )


CASES = [
    _case("108 M parameters in 220 tensors", bert_base_shapes(), {"AdamW": 4.0, "AdamW(fused=True)": 1.0}),
    _case("2,000 tensors of 4,096", [(4096,)] * 2000, {"AdamW(fused=True)": 2.5}),
]
