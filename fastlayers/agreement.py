"""The one rule of what counts as correct, used by the tests, by `fastlayers verify` and by `train --compare`.

With `exact` the reference in float64 on the same inputs and `eager` plain torch in the tested dtype:

    max|ours - exact| <= 2 max|eager - exact| + eps max|exact|     and the same for the root mean square.
"""

from dataclasses import dataclass

import torch

FACTOR = 2.0


@dataclass
class Deviation:
    """How far one tensor is from exact. `ratio` is the larger of error / bound over max and rms: ok is <= 1."""

    ratio: float
    problem: str | None

    @property
    def ok(self):
        return self.problem is None


def _max_and_rms(values):
    return values.abs().max().item(), values.square().mean().sqrt().item()


def deviation(ours, exact, eager, dtype=None):
    """Compare one tensor by the rule. Infinities and NaNs have to stand exactly where eager has them.

    ours, eager: same shape and dtype; exact: same shape, float64
    dtype:       the tested dtype, where it is not that of the tensors (mixed precision keeps results in float32)
    """
    if ours.shape != exact.shape or ours.dtype != eager.dtype:
        wanted, came = f"{tuple(exact.shape)} {eager.dtype}", f"{tuple(ours.shape)} {ours.dtype}"
        return Deviation(float("inf"), f"shape and dtype {came}, wanted {wanted}")
    if ours.numel() == 0:
        return Deviation(0.0, None)
    ours, exact, eager = ours.detach().cpu(), exact.detach().cpu().double(), eager.detach().cpu()
    finite = torch.isfinite(eager) & torch.isfinite(exact)
    special_ours, special_eager = ours[~finite], eager[~finite]
    same = (special_ours == special_eager) | (special_ours.isnan() & special_eager.isnan())
    if not same.all():
        return Deviation(float("inf"), f"infinities or NaNs differ from eager in {(~same).sum().item()} places")
    if not finite.any():
        return Deviation(0.0, None)
    ours, exact, eager = ours[finite], exact[finite], eager[finite]
    if not torch.isfinite(ours).all():
        return Deviation(float("inf"), f"{(~torch.isfinite(ours)).sum().item()} values are not finite")
    eps = torch.finfo(dtype or eager.dtype).eps
    worst = Deviation(0.0, None)
    errors, allowances = _max_and_rms(ours.double() - exact), _max_and_rms(eager.double() - exact)
    for name, error, allowance, scale in zip(("max", "rms"), errors, allowances, _max_and_rms(exact)):
        bound = FACTOR * allowance + eps * scale
        ratio = error / bound if bound else (float("inf") if error else 0.0)
        problem = f"{name} error {error:.3e} > {bound:.3e} (eager's own {allowance:.3e}, scale {scale:.3e})"
        if ratio > worst.ratio:
            worst = Deviation(ratio, problem if ratio > 1 else None)
    return worst
