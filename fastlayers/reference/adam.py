"""Adam and AdamW in plain torch: lists of tensors, updated in place."""

import torch

from fastlayers.reference.philox import philox4x32_10


def adam_step(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    master_params,
    steps,
    lr_tensor,
    grad_scale,
    found_inf,
    grad_norm,
    rng,
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    max_grad_norm,
    decoupled_weight_decay,
    maximize,
):
    """Kingma & Ba 2015, arXiv:1412.6980; decoupled weight decay: Loshchilov & Hutter 2019, arXiv:1711.05101;
    amsgrad: Reddi et al. 2018. Arguments as in the native operator; float64 parameters are updated in float64."""
    for i, (param, grad, step) in enumerate(zip(params, grads, steps)):
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        skip = None if found_inf is None else found_inf.to(param.device).reshape(()) > 0
        step.copy_(_keep(step + 1, step, None if skip is None else skip.to(step.device)))
        t = step.to(param.device, torch.float64)
        rate = lr if lr_tensor is None else lr_tensor.to(param.device, torch.float64).reshape(())

        g = grad.to(wide)
        if grad_scale is not None:
            g = g / grad_scale.to(param.device)
            grad.copy_(_keep(g, grad, skip))
        if grad_norm is not None:
            g = g * (max_grad_norm / (grad_norm.to(param.device) + 1e-6)).clamp(max=1.0)
        g = -g if maximize else g
        source = master_params[i] if master_params else param
        p = source.to(wide)
        if weight_decay and not decoupled_weight_decay:
            g = g + weight_decay * p
        exp_avg = torch.lerp(exp_avgs[i].to(wide), g, 1 - beta1)
        exp_avg_sq = beta2 * exp_avg_sqs[i].to(wide) + (1 - beta2) * g * g
        second = exp_avg_sq
        if max_exp_avg_sqs:
            second = torch.maximum(max_exp_avg_sqs[i].to(wide), exp_avg_sq)
            max_exp_avg_sqs[i].copy_(_keep(second, max_exp_avg_sqs[i], skip))
        denominator = second.sqrt() / (1 - beta2**t).sqrt().to(wide) + eps
        if decoupled_weight_decay:
            p = p * _narrow(1 - rate * weight_decay, wide)
        p = p - _narrow(rate / (1 - beta1**t), wide) * (exp_avg / denominator)

        order = sorted(range(param.dim()), key=lambda d: -param.stride(d))
        streams = [(rng, order, 4 * i + role) for role in range(3)]
        if master_params:
            source.copy_(_keep(p, source, skip))
            param.copy_(_keep(p, param, skip))
        else:
            param.copy_(_keep(_round(p, param.dtype, streams[0]), param, skip))
        exp_avgs[i].copy_(_keep(_round(exp_avg, exp_avgs[i].dtype, streams[1]), exp_avgs[i], skip))
        exp_avg_sqs[i].copy_(_keep(_round(exp_avg_sq, exp_avg_sqs[i].dtype, streams[2]), exp_avg_sqs[i], skip))


def grad_norm(grads, grad_scale):
    """The 2-norm of all gradients together, divided by grad_scale: float32 (float64 for float64), 0-dimensional."""
    wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    squares = torch.stack([grad.to(wide).norm(dtype=torch.float64).square().to(grads[0].device) for grad in grads])
    norm = squares.sum().sqrt()
    return (norm if grad_scale is None else norm / grad_scale.to(norm.device).reshape(())).to(wide)


def _narrow(number, dtype):
    return number.to(dtype) if isinstance(number, torch.Tensor) else number


def _keep(value, old, skip):
    """`value` in the dtype of `old`, or `old` itself where `skip` (a 0-dimensional bool, or None) says so."""
    value = value.to(old.dtype)
    return value if skip is None else torch.where(skip, old, value)


def random_bits(rng, counter2, count):
    """(count,) int64 of 16 random bits each: the stream of csrc/adam/stochastic_rounding.h."""
    calls = torch.arange((count + 7) // 8, device=rng.device)
    seed, offset = rng[0], rng[1]
    low = 0xFFFFFFFF
    counters = torch.broadcast_tensors(calls & low, calls >> 32, torch.full_like(seed, counter2), offset & low)
    words = philox4x32_10(*counters, seed & low, (seed >> 32) & low)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten()[:count]


def _round(value, dtype, stream):
    """`value` rounded stochastically to what a 16-bit `dtype` can hold. stream: (rng, memory order, counter)."""
    rng, order, counter2 = stream
    if rng is None or dtype not in (torch.float16, torch.bfloat16):
        return value
    ordered = value.permute(order)
    random = random_bits(rng.to(value.device), counter2, value.numel()).view(ordered.shape)
    rounder = _round_to_bfloat16 if dtype == torch.bfloat16 else _round_to_float16
    rounded = rounder(ordered.contiguous(), random.to(torch.int32))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return rounded.permute(inverse)


def _round_to_bfloat16(value, random):
    rounded = ((value.view(torch.int32) + random) & -0x10000).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value)


def _round_to_float16(value, random):
    thirteen = random >> 3
    normal = ((value.view(torch.int32) + thirteen) & -0x2000).view(torch.float32)
    # Below 2^-14 the spacing of float16 is 2^-24 throughout.
    tiny = (value.abs() * 2**24 + thirteen / 8192).floor() * 2**-24
    rounded = torch.where(value.abs() < 2**-14, tiny.copysign(value), normal)
    return torch.where(value.abs() < 65504, rounded, value)
