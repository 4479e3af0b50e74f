"""Training a few tensors with our optimizers and with torch's, and comparing the two."""

import torch

from fastlayers.optim import FusedAdam, FusedAdamW
from tests.numerics import assert_accurate

PAIRS = [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)]
SHAPES = [(17, 9), (5,), (0, 3), (2, 3, 4, 5)]


def model(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def like(params, dtype=None):
    return [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def train(optimizer, params, steps=4, seed=1):
    """The same gradients whatever the dtype: random numbers that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


def assert_trains_like_torch(ours, theirs, dtype=torch.float32, ours_options=None, **options):
    params = model(dtype)
    exact, eager = like(params, torch.float64), like(params)
    exact = train(theirs(exact, **options, foreach=False), exact)
    eager = train(theirs(eager, **options, foreach=False), eager)
    assert_accurate(train(ours(params, **options, **(ours_options or {})), params), exact, eager)
