"""Linear + activation in one op: activation(x W' + b), and the gated form activation(x Wg' + bg) * (x Wu' + bu)."""

import functools

import torch

from fastlayers import backends, reference
from fastlayers.ops._autocast import autocast
from fastlayers.ops._autograd import register_autograd, register_fake

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear_act(input, weight, bias=None, activation="gelu", *, save="preactivation", backend=None):
    """activation(input @ weight.T + bias), in one pass over the output.

    input:  (..., in_features), float32, float16 or bfloat16 (float64 on the reference backend); any strides
    weight: (out_features, in_features), dtype of input
    bias:   (out_features,) or None
    activation: identity, relu, gelu (erf), gelu_tanh, quick_gelu, silu, sigmoid, tanh, relu_squared, leaky_relu
    save:   what the backward keeps beside input and weight: "preactivation" (..., out_features), or only the
            "input", from which it computes the pre-activation again: slower, less memory
    returns (..., out_features), dtype of input; differentiable in all three, once
    raises  ValueError for an unknown activation or a mismatch of shapes, dtypes or devices; TypeError for
            arguments of the wrong type
    Under autocast the arguments are cast as torch.nn.functional.linear casts them; float32 on a GPU is multiplied as
    torch.backends.cuda.matmul.allow_tf32 says, gradients as it says when they are computed. On CPUs with AMX numbers
    below 2^-126 (subnormal) count as 0.
    source  GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415; SiLU: Elfwing et al. 2017, arXiv:1702.03118
    """
    input, weight, bias = autocast(input, weight, bias)
    _check("linear_act", activation, save, input, weight=weight, bias=bias)
    chosen = backends.choose("linear_act", _facts_of(save, activation == "identity", input, weight, bias), backend)
    if chosen == "reference":
        return reference.linear_act(input, weight, bias, activation)
    if chosen == "cublas" and activation == "identity":
        return torch.nn.functional.linear(input, weight, bias)
    saves = save == "preactivation" and activation != "identity" and _needs_gradient(input, weight, bias)
    if chosen == "cublas":
        return _by_cublas(activation, input, weight, None, bias, None)
    return backends.operators(chosen).linear_act_forward(input, weight, bias, activation, saves, _allows_tf32())[0]


def _linear_act_setup(ctx, inputs, output):
    input, weight, bias, activation, saves, _ = inputs
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    recomputes = activation != "identity" and not saves
    ctx.save_for_backward(
        input if needs_weight or recomputes else None,
        weight if needs_input or recomputes else None,
        bias if recomputes else None,
        output[1] if saves else None,
    )
    ctx.activation, ctx.needs = activation, (needs_input, needs_weight, needs_bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _linear_act_backward(operators, ctx, grad, _):
    if grad is None:
        return (None,) * 6
    found = operators.linear_act_backward(grad, *ctx.saved_tensors, ctx.activation, *ctx.needs, _allows_tf32())
    return (*_wanted(found, ctx.needs), None, None, None)


def _linear_act_forward_fake(input, weight, bias, activation, saves, allow_tf32):
    shape = (*input.shape[:-1], weight.shape[0])
    return input.new_empty(shape), input.new_empty(shape if saves else 0)


def _linear_act_backward_fake(grad, input, weight, bias, preactivation, activation, *needs):
    in_features = weight.shape[1] if weight is not None else input.shape[-1] if input is not None else 0
    shapes = ((*grad.shape[:-1], in_features), (grad.shape[-1], in_features), grad.shape[-1])
    return tuple(grad.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs))


def gated_linear_act(
    input,
    weight_gate,
    weight_up,
    bias_gate=None,
    bias_up=None,
    activation="silu",
    *,
    save="preactivation",
    backend=None,
):
    """activation(input @ weight_gate.T + bias_gate) * (input @ weight_up.T + bias_up), with one read of input.

    input:  (..., in_features), float32, float16 or bfloat16 (float64 on the reference backend); any strides
    weight_gate, weight_up: (out_features, in_features), dtype of input
    bias_gate, bias_up:     (out_features,) or None
    activation, save, returns, raises, autocast: as linear_act; "preactivation" keeps both products
    source  Shazeer 2020, "GLU variants improve transformer", arXiv:2002.05202
    """
    input, weight_gate, weight_up, bias_gate, bias_up = autocast(input, weight_gate, weight_up, bias_gate, bias_up)
    _check("gated_linear_act", activation, save, input, weight_gate=weight_gate, bias_gate=bias_gate)
    _check("gated_linear_act", activation, save, input, weight_up=weight_up, bias_up=bias_up)
    if weight_gate.shape != weight_up.shape:
        raise ValueError(
            f"gated_linear_act: weight_gate has shape {tuple(weight_gate.shape)}, weight_up {tuple(weight_up.shape)}; "
            "they have to be the same"
        )
    parameters = (weight_gate, weight_up, bias_gate, bias_up)
    chosen = backends.choose("gated_linear_act", _facts_of(save, False, input, *parameters), backend)
    if chosen == "reference":
        return reference.gated_linear_act(input, weight_gate, weight_up, bias_gate, bias_up, activation)
    saves = save == "preactivation" and _needs_gradient(input, *parameters)
    if chosen == "cublas":
        return _by_cublas(activation, input, weight_gate, weight_up, bias_gate, bias_up)
    return backends.operators(chosen).gated_linear_act_forward(
        input, weight_gate, weight_up, bias_gate, bias_up, activation, saves, _allows_tf32()
    )[0]


