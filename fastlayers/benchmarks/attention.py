"""Attention beside torch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F

from fastlayers import ops
from fastlayers.agreement import deviation
from fastlayers.benchmarks.runner import OURS, Candidate, Case, Rotation

# Floating-point operations of the products alone, per (query, key) pair and head-dimension element: q k and p v in the
# forward; those of the recomputed scores, dv, dp, dq and dk in the backward.
FORWARD, FORWARD_BACKWARD = 4, 14


def _shape_name(batch, heads, seqlen, head_dim):
    return f"B{batch} H{heads} S{seqlen} D{head_dim}"


def _inputs(shape, dtype, backward):
    """query, key, value and the gradient of the output."""
    tensors = [torch.randn(shape).to(dtype) for _ in range(4)]
    return [tensor.requires_grad_(backward) for tensor in tensors[:3]] + tensors[3:]


def _step(attend, inputs, backward, **options):
    query, key, value, dout = inputs
    with torch.set_grad_enabled(backward):
        out = attend(query, key, value, **options)
        return (out, *torch.autograd.grad(out, (query, key, value), dout)) if backward else (out,)


def _worst(ours, exact, eager):
    return max(map(deviation, ours, exact, eager), key=lambda found: found.ratio)


def _candidates(shape, dtype, backward, is_causal, dropout_p):
    elements = torch.Size(shape).numel()
    inputs = Rotation(lambda: _inputs(shape, dtype, backward), 4 * elements * dtype.itemsize)
    options = {"is_causal": is_causal, "dropout_p": dropout_p}

    def check(attend, **extra):
        """Without dropout both are compared; with dropout ours alone, under a fixed mask."""
        small = [tensor[:1, :2] for tensor in inputs.items[0]]
        exact_inputs = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in small]
        exact = _step(ops.attention, exact_inputs, backward, **options, **extra, backend="reference")
        eager = _step(ops.attention, small, backward, **options, **extra, backend="reference")
        return _worst(_step(attend, small, backward, **options, **extra), exact, eager)

    rng = {"dropout_rng": torch.tensor([7, 0])} if dropout_p else {}
    return {
        OURS: Candidate(
            step=lambda: _step(ops.attention, next(inputs), backward, **options),
            check=lambda: check(ops.attention, **rng),
        ),
        "sdpa": Candidate(
            step=lambda: _step(F.scaled_dot_product_attention, next(inputs), backward, **options),
            check=None if dropout_p else lambda: check(F.scaled_dot_product_attention),
        ),
    }


def _case(shape, dtype, *, backward, is_causal=False, dropout_p=0.0, wanted):
    batch, heads, seqlen, head_dim = shape
    pairs = batch * heads * (seqlen * (seqlen + 1) // 2 if is_causal else seqlen * seqlen)
    tensors = 8 if backward else 4  # query, key, value, out, and their gradients
    name = ", ".join(
        [
            "forward+backward" if backward else "forward",
            str(dtype).removeprefix("torch."),
            _shape_name(*shape),
            *(["causal"] if is_causal else []),
            *([f"dropout {dropout_p}"] if dropout_p else []),
        ]
    )
    return Case(
        suite="attention",
        name=name,
        candidates=lambda: _candidates(shape, dtype, backward, is_causal, dropout_p),
        targets={"sdpa": wanted},
        flops=pairs * head_dim * (FORWARD_BACKWARD if backward else FORWARD),
        bytes=tensors * batch * heads * seqlen * head_dim * dtype.itemsize,
    )


CASES = [
    _case((1, 12, 2048, 64), torch.float32, backward=False, wanted=1.2),
    _case((1, 12, 2048, 64), torch.float32, backward=False, is_causal=True, wanted=1.2),
    _case((1, 12, 2048, 64), torch.bfloat16, backward=True, wanted=1.5),
    _case((1, 12, 2048, 64), torch.bfloat16, backward=True, is_causal=True, wanted=1.5),
    _case((8, 12, 512, 32), torch.float32, backward=True, dropout_p=0.1, wanted=4.0),
]
