"""`fastlayers verify`: every op, option and dtype on this machine beside PyTorch, judged by fastlayers.agreement."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from fastlayers import _native, backends, ops, optim, reference
from fastlayers.agreement import Deviation, deviation
from fastlayers.info import machine_reason

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIXTEEN_BITS = DTYPES[1:]
OPS = ("attention", "varlen_attention", "decode_attention", "linear_act", "gated_linear_act", "adam")
SMALL, LARGE = 1, 3  # factors on the sizes; --quick stays with the small ones


@dataclass(frozen=True)
class Check:
    """One row of the table.

    results: function of (dtype, device, size) that returns a triple of {name: tensor}: ours, the same in float64 on
            the same inputs, and plain torch in `dtype`
    """

    op: str
    option: str
    results: Callable
    dtypes: tuple = DTYPES


# Ops that are functions of tensors: outputs and gradients.


def _evaluate(function, inputs, differentiable, dtype):
    """{name: tensor} of the outputs, and of the gradients of the inputs named in `differentiable`."""
    leaves = {name: tensor.detach().requires_grad_(name in differentiable) for name, tensor in inputs.items()}
    out = function(**leaves)
    outs = out if isinstance(out, tuple) else (out,)
    found = {f"output {number}": tensor for number, tensor in enumerate(outs)}
    if differentiable:
        generator = torch.Generator().manual_seed(1)
        douts = [torch.randn(one.shape, generator=generator).to(dtype).to(one) for one in outs]
        wanted = [leaves[name] for name in differentiable]
        found |= {f"d{name}": grad for name, grad in zip(differentiable, torch.autograd.grad(outs, wanted, douts))}
    return found


def _function_results(ours, plain, make_inputs, differentiable):
    """The results of a Check from our function, plain torch's, and make_inputs(size), which draws float32 inputs.

    Inputs named in _KEEP_FLOAT32 stay float32 in every dtype, the others are rounded to the dtype under test.
    """

    def results(dtype, device, size):
        torch.manual_seed(0)
        inputs = {name: _cast(name, tensor, dtype, device) for name, tensor in make_inputs(size).items()}
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        return (
            _evaluate(ours, inputs, differentiable, dtype),
            _evaluate(plain, doubles, differentiable, dtype),
            _evaluate(plain, inputs, differentiable, dtype),
        )

    return results


_KEEP_FLOAT32 = ("alibi_slopes", "sinks")


def _cast(name, tensor, dtype, device):
    return tensor.to(device, dtype if tensor.is_floating_point() and name not in _KEEP_FLOAT32 else None)


HEADS, HEAD_DIM = 4, 64


def _qkv(size, heads_k=HEADS, head_dim=HEAD_DIM, head_dim_v=None, seqlen_k=None, heads_q=HEADS):
    """(2, heads, 43 size, head_dim) against 61 size keys; sizes that fill no tile."""
    seqlen_q, seqlen_k = 43 * size, (seqlen_k or 61) * size
    return {
        "query": torch.randn(2, heads_q, seqlen_q, head_dim),
        "key": torch.randn(2, heads_k, seqlen_k, head_dim),
        "value": torch.randn(2, heads_k, seqlen_k, head_dim_v or head_dim),
    }


def _strided(size):
    """(B, H, S, D) views of (B, S, H, D) memory, as projections leave them."""
    return {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in _qkv(size).items()}


def _mask(dtype):
    def make(size):
        inputs = _qkv(size)
        mask = torch.randn(2, 1, 43 * size, 61 * size)
        return {**inputs, "attn_mask": (mask > -0.5) if dtype == torch.bool else mask}

    return make


def _with(name, tensor, make=_qkv):
    return lambda size: {**make(size), name: tensor}


GRADIENTS = ("query", "key", "value")
_SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
_SINKS = torch.tensor([0.3, -0.7, 1.1, 0.0])
_RNG = torch.tensor([1234, 5])
_GQA = {"enable_gqa": True}


def _attention_check(option, make_inputs=_qkv, gradients=GRADIENTS, plain=None, **options):
    """Against torch's own attention where it has the option, else against the reference backend."""
    plain = plain or (lambda **inputs: ops.attention(**inputs, **options, backend="reference"))
    results = _function_results(lambda **inputs: ops.attention(**inputs, **options), plain, make_inputs, gradients)
    return Check("attention", option, results)


def _sdpa(**options):
    return lambda query, key, value, attn_mask=None: F.scaled_dot_product_attention(
        query, key, value, attn_mask, **options
    )


def _many_sinks(size):
    """32 heads: the largest error of fewer sums than that says little about how they are computed."""
    return {**_qkv(size, 32, heads_q=32), "sinks": torch.randn(32)}