def _gated_linear_act_setup(ctx, inputs, output):
    input, weight_gate, weight_up, bias_gate, bias_up, activation, saves, _ = inputs
    needs = ctx.needs_input_grad[:5]
    needs_input, needs_weight = needs[0], needs[1] or needs[2]
    ctx.save_for_backward(
        input if needs_weight or not saves else None,
        weight_gate if needs_input or not saves else None,
        weight_up if needs_input or not saves else None,
        None if saves else bias_gate,
        None if saves else bias_up,
        output[1] if saves else None,
        output[2] if saves else None,
    )
    ctx.activation, ctx.needs = activation, needs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _gated_linear_act_backward(operators, ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    found = operators.gated_linear_act_backward(grad, *ctx.saved_tensors, ctx.activation, *ctx.needs, _allows_tf32())
    return (*_wanted(found, ctx.needs), None, None, None)


def _gated_linear_act_forward_fake(input, weight_gate, weight_up, bias_gate, bias_up, activation, saves, allow_tf32):
    shape = (*input.shape[:-1], weight_gate.shape[0])
    saved = shape if saves else 0
    return input.new_empty(shape), input.new_empty(saved), input.new_empty(saved)


def _gated_linear_act_backward_fake(
    grad, input, weight_gate, weight_up, bias_gate, bias_up, gate, up, activation, *needs
):
    in_features = weight_gate.shape[1] if weight_gate is not None else input.shape[-1] if input is not None else 0
    weight, bias = (grad.shape[-1], in_features), grad.shape[-1]
    shapes = ((*grad.shape[:-1], in_features), weight, weight, bias, bias)
    return tuple(grad.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs))


def _by_cublas(activation, input, weight, weight_up, bias, bias_up):
    """torch's products, with the biases; then one pass. That gives the biases their gradients, too: it reads all that
    these are sums of, which torch would read once more."""
    products = [
        None if w is None else torch.nn.functional.linear(input, w, None if b is None else b.detach())
        for w, b in ((weight, bias), (weight_up, bias_up))
    ]
    return backends.operators("cublas").linear_act_epilogue(*products, bias, bias_up, activation)


def _linear_act_epilogue_setup(ctx, inputs, output):
    product, product_up, _, _, activation = inputs
    ctx.save_for_backward(product.contiguous(), None if product_up is None else product_up.contiguous())
    ctx.activation, ctx.needs = activation, ctx.needs_input_grad[:4]
    ctx.set_materialize_grads(False)


def _linear_act_epilogue_backward(operators, ctx, grad):
    if grad is None:
        return (None,) * 5
    found = operators.linear_act_epilogue_backward(grad, *ctx.saved_tensors, ctx.activation, *ctx.needs)
    return (*_wanted(found, ctx.needs), None)


def _linear_act_epilogue_fake(product, product_up, bias, bias_up, activation):
    return product.new_empty(product.shape)


def _linear_act_epilogue_backward_fake(grad, preactivation, preactivation_up, activation, *needs):
    shapes = (grad.shape, grad.shape, grad.shape[-1], grad.shape[-1])
    return tuple(grad.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs))


