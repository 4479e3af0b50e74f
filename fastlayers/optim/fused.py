"""What FusedAdam and FusedAdamW add to torch's classes: state in the wanted dtypes, and a step of one op per group."""

import sys

import torch

from fastlayers import ops
from fastlayers.optim.state import SIXTEEN_BITS, has_master, initial_state, moment_dtype, step_device


class FusedStep:
    def _set_extras(self, master_weights, dtype, stochastic_rounding, max_grad_norm):
        name = type(self).__name__
        if self.defaults["differentiable"]:
            raise ValueError(f"{name} does not support differentiable=True; use torch.optim.Adam")
        if dtype not in (None, torch.float32, *SIXTEEN_BITS):
            raise ValueError(f"{name}: moment_dtype has to be None, float32, float16 or bfloat16, got {dtype}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{name}: max_grad_norm has to be above 0, got {max_grad_norm}")
        self.defaults["master_weights"] = bool(master_weights)
        self.defaults["moment_dtype"] = dtype
        self.defaults["stochastic_rounding"] = bool(stochastic_rounding)
        self.max_grad_norm = max_grad_norm
        self._complete()

    def _complete(self):
        """What torch's constructor and __setstate__ leave out."""
        self._step_supports_amp_scaling = True
        self.grad_norm = None
        for group in self.param_groups:
            for key in ("master_weights", "moment_dtype", "stochastic_rounding"):
                group.setdefault(key, self.defaults[key])
            for param in group["params"]:
                step = self.state[param].get("step") if param in self.state else None
                if step is not None:
                    self.state[param]["step"] = torch.as_tensor(step, dtype=torch.float32, device=step_device(param))

    def __getstate__(self):
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._complete()

    def load_state_dict(self, state_dict):
        """As in torch, from torch's or our own; moments and masters keep more precision than the parameters."""
        super().load_state_dict(state_dict)
        saved_ids = (i for group in state_dict["param_groups"] for i in group["params"])
        for group in self.param_groups:
            for param, saved_id in zip(group["params"], saved_ids):
                if param in self.state:
                    self._restore(group, param, state_dict["state"][saved_id])

    def _restore(self, group, param, saved):
        """Take over the saved moments and masters in the dtypes that this group keeps them in."""
        state = self.state[param]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if key in saved:
                state[key] = saved[key].to(param.device, moment_dtype(group, param), copy=True)
        state.pop("master_param", None)
        if has_master(group, param):
            master = saved.get("master_param", param.detach())
            state["master_param"] = master.to(param.device, torch.float32, copy=True)

    def _states(self, group, params):
        """The state of each parameter; those that have none yet get theirs."""
        lacking = [param for param in params if not self.state[param]]
        if lacking:
            for key, tensors in initial_state(group, lacking).items():
                for param, tensor in tensors.items():
                    self.state[param][key] = tensor
        return [self.state[param] for param in params]

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns the closure's loss, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [batch for group in self.param_groups for batch in self._batches(group)]
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self.max_grad_norm is not None and batches:
            self.grad_norm = _total_norm([grads for _, _, grads, _ in batches], scale)
        for group, params, grads, states in batches:
            self._update(group, params, grads, states, scale, found_inf)
        return loss

    def _batches(self, group):
        """(group, params, grads, states) per device, with and without masters, of the parameters with a gradient."""
        params, grads = group["params"], [param.grad for param in group["params"]]
        if any(grad is None for grad in grads):
            params = [param for param in params if param.grad is not None]
            grads = [grad for grad in grads if grad is not None]
        states = self._states(group, params)
        if not group["master_weights"] and len({param.device for param in params}) == 1:
            return [(group, params, grads, states)]
        batches = {}
        for param, grad, state in zip(params, grads, states):
            batch = batches.setdefault((param.device, "master_param" in state), (group, [], [], []))
            for entries, entry in zip(batch[1:], (param, grad, state)):
                entries.append(entry)
        return list(batches.values())

    def _update(self, group, params, grads, states, scale, found_inf):
        local = _local if _any_dtensor(params) else _itself
        device = params[0].device

        def entries(key):
            return local([state[key] for state in states]) if key in states[0] else []

        def here(number):
            return number.to(device) if isinstance(number, torch.Tensor) else number

        ops.adam_step(
            local(params),
            local(grads),
            entries("exp_avg"),
            entries("exp_avg_sq"),
            entries("max_exp_avg_sq"),
            entries("step"),
            master_params=entries("master_param"),
            lr=here(group["lr"]) if device.type == "cpu" else group["lr"],
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            grad_scale=here(scale),
            found_inf=here(found_inf),
            grad_norm=here(self.grad_norm),
            max_grad_norm=self.max_grad_norm or float("inf"),
            rng=_draw_rng() if group["stochastic_rounding"] else None,
        )


def _draw_rng():
    """Seed and offset of this step's stochastic rounding, from torch's default generator."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)


def _any_dtensor(tensors):
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def _local(tensors):
    """This process's shards of distributed tensors."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def _itself(tensors):
    return tensors


def _total_norm(lists, scale):
    """The norm of all gradients of all lists together, divided by scale."""
    norms = []
    for grads in lists:
        if _any_dtensor(grads):
            norm = torch.nn.utils.get_total_norm(grads)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            norms.append(norm if scale is None else norm / scale.to(norm.device))
        else:
            norms.append(ops.grad_norm(grads, None if scale is None else scale.to(grads[0].device)))
    return norms[0] if len(norms) == 1 else torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
