"""Third-party packages in fastlayers bench: found, checked before they are timed, and never needed."""

import importlib
import sys
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F

from fastlayers.benchmarks import adam, attention, others
from fastlayers.benchmarks.runner import OURS, Candidate, Setting, Skip, run_case

TORCHAO = """
import torch

class _AdamW(torch.optim.AdamW):
    pass
"""
WRONG = (
    TORCHAO
    + """
    def step(self):
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                param.data.mul_(1.01)
"""
)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(distribution, {path: text}, version): a small package of that name, until the test ends."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, files, version="1.2.3"):
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {package.module for package in others.PACKAGES}:
            del sys.modules[name]


def small(device="cpu"):
    return adam.Call(device, "float32", ((4, 4), (3,)))


def candidates(call):
    return adam._candidates(call)


def absent(package):
    return package not in {name.split(" ")[0] for name in others.versions()}


def test_what_is_not_installed_is_said():
    found = candidates(small())
    for name in ("apex", "bitsandbytes", "torchao", "transformer-engine"):
        if absent(name):
            assert str(found[name]) == "not installed"


def test_a_package_is_found_checked_and_timed(install):
    install("torchao", {"torchao/__init__.py": "", "torchao/optim.py": TORCHAO})
    assert "torchao 1.2.3" in others.versions()
    case = adam._case(Setting(), small(), "small", adam.Place(), {})
    found = {result.candidate: result for result in run_case(case, seconds=0)}
    assert found["torchao 1.2.3"].seconds and found["torchao 1.2.3"].deviation <= 1


def test_a_package_that_is_wrong_is_not_timed(install):
    install("torchao", {"torchao/__init__.py": "", "torchao/optim.py": WRONG})
    case = adam._case(Setting(), small(), "small", adam.Place(), {})
    found = {result.candidate: result for result in run_case(case, seconds=0)}
    wrong = found["torchao 1.2.3"]
    assert "error" in wrong.problem and not wrong.seconds and found[OURS].seconds


@pytest.mark.parametrize(
    "text, reason",
    [
        ("raise ImportError('libcuda.so.1: cannot open')", "cannot be imported: ImportError: libcuda.so.1"),
        ("_AdamW = None", "TypeError: "),
    ],
)
def test_a_broken_package_stops_nobody(install, text, reason):
    install("torchao", {"torchao/__init__.py": "", "torchao/optim.py": text})
    found = candidates(small())
    assert reason in str(found["torchao 1.2.3"]) and isinstance(found[OURS], Candidate)


FLASH = """
import torch.nn.functional as F

def flash_attn_func(query, key, value, dropout_p, causal, window_size):
    assert query.shape[1:] == (16, 2, 8) and window_size == (-1, -1), (query.shape, window_size)
    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(*tensors, dropout_p=dropout_p, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)
"""
XFORMERS = """
import torch.nn.functional as F

class LowerTriangularMask:
    pass

def memory_efficient_attention(query, key, value, p, attn_bias):
    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*tensors, dropout_p=p, is_causal=attn_bias is not None).transpose(1, 2)
"""
ENGINE = """
import torch.nn.functional as F

class DotProductAttention:
    def __init__(self, heads, head_dim, *, attn_mask_type, qkv_format, **options):
        assert qkv_format == "bshd"
        self.causal = attn_mask_type == "causal"

    def __call__(self, query, key, value):
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*tensors, is_causal=self.causal).transpose(1, 2).flatten(2)
"""
ATTENTION_PACKAGES = {
    "flash-attn": ("flash_attn/__init__.py", FLASH),
    "xformers": ("xformers/ops.py", XFORMERS),
    "transformer-engine": ("transformer_engine/pytorch.py", ENGINE),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ATTENTION_PACKAGES)
def test_layouts_and_options_of_attention(install, name, is_causal):
    """The adapter on CPU tensors, of a call that says that it is on a GPU."""
    path, text = ATTENTION_PACKAGES[name]
    install(name, {path: text})
    call = attention.Call("cuda", "bfloat16", 3, 2, 16, 8, is_causal=is_causal)
    made = others.makers(others.ATTENTION, lambda adapter: adapter(call))[f"{name} 1.2.3"]()
    tensors = torch.randn(3, 3, 2, 16, 8).bfloat16()
    wanted = F.scaled_dot_product_attention(*tensors, is_causal=is_causal)
    assert torch.equal(made(*tensors), wanted)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"device": "cpu"}, "runs on GPUs alone"),
        ({"dtype": "float32"}, "takes float16 and bfloat16 alone"),
        ({"decodes": True}, "no adapter for padded or packed sequences and caches"),
        ({"window": 3, "is_causal": True}, "no adapter for windows"),
        ({"group": 2}, "no adapter for grouped heads"),
    ],
)
def test_what_a_package_does_not_take_is_said(install, options, reason):
    install("xformers", {"xformers/ops.py": XFORMERS})
    call = attention.replace(attention.Call("cuda", "bfloat16", 3, 2, 16, 8), **options)
    with pytest.raises(Skip, match=reason):
        others.makers(others.ATTENTION, lambda adapter: adapter(call))["xformers 1.2.3"]()


def test_every_other_adapter_reaches_its_package(install):
    """Each is asked as on a GPU, of stand-ins that do what torch does."""
    fused = "import torch\nfrom functools import partial\nFusedAdam = lambda params, adam_w_mode, weight_decay: "
    fused += "torch.optim.AdamW(params, weight_decay=weight_decay)\n"
    gated = (
        "import torch.nn.functional as F\nclass LigerSiLUMulFunction:\n    @staticmethod\n    def apply(gate, up):\n"
    )
    gated += "        return F.silu(gate) * up\n"
    install("apex", {"apex/optimizers.py": fused})
    engine = {"transformer_engine/pytorch/__init__.py": "", "transformer_engine/pytorch/optimizers.py": fused}
    install("transformer-engine", engine)
    install("bitsandbytes", {"bitsandbytes/optim.py": "from torch.optim import AdamW as AdamW32bit\n"})
    install("liger-kernel", {"liger_kernel/ops/swiglu.py": gated})
    params = [torch.ones(2, requires_grad=True)]
    for name in ("apex", "transformer-engine", "bitsandbytes"):
        make = others.makers(others.ADAM, lambda adapter: adapter(small("cuda")))[f"{name} 1.2.3"]()
        assert make(params).defaults["weight_decay"] == 1e-2
    gate = others.makers(others.GATED, lambda adapter: adapter(small("cuda")))["liger-kernel 1.2.3"]()
    x, weight_gate, weight_up = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 4)
    wanted = F.silu(F.linear(x, weight_gate)) * F.linear(x, weight_up)
    assert torch.equal(gate(x, weight_gate, weight_up), wanted)


def test_versions_are_those_of_pip(install):
    install("flash-attn", {"flash_attn/__init__.py": ""}, version="9.9")
    assert "flash-attn 9.9" in others.versions() and metadata.version("flash-attn") == "9.9"