def _everything(size):
    return {**_qkv(size, heads_k=2, head_dim=40, head_dim_v=72), "alibi_slopes": _SLOPES, "sinks": _SINKS}


ATTENTION = [
    _attention_check("plain", plain=_sdpa()),
    _attention_check("is_causal", plain=_sdpa(is_causal=True), is_causal=True),
    _attention_check("bool attn_mask", _mask(torch.bool), plain=_sdpa()),
    _attention_check("additive attn_mask and its gradient", _mask(None), (*GRADIENTS, "attn_mask"), plain=_sdpa()),
    _attention_check("scale", plain=_sdpa(scale=0.3), scale=0.3),
    _attention_check("enable_gqa", lambda size: _qkv(size, heads_k=2), plain=_sdpa(**_GQA), **_GQA),
    _attention_check("head_dim 80, of value 24", lambda size: _qkv(size, head_dim=80, head_dim_v=24), plain=_sdpa()),
    _attention_check("head_dim 256", lambda size: _qkv(size, head_dim=256), plain=_sdpa()),
    _attention_check("strided inputs", _strided, plain=_sdpa()),
    _attention_check("bottom_right", is_causal=True, causal_alignment="bottom_right"),
    _attention_check("dropout_p", _with("dropout_rng", _RNG), dropout_p=0.3),
    _attention_check("window", window=(17, 5)),
    _attention_check("softcap", softcap=1.5),
    _attention_check("alibi_slopes", _with("alibi_slopes", _SLOPES)),
    _attention_check("sinks and their gradient", _many_sinks, (*GRADIENTS, "sinks")),
    _attention_check("return_lse and its gradient", return_lse=True),
    _attention_check(
        "rows that see no key",
        is_causal=True,
        causal_alignment="bottom_right",
        make_inputs=lambda size: _qkv(size, seqlen_k=30),
    ),
    _attention_check("deterministic", deterministic=True, plain=_sdpa()),
    _attention_check(
        "gqa, causal, window, softcap, alibi, sinks, dropout",
        _with("dropout_rng", _RNG, _everything),
        (*GRADIENTS, "sinks"),
        **dict(_GQA, is_causal=True, window=(40, 0), softcap=5.0, dropout_p=0.1, return_lse=True),
    ),
]


def _packed(size, heads_k=HEADS):
    """Three sequences, one of them empty, behind each other."""
    lengths_q, lengths_k = [43 * size, 0, 18 * size], [61 * size, 7, 20 * size]
    cumulated = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    return {
        "query": torch.randn(sum(lengths_q), HEADS, HEAD_DIM),
        "key": torch.randn(sum(lengths_k), heads_k, HEAD_DIM),
        "value": torch.randn(sum(lengths_k), heads_k, HEAD_DIM),
        "cu_seqlens_q": cumulated[0],
        "cu_seqlens_k": cumulated[1],
    }


def _varlen_check(option, make_inputs=_packed, **options):
    def attend(backend):
        def function(**inputs):
            longest = [int(inputs[name].diff().max()) for name in ("cu_seqlens_q", "cu_seqlens_k")]
            return ops.varlen_attention(
                **inputs, max_seqlen_q=longest[0], max_seqlen_k=longest[1], **options, backend=backend
            )

        return function

    return Check(
        "varlen_attention", option, _function_results(attend(None), attend("reference"), make_inputs, GRADIENTS)
    )


VARLEN = [
    _varlen_check("plain"),
    _varlen_check("is_causal", is_causal=True),
    _varlen_check("gqa, window, softcap", lambda size: _packed(size, 2), **_GQA, window=(9, 9), softcap=2.0),
    _varlen_check("dropout_p", _with("dropout_rng", _RNG, _packed), dropout_p=0.2),
    _varlen_check(
        "alibi_slopes, bottom_right",
        _with("alibi_slopes", _SLOPES, _packed),
        is_causal=True,
        causal_alignment="bottom_right",
    ),
]


def _cache(size, seqlen_q=1, heads_k=HEADS):
    """16 sequences: a row of few keys has one error for all its values, and few rows would be judged by luck."""
    lengths = torch.arange(1, 17) * 12 * size
    return {
        "query": torch.randn(16, HEADS, seqlen_q, HEAD_DIM),
        "key_cache": torch.randn(16, heads_k, 200 * size, HEAD_DIM),
        "value_cache": torch.randn(16, heads_k, 200 * size, HEAD_DIM),
        "cache_seqlens": lengths.int(),
    }


