"""The initial state of FusedAdam: moments, steps and masters in the layout of their parameters."""

import torch

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_POOLED = 65536  # elements; state of smaller parameters shares memory, so that thousands of them lie close together


def has_master(group, param):
    return group["master_weights"] and param.dtype in SIXTEEN_BITS


def moment_dtype(group, param):
    if param.dtype == torch.float64:
        return param.dtype
    return group["moment_dtype"] or (torch.float32 if has_master(group, param) else param.dtype)


def step_device(param):
    """Steps live on the CPU beside CPU parameters, else on the device, where a kernel can count them."""
    return torch.device("cpu") if param.device.type == "cpu" else param.device


def initial_state(group, params):
    """Key -> parameter -> tensor, for parameters that have no state yet."""
    moments = {"exp_avg": params, "exp_avg_sq": params, "max_exp_avg_sq": params if group["amsgrad"] else []}
    state = {key: _zeros_like(owners, [moment_dtype(group, p) for p in owners]) for key, owners in moments.items()}
    state["step"] = _zero_steps(params)
    masters = [param for param in params if has_master(group, param)]
    state["master_param"] = {param: param.detach().to(torch.float32, copy=True) for param in masters}
    return state


def _zero_steps(params):
    devices = {step_device(param) for param in params}
    owners = {device: [param for param in params if step_device(param) == device] for device in devices}
    return {p: s for device, ps in owners.items() for p, s in zip(ps, torch.zeros(len(ps), device=device).unbind())}


def _zeros_like(params, dtypes):
    """Zeros in the memory order of each parameter; small contiguous ones are slices of one tensor."""
    zeros, pools = {}, {}
    for param, dtype in zip(params, dtypes):
        if type(param) is torch.nn.Parameter and param.numel() <= _POOLED and param.is_contiguous():
            pools.setdefault((param.device, dtype), []).append(param)
        else:
            zeros[param] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    for (device, dtype), members in pools.items():
        sizes = [(param.numel() + 15) // 16 * 16 for param in members]  # each begins on a vector's boundary
        pool = torch.zeros(sum(sizes), dtype=dtype, device=device)
        for param, piece in zip(members, pool.split(sizes)):
            zeros[param] = piece[: param.numel()].view(param.shape)
    return zeros
