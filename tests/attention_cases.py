"""Inputs and the one comparison that every attention test makes: out, lse and each gradient by the tolerance rule."""

import torch

from tests.backends import has_wide_float32_gradients, placed
from tests.numerics import assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def qkv(dtype, batch=2, heads_q=4, heads_k=None, seqlen_q=65, seqlen_k=None, head_dim=32, head_dim_v=None):
    """(B, H, S, D) each, contiguous."""
    heads_k, seqlen_k, head_dim_v = heads_k or heads_q, seqlen_k or seqlen_q, head_dim_v or head_dim
    query = randn(batch, heads_q, seqlen_q, head_dim, dtype=dtype, seed=1)
    key = randn(batch, heads_k, seqlen_k, head_dim, dtype=dtype, seed=2)
    return query, key, randn(batch, heads_k, seqlen_k, head_dim_v, dtype=dtype, seed=3)


def run(function, tensors, options, double=False):
    """{name: tensor} of out, lse and the gradient of every differentiable tensor among `tensors`."""
    leaves, options = {}, placed(options)
    for name, tensor in placed(tensors).items():
        if tensor.is_floating_point():
            tensor = tensor.double() if double else tensor.detach()
            tensor.requires_grad_(name != "alibi_slopes")
        leaves[name] = tensor
    out, lse = function(**leaves, **options, return_lse=True)
    results = {"out": out, "lse": lse}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if wanted and torch.is_grad_enabled():
        upstream = [randn(*result.shape, seed=seed).to(result.dtype) for seed, result in ((4, out), (5, lse))]
        if double:  # the very numbers that the tested dtype sees
            upstream = [
                grad.to(tensors["query"].dtype if i == 0 else torch.float32).double() for i, grad in enumerate(upstream)
            ]
        grads = torch.autograd.grad([out, lse], list(wanted.values()), upstream)
        results.update({f"d{name}": grad for name, grad in zip(wanted, grads)})
    return results


def check(function, tensors, backend, what="", eager=None, **options):
    """Assert the rule for function(**tensors, **options, backend=backend); `eager` is the reference by default."""
    wide = max(tensors["query"].shape[-1], tensors.get("value", tensors["query"]).shape[-1]) > 128
    if wide and tensors["query"].dtype == torch.float32 and not has_wide_float32_gradients(backend):
        with torch.no_grad():
            return compare(function, tensors, backend, what, eager, options)
    return compare(function, tensors, backend, what, eager, options)


def compare(function, tensors, backend, what, eager, options):
    ours = run(function, tensors, {**options, "backend": backend})
    exact = run(function, tensors, {**options, "backend": "reference"}, double=True)
    eager = run(function, tensors, {**options, "backend": "reference"}) if eager is None else eager
    for name in ours:
        assert_accurate(ours[name], exact[name], eager[name], f"{what} {name}")
    return ours
