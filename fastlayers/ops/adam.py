"""One step of Adam or AdamW for a list of parameters, in place, and the gradient norm for clipping."""

from itertools import chain
from operator import attrgetter

import torch

from fastlayers import backends, reference
from fastlayers.ops._autograd import register_fake
from fastlayers.ops._checks import check_number

_KERNEL_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_INFINITY = float("inf")


def adam_step(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    steps,
    *,
    master_params=(),
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    decoupled_weight_decay=False,
    maximize=False,
    grad_scale=None,
    found_inf=None,
    grad_norm=None,
    max_grad_norm=_INFINITY,
    rng=None,
    backend=None,
):
    """One step of Adam (AdamW with decoupled_weight_decay) on lists of one tensor per parameter, all in one call.

    params: float32, float16 or bfloat16 (float64 through the reference backend), any strides, all on one device
    grads:  shaped like params, any floating dtype and strides
    exp_avgs, exp_avg_sqs: the moments, shaped like params, in a dtype of their own; updated
    max_exp_avg_sqs: likewise, or empty without amsgrad
    steps:  one float32 number per parameter, incremented; on the CPU or the parameters' device
    master_params: float32 copies of 16-bit params, which then follow them; or empty
    lr:     number, or one-element tensor
    grad_scale: one number: gradients are divided by it first and left behind so, as torch's fused Adam does
    found_inf: one number: nothing at all changes where it is > 0
    grad_norm: norm of all gradients; they count as multiplied by min(1, max_grad_norm / (grad_norm + 1e-6))
    rng:    (2,) int64 on the CPU, seed and offset: 16-bit params (without masters) and moments are rounded
            stochastically; None rounds to nearest
    raises  TypeError, ValueError for lists that do not fit each other, sparse or complex tensors
    source  Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101; Reddi et al. 2018
    """
    if not params:
        return
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, master_params)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        check_number("adam_step", name, value, 0, 1)
    lr_tensor, lr = (lr, 0.0) if isinstance(lr, torch.Tensor) else (None, lr)
    options = (float(lr), beta1, beta2, float(weight_decay), float(eps), float(max_grad_norm))
    tail = (lr_tensor, grad_scale, found_inf, grad_norm, rng, *options, decoupled_weight_decay, maximize)
    try:
        chosen = backends.choose("adam_step", _facts(*lists), backend)
    except (AttributeError, backends.BackendError):
        _check_lists(lists, steps)
        raise
    if chosen in ("reference", "triton"):
        _check_lists(lists, steps)
    expanded = _expanded(grads) if grad_scale is not None else []
    if expanded:  # several elements in one place: unscaled in a copy, so that each place is unscaled once
        originals, grads = grads, list(grads)
        for i in expanded:
            grads[i] = grads[i].clone(memory_format=torch.contiguous_format)
        lists = (params, grads, *lists[2:])
    run = _implementation(chosen)
    try:
        with torch.no_grad():
            run(*lists, steps, *tail)
    except RuntimeError:
        _check_lists(lists, steps)  # says in Python's terms what was wrong, where that is the reason
        raise
    if not torch.compiler.is_compiling():  # so that autograd notices
        torch.autograd.graph.increment_version(params)
    for i in expanded:
        _once(originals[i]).copy_(_once(grads[i], originals[i].stride()))


def grad_norm(grads, grad_scale=None, *, backend=None):
    """The 2-norm of all tensors of a list together, divided by grad_scale.

    grads:  floating tensors of any shape and strides on one device
    returns float32 (float64 for float64 gradients), 0-dimensional
    """
    if not grads:
        raise ValueError("grad_norm: wanted at least one gradient, got none")
    chosen = backends.choose("grad_norm", _norm_facts(grads), backend)
    run = reference.grad_norm if chosen == "reference" else backends.operators(chosen).grad_norm
    return run(grads, grad_scale)


register_fake("adam_step", lambda *args: _check_lists(args[:6], args[6]))
register_fake("grad_norm", lambda grads, grad_scale: grads[0].new_empty((), dtype=torch.float32))


def _implementation(backend):
    if backend == "triton":
        from fastlayers.triton.adam import adam_step

        return adam_step
    return reference.adam_step if backend == "reference" else backends.operators(backend).adam_step


def _expanded(grads):
    """Indices of the tensors that have several elements in one place."""
    strides = ((i, grad.stride(), grad.shape) for i, grad in enumerate(grads) if not grad.is_contiguous())
    return [i for i, stride, shape in strides if any(s == 0 and n > 1 for s, n in zip(stride, shape))]


def _once(tensor, strides=None):
    """The part of an expanded tensor that is there once: the first element along every stride of 0."""
    strides = strides or tensor.stride()
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]


_NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "master_params")


def _check_lists(lists, steps):
    """Raise for the first thing that is wrong; the kernels check the same, more cheaply and less clearly."""
    params = lists[0]
    for name, tensors in zip(_NAMES, lists):
        if len(tensors) != len(params) and (tensors or name not in _NAMES[4:]):
            raise ValueError(f"adam_step: {len(params)} params, but {len(tensors)} {name}")
        for i, (tensor, param) in enumerate(zip(tensors, params)):
            _check_tensor(f"{name}[{i}]", tensor, param)
            if name != "grads" and _expanded([tensor]):
                raise ValueError(f"adam_step: {name}[{i}] has elements that share memory (an expanded view)")
    if len(steps) != len(params):
        raise ValueError(f"adam_step: {len(params)} params, but {len(steps)} steps")
    for i, step in enumerate(steps):
        if not isinstance(step, torch.Tensor) or step.numel() != 1 or step.dtype != torch.float32:
            raise TypeError(f"adam_step: steps[{i}] has to be a tensor of one float32, got {step!r}")


def _check_tensor(name, tensor, param):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"adam_step: {name} has to be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"adam_step: {name} is sparse; use torch.optim.SparseAdam")
    if tensor.is_complex():
        raise TypeError(f"adam_step: {name} is {tensor.dtype}; use torch.optim.Adam, or torch.view_as_real")
    if not tensor.is_floating_point():
        raise TypeError(f"adam_step: {name} has to be floating-point, got {tensor.dtype}")
    if tensor.shape != param.shape:
        raise ValueError(f"adam_step: {name} has shape {tuple(tensor.shape)}, the parameter {tuple(param.shape)}")
    if tensor.device != param.device:
        raise ValueError(f"adam_step: {name} is on {tensor.device}, the parameter on {param.device}")


def _facts(*lists, **_):
    tensors = [tensor for tensor in chain(*lists)]
    device = lists[0][0].device
    return {"device": device.type, "index": device.index, "dtypes": set(map(attrgetter("dtype"), tensors))}


def _norm_facts(grads, *_, **__):
    return _facts(grads)


def _dtype_reason(facts):
    others = facts["dtypes"] - _KERNEL_DTYPES
    return f"the kernels take float32, float16 and bfloat16, not {', '.join(map(str, others))}" if others else None


def _cpu_reason(facts):
    return backends.native_reason(facts) or _dtype_reason(facts)


def _cuda_reason(facts):
    return backends.cuda_reason(facts) or _dtype_reason(facts)


def _triton_reason(facts):
    return backends.triton_reason(facts) or _dtype_reason(facts)


_NATIVE = {"cpu": _cpu_reason, "cuda": _cuda_reason}
backends.register("adam_step", facts=_facts, **_NATIVE, triton=_triton_reason)
backends.register("grad_norm", facts=_norm_facts, **_NATIVE)
