"""FusedAdam and FusedAdamW: torch's optimizers, with the whole step of a parameter group in one kernel call."""

import torch

from fastlayers.optim.fused import FusedStep


class FusedAdam(FusedStep, torch.optim.Adam):
    """torch.optim.Adam in one kernel per parameter group.

    Takes torch's arguments in torch's order; loads and writes torch's state_dict. `foreach` and `fused` are accepted
    and change nothing; `differentiable` is refused. Extras, the first three also as keys of a parameter group:

    master_weights: update float32 copies of 16-bit parameters, kept in the state as "master_param"
    moment_dtype: dtype of exp_avg and exp_avg_sq; None: the parameter's, or float32 with master weights
    stochastic_rounding: round 16-bit parameters (without masters) and moments stochastically, seeded by torch
    max_grad_norm: clip the norm of all gradients together as torch.nn.utils.clip_grad_norm_ does, without rewriting
        them; `grad_norm` then holds the norm that the last step found
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0,
        amsgrad=False,
        *,
        foreach=None,
        maximize=False,
        capturable=False,
        differentiable=False,
        fused=None,
        decoupled_weight_decay=False,
        master_weights=False,
        moment_dtype=None,
        stochastic_rounding=False,
        max_grad_norm=None,
    ):
        torch_options = dict(foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable)
        torch_options.update(fused=fused, decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **torch_options)
        self._set_extras(master_weights, moment_dtype, stochastic_rounding, max_grad_norm)


class FusedAdamW(FusedStep, torch.optim.AdamW):
    """torch.optim.AdamW in one kernel per parameter group; the arguments beyond torch's are those of FusedAdam."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        amsgrad=False,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        master_weights=False,
        moment_dtype=None,
        stochastic_rounding=False,
        max_grad_norm=None,
    ):
        torch_options = dict(foreach=foreach, maximize=maximize, capturable=capturable, differentiable=differentiable)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, fused=fused, **torch_options)
        self._set_extras(master_weights, moment_dtype, stochastic_rounding, max_grad_norm)