def _pages(size):
    """Caches of the same size in pages of eight keys, the last page first."""
    inputs, pages = _cache(size, heads_k=2), 16 * 25 * size
    caches = {name: inputs[name].view(pages, 2, 8, HEAD_DIM) for name in ("key_cache", "value_cache")}
    return {**inputs, **caches, "page_table": torch.arange(pages, dtype=torch.int32).flip(0).view(16, -1)}


def _decode_check(option, make_inputs=_cache, **options):
    def attend(backend):
        return lambda **inputs: ops.decode_attention(**inputs, **options, backend=backend)

    return Check("decode_attention", option, _function_results(attend(None), attend("reference"), make_inputs, ()))


DECODE = [
    _decode_check("one new token"),
    _decode_check("five new tokens, gqa", lambda size: _cache(size, 5, 2), **_GQA),
    _decode_check("window, softcap, lse", lambda size: _cache(size, 3), window=(50, 0), softcap=3.0, return_lse=True),
    _decode_check("sinks", _with("sinks", _SINKS, _cache)),
    _decode_check("page_table, gqa", _pages, **_GQA),
]


def _linear_inputs(size, gated=False):
    tokens, in_features, out_features = 37 * size, 129, 70 * size
    scale = in_features**-0.5
    names = ("weight_gate", "weight_up") if gated else ("weight",)
    inputs = {"input": torch.randn(3, tokens, in_features)}
    inputs |= {name: torch.randn(out_features, in_features) * scale for name in names}
    return inputs | {name.replace("weight", "bias"): torch.randn(out_features) for name in names}


def _linear_check(op, option, names, **options):
    gated = op == "gated_linear_act"
    plain = getattr(reference, op)

    def make_inputs(size):
        return {name: tensor for name, tensor in _linear_inputs(size, gated).items() if name in names}

    activation = options["activation"]
    return Check(
        op,
        option,
        _function_results(
            lambda **inputs: getattr(ops, op)(**inputs, **options),
            lambda **inputs: plain(**inputs, activation=activation),
            make_inputs,
            names,
        ),
    )


_LINEAR = ("input", "weight", "bias")
_GATED = ("input", "weight_gate", "weight_up", "bias_gate", "bias_up")
LINEAR = [_linear_check("linear_act", name, _LINEAR, activation=name) for name in reference.ACTIVATIONS]
LINEAR += [
    _linear_check("linear_act", "gelu, no bias", _LINEAR[:2], activation="gelu"),
    _linear_check("linear_act", "gelu, save=input", _LINEAR, activation="gelu", save="input"),
    _linear_check("linear_act", "silu, save=input", _LINEAR, activation="silu", save="input"),
]
GATED = [_linear_check("gated_linear_act", name, _GATED, activation=name) for name in reference.ACTIVATIONS]
GATED += [
    _linear_check("gated_linear_act", "silu, no bias", _GATED[:3], activation="silu"),
    _linear_check("gated_linear_act", "silu, save=input", _GATED, activation="silu", save="input"),
]


# Adam: parameters and moments after three steps.


