"""Adam and AdamW in Triton: one launch for all tensors of the same dtypes, driven by a table of pointers.

The host's work grows with the number of tensors, not with their sizes: the device finds out which program works where.
"""

import math

import torch
import triton
import triton.language as tl

from fastlayers.triton.arithmetic import narrow

_WARPS = 8
_VECTOR = 16  # bytes of the widest access, whose alignment the wide kernel takes for granted
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


@triton.jit
def _pointer(row, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to DTYPE that is kept at row."""
    pointer = tl.load(row).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["seed", "offset"])  # a 1 would become a constant
def _adam_kernel(
    table,  # (tensors, 10) int64: pointers of param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, then: numel,
    # the tensor's index in the call, its first program, its number of programs
    plan,  # (grid,) int64: the row of the tensor that a program works on
    rates,  # (tensors in the call, 2) float32: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
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
    ALIGNED: tl.constexpr,  # whether all pointers and numels are multiples of 16
    BLOCK: tl.constexpr,
):
    """m += (1 - b1)(g - m); v = b2 v + (1 - b2) g^2; p = p decay - rate m / (sqrt(v) correction + eps)."""
    if tl.load(scalars + 8) > 0:
        return
    program = tl.program_id(0)
    row = table + 10 * tl.load(plan + program)
    numel = tl.load(row + 6)
    index = tl.load(row + 7)
    n = (program - tl.load(row + 8)) * BLOCK + tl.arange(0, BLOCK)
    if ALIGNED:  # the mask, too, must be known to be the same for all elements of a vector
        numel = tl.multiple_of(numel, 16)
    mask = n < numel

    param_at = _pointer(row, PARAM, ALIGNED)
    grad_at = _pointer(row + 1, GRAD, ALIGNED)
    exp_avg_at = _pointer(row + 2, MOMENT, ALIGNED)
    exp_avg_sq_at = _pointer(row + 3, MOMENT_SQ, ALIGNED)
    max_at = _pointer(row + 4, MOMENT_SQ, ALIGNED)
    master_at = _pointer(row + 5, tl.float32, ALIGNED)

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
    denominator = tl.sqrt_rn(square) * tl.load(rates + 2 * index + 1) + tl.load(scalars + 3)
    step = tl.load(rates + 2 * index) * tl.div_rn(exp_avg, denominator)
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
    """The native operator's arguments. The host reads nothing from the device (but found_inf, if it counts the steps)
    and does not wait for it."""
    device = params[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("adam_step: a CUDA graph would replay with the pointers of now; use backend='cuda'")

    def number(value):  # as a float64 on the device, or, where it is not there, as a float
        if not isinstance(value, torch.Tensor):
            return value
        return value.double().reshape(()) if value.device == device else float(value)

    skip = number(0.0 if found_inf is None else found_inf)
    counts = _advance(steps, skip, device)
    rate = number(lr if lr_tensor is None else lr_tensor)
    rates = torch.stack([rate / (1 - beta1**counts), (1 - beta2**counts).rsqrt()], dim=1).float()
    clip = 1.0 if grad_norm is None else _clip(max_grad_norm / (number(grad_norm) + 1e-6))
    decay, l2 = (1 - rate * weight_decay, 0.0) if decoupled_weight_decay else (1.0, weight_decay)
    scale = 1.0 if grad_scale is None else 1 / number(grad_scale)
    values = [1 - beta1, beta2, 1 - beta2, eps, l2, decay, scale, -clip if maximize else clip, skip]
    scalars = _send(values, torch.float32, device)
    seed, offset = (0, 0) if rng is None else (int(rng[0]), int(rng[1]) & 0xFFFFFFFF)
    flags = {
        "AMSGRAD": bool(max_exp_avg_sqs),
        "MASTER": bool(master_params),
        "STORE_GRAD": grad_scale is not None,
        "STOCHASTIC": rng is not None,
    }

    groups, copies = {}, []
    lists = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, master_params]
    for index, operands in enumerate(zip(*(tensors or [None] * len(params) for tensors in lists))):
        param, grad, exp_avg, exp_avg_sq, _, _ = operands
        numel = param.numel()
        if numel:
            if not all([t is None or t.is_contiguous() for t in operands]):
                pairs = [None if t is None else _in_memory_order(t, param) for t in operands]
                copies += [pair for pair in pairs if pair is not None and pair[0] is not pair[1]]
                operands = [None if pair is None else pair[0] for pair in pairs]
            row = [0 if t is None else t.data_ptr() for t in operands] + [numel]
            aligned = math.gcd(*row) % _VECTOR == 0  # all of them are
            kind = (param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype, aligned)
            groups.setdefault(kind, []).append([*row, index])
    for kind, rows in groups.items():
        _launch(rows, kind, rates, scalars, seed, offset, flags)
    for dense, view in copies:
        if not _overlaps(view):
            view.copy_(dense)


def _launch(rows, kind, rates, scalars, seed, offset, flags):
    """One launch for tensors of the same dtypes and alignment. rows: of the kernel's table, but for programs."""
    *dtypes, aligned = kind
    widest = 4 if flags["MASTER"] else max(dtype.itemsize for dtype in dtypes)
    block = 32 * _WARPS * _VECTOR // widest  # one access of each tensor by each thread: nothing changes threads
    first = 0
    for row in rows:
        programs = -(-row[6] // block)
        row += [first, programs]
        first += programs
    table = _send(rows, torch.int64, scalars.device)
    plan = torch.repeat_interleave(table[:, 9], output_size=first)
    options = dict(zip(("PARAM", "GRAD", "MOMENT", "MOMENT_SQ"), (_TRITON[dtype] for dtype in dtypes)), **flags)
    options |= {"ALIGNED": aligned, "BLOCK": block, "num_warps": _WARPS}
    _adam_kernel[(first,)](table, plan, rates, scalars, seed, offset, **options)


def _advance(steps, skip, device):
    """Count a step, unless skip > 0; returns (tensors,) float64 on the device: the counts."""
    places = {step.device for step in steps}
    for place in places:
        one = (skip <= 0).to(place, torch.float32) if isinstance(skip, torch.Tensor) else float(skip <= 0)
        torch._foreach_add_([step for step in steps if step.device == place], one)
    place = device if device in places else steps[0].device  # one copy of all, rather than a copy of each
    counts = torch.stack([step.to(place).reshape(()) for step in steps])
    return counts.to(device, torch.float64, non_blocking=True)


def _send(values, dtype, device):
    """Numbers and 0-dimensional tensors of the device, in one tensor there; without waiting for the device."""
    there = {i: value for i, value in enumerate(values) if isinstance(value, torch.Tensor)}
    known = [0.0 if i in there else value for i, value in enumerate(values)]
    sent = torch.tensor(known, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    for i, value in there.items():
        sent[i] = value
    return sent


def _clip(factor):
    return factor.clamp(max=1.0) if isinstance(factor, torch.Tensor) else min(factor, 1.0)


def _in_memory_order(tensor, param):
    """(dense, view): the elements in the order in which the parameter has them in memory; the same object where
    the tensor is dense in that order already."""
    view = tensor.permute(sorted(range(param.dim()), key=lambda d: -param.stride(d)))
    return (view, view) if view.is_contiguous() else (view.contiguous(), view)


def _overlaps(view):
    return any(stride == 0 and size > 1 for stride, size in zip(view.stride(), view.shape))
