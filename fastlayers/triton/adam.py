"""Adam and AdamW in Triton: one launch for all tensors of the same dtypes, driven by a table of pointers."""

import torch
import triton
import triton.language as tl

from fastlayers.triton.arithmetic import narrow

_BLOCK = 2048  # elements per program: 8 per thread
_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _random16(seed, offset, counter2, n):
    """16 random bits for element n: the stream of csrc/adam/stochastic_rounding.h."""
    call = n // 8
    low = (call & 0xFFFFFFFF).to(tl.uint32)
    high = (call >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + counter2.to(tl.uint32), zero + offset.to(tl.uint32))
    slot = (n % 8).to(tl.int32)
    word = tl.where(slot < 4, tl.where(slot < 2, w0, w1), tl.where(slot < 6, w2, w3)).to(tl.uint32)
    return tl.where(slot % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)


@triton.jit
def _round(x, random, DTYPE: tl.constexpr):
    """x rounded stochastically to what a 16-bit DTYPE can hold, still float32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.abs(x)
    if DTYPE == tl.bfloat16:  # noqa: SIM300 (a dtype, not a constant)
        rounded = ((bits + random) & -0x10000).to(tl.float32, bitcast=True)
        return tl.where((bits & 0x7F800000) != 0x7F800000, rounded, x)
    thirteen = random >> 3
    normal = ((bits + thirteen) & -0x2000).to(tl.float32, bitcast=True)
    tiny = tl.floor(magnitude * 16777216.0 + thirteen.to(tl.float32) / 8192.0) / 16777216.0
    tiny = tl.where(x < 0, -tiny, tiny)
    rounded = tl.where(magnitude < 6.103515625e-05, tiny, normal)
    return tl.where(magnitude < 65504.0, rounded, x)


@triton.jit
def _store(pointer, x, n, mask, seed, offset, counter2, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    if STOCHASTIC and DTYPE != tl.float32:  # noqa: SIM300
        x = _round(x, _random16(seed, offset, counter2, n), DTYPE)
    tl.store(pointer + n, narrow(x, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["seed", "offset"])  # a 1 would become a constant
def _adam_kernel(
    table,  # (tensors, 8) int64: pointers of param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master; numel; index
    blocks,  # (grid, 2) int64: tensor, first element
    rates,  # (tensors, 2) float32: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    scalars,  # (9,) float32: 1 - beta1, beta2, 1 - beta2, eps, l2, decay, grad scale, grad factor, found_inf
    seed,
    offset,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    MOMENT_SQ: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr,
    STORE_GRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m += (1 - b1)(g - m); v = b2 v + (1 - b2) g^2; p = p decay - rate m / (sqrt(v) correction + eps)."""
    if tl.load(scalars + 8) > 0:
        return
    tensor = tl.load(blocks + 2 * tl.program_id(0))
    row = table + 8 * tensor
    n = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK).to(tl.int64)
    mask = n < tl.load(row + 6)
    index = tl.load(row + 7)

    param_at = tl.load(row).to(tl.pointer_type(PARAM))
    grad_at = tl.load(row + 1).to(tl.pointer_type(GRAD))
    exp_avg_at = tl.load(row + 2).to(tl.pointer_type(MOMENT))
    exp_avg_sq_at = tl.load(row + 3).to(tl.pointer_type(MOMENT_SQ))
    max_at = tl.load(row + 4).to(tl.pointer_type(MOMENT_SQ))
    master_at = tl.load(row + 5).to(tl.pointer_type(tl.float32))

    if MASTER:  # noqa: SIM108 (a branch at compile time)
        param = tl.load(master_at + n, mask=mask)
    else:
        param = tl.load(param_at + n, mask=mask).to(tl.float32)
    grad = tl.load(grad_at + n, mask=mask).to(tl.float32) * tl.load(scalars + 6)
    if STORE_GRAD:
        tl.store(grad_at + n, narrow(grad, GRAD), mask=mask)
    grad = grad * tl.load(scalars + 7)
    l2 = tl.load(scalars + 4)
    if l2 != 0:
        grad = grad + l2 * param
    exp_avg = tl.load(exp_avg_at + n, mask=mask).to(tl.float32)
    weight = tl.load(scalars)
    toward = grad - exp_avg
    exp_avg = tl.where(weight < 0.5, exp_avg + weight * toward, grad + (weight - 1) * toward)
    exp_avg_sq = tl.load(exp_avg_sq_at + n, mask=mask).to(tl.float32)
    exp_avg_sq = tl.load(scalars + 1) * exp_avg_sq + tl.load(scalars + 2) * grad * grad
    square = exp_avg_sq
    if AMSGRAD:
        highest = tl.load(max_at + n, mask=mask).to(tl.float32)
        square = tl.where(highest > exp_avg_sq, highest, exp_avg_sq)
        tl.store(max_at + n, narrow(square, MOMENT_SQ), mask=mask)
    denominator = tl.sqrt_rn(square) * tl.load(rates + 2 * tensor + 1) + tl.load(scalars + 3)
    step = tl.load(rates + 2 * tensor) * tl.div_rn(exp_avg, denominator)
    param = param * tl.load(scalars + 5) - step

    if MASTER:
        tl.store(master_at + n, param, mask=mask)
    _store(param_at, param, n, mask, seed, offset, 4 * index, PARAM, STOCHASTIC and not MASTER)
    _store(exp_avg_at, exp_avg, n, mask, seed, offset, 4 * index + 1, MOMENT, STOCHASTIC)
    _store(exp_avg_sq_at, exp_avg_sq, n, mask, seed, offset, 4 * index + 2, MOMENT_SQ, STOCHASTIC)


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
    """The native operator's arguments. Nothing is read back from the device."""
    device = params[0].device
    lists = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, master_params]

    def number(value):
        return torch.as_tensor(value, dtype=torch.float64, device=device).reshape(())

    skip = number(0.0 if found_inf is None else found_inf)
    for step in steps:
        step += (skip <= 0).to(step.device, step.dtype)
    rate = number(lr if lr_tensor is None else lr_tensor)
    counts = torch.stack([step.to(device, torch.float64).reshape(()) for step in steps])
    rates = torch.stack([rate / (1 - beta1**counts), (1 - beta2**counts).rsqrt()], dim=1).float()
    clip = number(1.0) if grad_norm is None else (max_grad_norm / (number(grad_norm) + 1e-6)).clamp(max=1.0)
    decay, l2 = (1 - rate * weight_decay, 0.0) if decoupled_weight_decay else (1.0, weight_decay)
    scale = 1.0 if grad_scale is None else 1 / number(grad_scale)
    values = [1 - beta1, beta2, 1 - beta2, eps, l2, decay, scale, -clip if maximize else clip, skip]
    scalars = torch.stack([number(value) for value in values]).float()
    seed, offset = (0, 0) if rng is None else (int(rng[0]), int(rng[1]) & 0xFFFFFFFF)
    flags = {
        "AMSGRAD": bool(max_exp_avg_sqs),
        "MASTER": bool(master_params),
        "STORE_GRAD": grad_scale is not None,
        "STOCHASTIC": rng is not None,
    }

    groups = {}
    for index, param in enumerate(params):
        if param.numel():
            operands = [tensors[index] if tensors else None for tensors in lists]
            groups.setdefault(tuple(t.dtype for t in operands[:4]), []).append((index, operands))
    for dtypes, members in groups.items():
        _launch(members, dtypes, rates, scalars, seed, offset, flags, device)