def _steps(make_optimizer, rounding, dtype, size, device, before_step=None):
    """{name: tensor} after three steps on a matrix, a transposed one, a vector and a single number.

    rounding: dtype that parameters and gradients are rounded to before they are given to the optimizer in `dtype`
    before_step(optimizer, params) sees the gradients of a step
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(37 * size, 53), (64, 31 * size), (1001 * size,), (1,)]

    def draw():
        tensors = [torch.randn(shape, generator=generator).to(rounding).to(device) for shape in shapes]
        return [tensors[0], tensors[1].t(), *tensors[2:]]

    params = [tensor.to(dtype).requires_grad_() for tensor in draw()]
    optimizer = make_optimizer(params)
    torch.manual_seed(0)
    for _ in range(3):
        for param, grad in zip(params, draw()):
            param.grad = grad.to(dtype)
        if before_step:
            before_step(optimizer, params)
        optimizer.step()
    found = {f"parameter {number}": param.detach() for number, param in enumerate(params)}
    for number, param in enumerate(params):
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{key} {number}"] = optimizer.state[param][key]
    return found


def _clip(optimizer, params):
    torch.nn.utils.clip_grad_norm_(params, 0.5)


def _scale(optimizer, params):
    """What GradScaler hands an optimizer that unscales by itself."""
    for param in params:
        param.grad *= 4.0
    device = params[0].device
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device=device), torch.tensor(0.0, device=device)


def _adam_check(option, plain=torch.optim.AdamW, ours=optim.FusedAdamW, extras=None, before=(None, None), **options):
    """before: before_step for ours, and for plain torch.

    `extras` are options that torch lacks: there "eager" is our own optimizer on the reference backend.
    """

    def results(dtype, device, size):
        # In float16 torch's default eps of 1e-8 is zero, and torch divides by it.
        common = {"lr": 0.01, "eps": 1e-3 if dtype == torch.float16 else 1e-8, **options}

        def run_ours():
            make = partial(ours, **common, **(extras or {}))
            return _steps(make, dtype, dtype, size, device, before[0])

        def run_plain(wide):
            return _steps(partial(plain, **common), dtype, wide, size, device, before[1])

        exact = run_plain(torch.float64)
        if extras is None:
            return run_ours(), exact, run_plain(dtype)
        with backends.use_backend("reference"):
            eager = run_ours()
        return run_ours(), exact, eager

    return Check("adam", option, results, DTYPES if extras is None else SIXTEEN_BITS)


ADAM = [
    _adam_check("FusedAdamW"),
    _adam_check("FusedAdam", torch.optim.Adam, optim.FusedAdam),
    _adam_check("FusedAdam, weight_decay", torch.optim.Adam, optim.FusedAdam, weight_decay=0.1),
    _adam_check("amsgrad", amsgrad=True),
    _adam_check("maximize", maximize=True),
    _adam_check("betas, eps", betas=(0.8, 0.95), eps=1e-3),
    _adam_check(
        "max_grad_norm",
        ours=lambda params, **options: optim.FusedAdamW(params, **options, max_grad_norm=0.5),
        before=(None, _clip),
    ),
    _adam_check("grad_scale", before=(_scale, None)),
    _adam_check("master_weights", extras={"master_weights": True}),
    _adam_check("moment_dtype=float32", extras={"moment_dtype": torch.float32}),
    _adam_check("moment_dtype=bfloat16", extras={"moment_dtype": torch.bfloat16}),
    _adam_check("stochastic_rounding", extras={"stochastic_rounding": True}),
]


CHECKS = [*ATTENTION, *VARLEN, *DECODE, *LINEAR, *GATED, *ADAM]


# The command.


def add_arguments(parser):
    parser.add_argument("ops", nargs="*", metavar="OP", type=_op, help=f"{', '.join(OPS)}; all of them by default")
    parser.add_argument("--quick", action="store_true", help="small sizes only")


def _op(text):
    if text not in OPS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(OPS)}")
    return text


def run(args):
    start = time.perf_counter()
    sizes = (SMALL,) if args.quick else (SMALL, LARGE)
    checks = [check for check in CHECKS if check.op in (args.ops or OPS)]
    problems, checked = [], False
    for backend in ("cpu", "cuda", "cublas", "triton"):
        reason = machine_reason(backend)
        if reason:
            print(f"backend {backend}: not checked, {reason}\n")
            continue
        checked = True
        print(f"backend {backend}: the worst deviation as a share of what is allowed\n")
        print(f"{'op':<17} {'option':<52}" + "".join(f"{_name(dtype):<13}" for dtype in DTYPES).rstrip())
        for check in checks:
            cells = [judge(check, dtype, backend, sizes) for dtype in DTYPES]
            print(
                f"{check.op:<17} {check.option:<52}" + "".join(f"{_cell(cell):<13}" for cell in cells).rstrip(),
                flush=True,
            )
            for dtype, cell in zip(DTYPES, cells):
                if isinstance(cell, Deviation) and not cell.ok:
                    problems.append(f"{backend}, {check.op}, {check.option}, {_name(dtype)}: {cell.problem}")
        print()
    if not checked:
        print("nothing was checked: no compiled backend can run here")
        return 1 if _native.error else 0
    verdict = f"{len(problems)} FAILED" if problems else "everything agrees"
    print("\n".join([*problems, f"{verdict} ({time.perf_counter() - start:.0f} s)"]))
    return 1 if problems else 0


def judge(check, dtype, backend, sizes):
    """The worst Deviation over all sizes; or why this backend does not serve the check, as a string."""
    if dtype not in check.dtypes:
        return "-"
    device = "cpu" if backend == "cpu" else "cuda"
    worst = Deviation(0.0, None)
    try:
        for size in sizes:
            with backends.use_backend(backend):
                ours, exact, eager = check.results(dtype, device, size)
            for name in exact:
                found = deviation(ours[name], exact[name], eager[name])
                if not found.ratio <= worst.ratio:
                    worst = Deviation(found.ratio, found.problem and f"{name}: {found.problem}")
    except backends.BackendError:
        return "not served"
    except Exception as error:
        return Deviation(float("inf"), f"{type(error).__name__}: {error}")
    return worst


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _cell(cell):
    if isinstance(cell, str):
        return cell
    return f"{cell.ratio:.2f} {'ok' if cell.ok else 'FAILED'}"
