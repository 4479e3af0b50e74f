"""Packages that people may have installed: looked for, never needed, timed where they are right.

None of these adapters has run against the real package on a GPU yet; a package whose results fail the check, or whose
interface has changed, is reported and does not stop the rest.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch.nn.functional as F

from fastlayers.benchmarks.runner import Skip, one_line


@dataclass(frozen=True)
class Package:
    """name: as pip calls it; adapters: kind of work -> function(call) that gives what stands in for ours."""

    name: str
    module: str
    adapters: dict

    @property
    def installed(self):
        return importlib.util.find_spec(self.module) is not None

    @property
    def label(self):
        try:
            return f"{self.name} {metadata.version(self.name)}"
        except metadata.PackageNotFoundError:
            return self.name


def versions():
    """Of those that are installed: "flash-attn 2.8.3"."""
    return [package.label for package in PACKAGES if package.installed]


def makers(kind, use):
    """{label: function() -> candidate, raising Skip} of the packages with an adapter for this kind.

    use: adapter -> candidate, as the suite makes one of a maker of its own
    """

    def maker(package):
        def made():
            if not package.installed:
                raise Skip("not installed")
            try:
                return use(package.adapters[kind])
            except ImportError as error:
                raise Skip(f"installed, but cannot be imported: {one_line(error)}") from error

        return made

    return {package.label: maker(package) for package in PACKAGES if kind in package.adapters}


def _need(holds, reason):
    if not holds:
        raise Skip(reason)


def _check_attention(call, grouped=True, windows=True):
    _need(call.device == "cuda", "runs on GPUs alone")
    _need(call.dtype != "float32", "takes float16 and bfloat16 alone")
    _need(call.lengths is None and not call.decodes, "no adapter for padded or packed sequences and caches")
    _need(grouped or call.group == 1, "no adapter for grouped heads")
    _need(windows or call.window is None, "no adapter for windows")


def _window(call):
    return (-1, -1) if call.window is None else (call.window, 0)


def _sequence_first(attend):
    """From (B, S, H, D), which these packages take, to (B, H, S, D)."""
    return lambda *tensors: attend(*(tensor.transpose(1, 2) for tensor in tensors)).transpose(1, 2)


def _flash_attention(call):
    from flash_attn import flash_attn_func

    _check_attention(call)
    options = {"dropout_p": call.dropout_p, "causal": call.is_causal, "window_size": _window(call)}
    return _sequence_first(lambda query, key, value: flash_attn_func(query, key, value, **options))


def _xformers(call):
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    _check_attention(call, grouped=False, windows=False)
    options = {"p": call.dropout_p, "attn_bias": LowerTriangularMask() if call.is_causal else None}
    return _sequence_first(lambda query, key, value: memory_efficient_attention(query, key, value, **options))


def _transformer_engine_attention(call):
    from transformer_engine.pytorch import DotProductAttention

    _check_attention(call)
    attend = DotProductAttention(
        call.heads,
        call.head_dim,
        num_gqa_groups=call.heads_k,
        attention_dropout=call.dropout_p,
        qkv_format="bshd",
        attn_mask_type="causal" if call.is_causal else "no_mask",
        window_size=_window(call),
    )
    return _sequence_first(lambda query, key, value: attend(query, key, value).view(query.shape))


def _liger_gated(call):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    _need(call.device == "cuda", "runs on GPUs alone")

    def gated(input, weight_gate, weight_up):
        return LigerSiLUMulFunction.apply(F.linear(input, weight_gate), F.linear(input, weight_up))

    return gated


def _apex_adam(call):
    from apex.optimizers import FusedAdam

    _need(call.device == "cuda", "runs on GPUs alone")
    return lambda params: FusedAdam(params, adam_w_mode=True, weight_decay=1e-2)


def _transformer_engine_adam(call):
    from transformer_engine.pytorch.optimizers import FusedAdam

    _need(call.device == "cuda", "runs on GPUs alone")
    return lambda params: FusedAdam(params, adam_w_mode=True, weight_decay=1e-2)


def _bitsandbytes_adam(call):
    from bitsandbytes.optim import AdamW32bit

    return lambda params: AdamW32bit(params, weight_decay=1e-2)


def _torchao_adam(call):
    from torchao.optim import _AdamW  # its AdamW with states of the parameters' dtype, compiled by torch

    return lambda params: _AdamW(params, weight_decay=1e-2)


ATTENTION, GATED, ADAM = "attention", "gated_linear_act", "adam"
_TRANSFORMER_ENGINE: dict[str, Callable] = {ATTENTION: _transformer_engine_attention, ADAM: _transformer_engine_adam}
PACKAGES = (
    Package("flash-attn", "flash_attn", {ATTENTION: _flash_attention}),
    Package("xformers", "xformers", {ATTENTION: _xformers}),
    Package("transformer-engine", "transformer_engine", _TRANSFORMER_ENGINE),
    Package("liger-kernel", "liger_kernel", {GATED: _liger_gated}),
    Package("apex", "apex", {ADAM: _apex_adam}),
    Package("bitsandbytes", "bitsandbytes", {ADAM: _bitsandbytes_adam}),
    Package("torchao", "torchao", {ADAM: _torchao_adam}),
)