def _launch(members, dtypes, rates, scalars, seed, offset, flags, device):
    """One launch for tensors of the same dtypes."""
    rows, blocks, copies = [], [], []
    for place, (index, operands) in enumerate(members):
        dense = [_in_memory_order(t, operands[0]) for t in operands]
        copies += [pair for pair in zip(operands, dense) if pair[0] is not None and pair[1][0] is not pair[1][1]]
        numel = operands[0].numel()
        rows.append([0 if t is None else d[0].data_ptr() for t, d in zip(operands, dense)] + [numel, index])
        blocks += [[place, first] for first in range(0, numel, _BLOCK)]
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    plan = torch.tensor(blocks, dtype=torch.int64).to(device, non_blocking=True)
    mine = rates[torch.tensor([index for index, _ in members], device=device)].contiguous()
    kinds = dict(zip(("PARAM", "GRAD", "MOMENT", "MOMENT_SQ"), (_TRITON[dtype] for dtype in dtypes)))
    _adam_kernel[(len(blocks),)](table, plan, mine, scalars, seed, offset, **kinds, **flags, BLOCK=_BLOCK, num_warps=8)
    for _, (dense, view) in copies:
        if not _overlaps(view):
            view.copy_(dense)


def _in_memory_order(tensor, param):
    """(dense, view): the elements in the order in which the parameter has them in memory; the same object where
    the tensor is dense in that order already."""
    if tensor is None:
        return None
    view = tensor.permute(sorted(range(param.dim()), key=lambda d: -param.stride(d)))
    return (view, view) if view.is_contiguous() else (view.contiguous(), view)


def _overlaps(view):
    return any(stride == 0 and size > 1 for stride, size in zip(view.stride(), view.shape))