@backends.constant_when_compiled  # compiled code is guarded by torch's own switches
def _allows_tf32():
    """torch's switch for float32 products on a GPU, as torch.nn.functional.linear goes by it."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _wanted(gradients, needs):
    return (gradient if needed else None for gradient, needed in zip(gradients, needs))


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _refuse_double_backward(op):
    def refuse(operators, ctx, *grads):
        raise RuntimeError(f"{op}: double backward is not supported; it is differentiable once")

    return refuse


for _op, _setup, _backward, _forward_fake, _backward_fake in (
    ("linear_act", _linear_act_setup, _linear_act_backward, _linear_act_forward_fake, _linear_act_backward_fake),
    (
        "gated_linear_act",
        _gated_linear_act_setup,
        _gated_linear_act_backward,
        _gated_linear_act_forward_fake,
        _gated_linear_act_backward_fake,
    ),
):
    register_fake(f"{_op}_forward", _forward_fake)
    register_fake(f"{_op}_backward", _backward_fake)
    register_autograd(f"{_op}_forward", _backward, _setup)
    register_autograd(f"{_op}_backward", _refuse_double_backward(_op))
register_fake("linear_act_epilogue", _linear_act_epilogue_fake)
register_fake("linear_act_epilogue_backward", _linear_act_epilogue_backward_fake)
register_autograd("linear_act_epilogue", _linear_act_epilogue_backward, _linear_act_epilogue_setup)
register_autograd("linear_act_epilogue_backward", _refuse_double_backward("linear_act"))


def _check(op, activation, save, input, **parameters):
    """Raise what a wrong call deserves. parameters: a weight and a bias, under the names the caller knows."""
    (weight_name, weight), (bias_name, bias) = parameters.items()
    for name, tensor in (("input", input), (weight_name, weight), (bias_name, bias)):
        if not isinstance(tensor, torch.Tensor) and not (tensor is None and name == bias_name):
            raise TypeError(f"{op}: {name} has to be a torch.Tensor, got {type(tensor).__name__}")
    if not isinstance(activation, str):
        raise TypeError(f"{op}: activation has to be a string, got {type(activation).__name__}")
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"{op}: activation {activation!r} is not one of {known}")
    if save not in ("preactivation", "input"):
        raise ValueError(f"{op}: save has to be 'preactivation' or 'input', got {save!r}")
    if input.dtype not in _DTYPES and input.dtype != torch.float64:
        raise TypeError(f"{op}: input has to be float32, float16, bfloat16 or float64, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError(f"{op}: input has to be (..., in_features), got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"{op}: {weight_name} has to be (out_features, in_features), got {tuple(weight.shape)}")
    if weight.shape[1] != input.shape[-1]:
        raise ValueError(f"{op}: {weight_name} has in_features {weight.shape[1]}, input has {input.shape[-1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {bias_name} has to be ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if tensor.dtype != input.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, input is {input.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, input is on {input.device}")


def _facts_of(save, is_plain, input, *parameters):
    """`is_plain`: there is nothing to fuse, and torch's product runs at the tensor cores' rate.
    `sizes`: (rows, in_features, out_features), what the choice among GPU kernels goes by."""
    return {
        "device": input.device.type,
        "index": input.device.index,
        "dtype": input.dtype,
        "save": save,
        "is_plain": is_plain and input.dtype != torch.float32,
        "needs_gradient": _needs_gradient(input, *parameters),
        "sizes": (input.numel() // max(input.shape[-1], 1), input.shape[-1], parameters[0].shape[0]),
    }


def _facts(op, input, weight, *others, save="preactivation", **options):
    values = (*others, *options.values())
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    is_plain = op == "linear_act" and any(isinstance(value, str) and value == "identity" for value in values)
    return _facts_of(save, is_plain, *autocast(input, weight, *tensors))


def _dtype_reason(facts):
    if facts["dtype"] not in _DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {facts['dtype']}"
    return None


def _tensor_core_reason(facts):
    """Of the GPU, where it is known to be one."""
    if facts["dtype"] == torch.bfloat16 and backends.cuda_capability() < (8, 0):
        return "bfloat16 needs a GPU of compute capability 8.0 or newer"
    return None


def _cpu_reason(facts):
    return _dtype_reason(facts) or backends.native_reason(facts)


def _cuda_reason(facts):
    return _dtype_reason(facts) or backends.cuda_reason(facts) or _tensor_core_reason(facts)


def _cublas_reason(facts):
    if facts["save"] == "input" and facts["needs_gradient"]:
        return 'save="input" needs a kernel that computes the product again'
    return _dtype_reason(facts) or backends.cuda_reason(facts)


def _triton_reason(facts):
    reason = _dtype_reason(facts) or backends.triton_reason(facts)
    return reason or (None if backends.triton_interpreted() else _tensor_core_reason(facts))


def _has_amx(probe):
    return getattr(torch.cpu, probe, lambda: False)()


# With tile instructions oneDNN multiplies 16-bit matrices faster than our kernels more often than not: linear+gelu in
# bfloat16 ran at 0.6 to 1.3 times torch's speed on two cores of a Xeon with AMX (fifth generation).
_TORCH_GEMM_IS_FASTER = {
    torch.bfloat16: _has_amx("_is_amx_tile_supported"),
    torch.float16: _has_amx("_is_amx_fp16_supported"),
}

# The CPU kernels pack the weight for each product, which so few rows do not pay for: with 64 rows they took 1.0 to 1.7
# times as long as torch's product and a ReLU, in float32 on two cores of an AMD EPYC (Zen 5), and with 4 rows up to 2.
_FEW_ROWS = 64


def _reference_reason(facts):
    """The reference comes first where torch's own GEMM wins: for few rows, on CPUs with tile instructions, and on old
    GPUs without CUDA kernels, where Triton would multiply by plain arithmetic."""
    if facts["device"] == backends.cuda_device and backends.cuda_reason(facts) and backends.cuda_capability() < (8, 0):
        return None
    few = facts["sizes"][0] <= _FEW_ROWS
    if facts["device"] == "cpu" and (few or _TORCH_GEMM_IS_FASTER.get(facts["dtype"], False)):
        return None
    return "the compiled kernels are faster"


for _op in ("linear_act", "gated_linear_act"):
    backends.register(
        _op,
        facts=functools.partial(_facts, _op),
        reference=_reference_reason,
        cpu=_cpu_reason,
        cuda=_cuda_reason,
        cublas=_cublas_reason,
        triton=_triton_reason,
    )
