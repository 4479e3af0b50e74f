"""The activation formulas themselves, over all of float32's range, against torch in float64."""

import pytest
import torch

from fastlayers import ops, reference
from tests.backends import BACKENDS, SIMULATED
from tests.numerics import assert_accurate

ACTIVATIONS = tuple(reference.ACTIVATIONS)
BACKEND = pytest.mark.parametrize("backend", BACKENDS["linear_act"])


def grids(backend):
    """Values of one magnitude each, so that the rule's scale is theirs: dense, tiny, and far out."""
    points = 20001 if backend == "cpu" or not SIMULATED else 1001
    for limit in (1e-30, 1e-3, 0.1, 1.0, 4.0, 10.0, 30.0):
        yield torch.linspace(-limit, limit, points).view(-1, 1)
    far = torch.logspace(-38, 10, points // 4 + 1)
    yield torch.cat([-far, far]).view(-1, 1)


@BACKEND
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_slope(backend, activation):
    plain = reference.ACTIVATIONS[activation]
    for grid in grids(backend):
        x = grid.clone().requires_grad_()
        ours = ops.linear_act(x, torch.ones(1, 1), activation=activation, backend=backend)
        (slope,) = torch.autograd.grad(ours.sum(), x)
        exact = grid.double().requires_grad_()
        (exact_slope,) = torch.autograd.grad(plain(exact).sum(), exact)
        eager = grid.clone().requires_grad_()
        (eager_slope,) = torch.autograd.grad(plain(eager).sum(), eager)
        what = f"{activation} up to {grid.max():.0e}"
        assert_accurate(ours, plain(exact), plain(eager), f"{what}: value")
        assert_accurate(slope, exact_slope, eager_slope, f"{what}: slope")


@BACKEND
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope_at_special_values(backend, activation):
    """Kinks as in torch; NaN stays NaN; a slope is never NaN where torch's is a number."""
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 50.0, -50.0, 1e5, -1e5, float("nan")]).view(-1, 1)
    ours, eager = values.clone().requires_grad_(), values.clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        ops.linear_act(ours, torch.ones(1, 1), activation=activation, backend=backend).sum(), ours
    )
    (wanted,) = torch.autograd.grad(reference.ACTIVATIONS[activation](eager).sum(), eager)
    if activation == "relu":
        wanted[-1] = float("nan") if slope[-1].isnan() else wanted[-1]  # torch's relu'(NaN) is a convention
    torch.testing.assert_close(slope, wanted, equal_nan=True)


@BACKEND
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lanes_do_not_matter(backend, activation):
    """The same value gives the same bits wherever in a row it stands, whole vectors and tails alike."""
    for count in (1, 7, 8, 15, 16, 17, 47, 48, 49, 100):
        out = ops.linear_act(torch.full((3, 1), 0.7), torch.ones(count, 1), activation=activation, backend=backend)
        assert (out == out[0, 0]).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS["linear_act"] if name == "cpu"])
def test_what_would_be_subnormal_is_0(backend):
    """Of exponentials, exp(-x^2 / 2) here: to make such a number, or to lose it, costs some CPUs a hundred cycles."""
    x = torch.tensor([-5.0, -13.5, -14.0, -20.0]).view(-1, 1).requires_grad_()
    (slope,) = torch.autograd.grad(ops.linear_act(x, torch.ones(1, 1), activation="gelu", backend=backend).sum(), x)
    assert slope[0] != 0 and (slope[1:] == 0).all()
