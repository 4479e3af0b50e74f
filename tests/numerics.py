"""The one tolerance rule of this project.

With `exact` the reference in float64 on the same inputs and `eager` plain torch in the tested dtype:

    max|ours - exact| <= 2 max|eager - exact| + eps max|exact|     and the same for the root mean square.
"""

import torch

FACTOR = 2.0


def _errors(value, exact):
    difference = (value.double() - exact).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def assert_accurate(ours, exact, eager, what="result"):
    """Assert the rule for one tensor. Infinities and NaNs have to stand exactly where eager has them."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, wanted {tuple(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{what}: dtype {ours.dtype}, wanted {eager.dtype}"
    if ours.numel() == 0:
        return
    ours, exact, eager = ours.detach(), exact.detach().double(), eager.detach()
    finite = torch.isfinite(eager) & torch.isfinite(exact)
    special_ours, special_eager = ours[~finite], eager[~finite]
    same = (special_ours == special_eager) | (special_ours.isnan() & special_eager.isnan())
    assert same.all(), f"{what}: infinities or NaNs differ from eager in {(~same).sum().item()} places"
    if not finite.any():
        return
    ours, exact, eager = ours[finite], exact[finite], eager[finite]
    assert torch.isfinite(ours).all(), f"{what}: {(~torch.isfinite(ours)).sum().item()} non-finite values"
    eps = torch.finfo(eager.dtype).eps
    scales = (exact.abs().max().item(), exact.square().mean().sqrt().item())
    for name, error, allowed, scale in zip(("max", "rms"), _errors(ours, exact), _errors(eager, exact), scales):
        bound = FACTOR * allowed + eps * scale
        assert error <= bound, (
            f"{what}: {name} error {error:.3e} > {bound:.3e} (eager's own {allowed:.3e}, scale {scale:.3e})"
        )
