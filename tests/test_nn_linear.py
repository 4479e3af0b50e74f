"""FusedLinear, FusedMLP and GatedMLP against the plain modules they stand for."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlayers.nn import FusedLinear, FusedMLP, GatedMLP
from fastlayers.reference import ACTIVATIONS
from tests.modules import assert_identical, assert_same_module, leaf, run


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Function(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return ACTIVATIONS[self.name](x)


class PlainGated(nn.Module):
    def __init__(self, bias, out_features):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(13, 29, bias=bias), nn.Linear(13, 29, bias=bias)
        self.down_proj = nn.Linear(29, out_features, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_linear(activation, dtype):
    linear = nn.Linear(19, 37).to(dtype)
    fused = FusedLinear(19, 37, activation=activation, dtype=dtype)
    fused.load_state_dict(linear.state_dict())

    class Plain(nn.Linear):  # the parameters' names have to be those of fused
        def forward(self, x):
            return ACTIVATIONS[activation](super().forward(x))

    plain = Plain(19, 37).to(dtype)
    plain.load_state_dict(fused.state_dict())
    assert_same_module(plain, fused, leaf(5, 7, 19, dtype=dtype))


def test_fused_linear_options():
    fused = FusedLinear(8, 16, bias=False, activation="silu", save="input", dtype=torch.bfloat16)
    assert fused.bias is None and fused.weight.dtype == torch.bfloat16
    assert "bias=False" in repr(fused) and "activation=silu" in repr(fused)
    x = leaf(3, 8, dtype=torch.bfloat16)
    keeping = copy.deepcopy(fused)
    keeping.save = "preactivation"
    assert_identical(run(fused, (copy.deepcopy(x),), {}), run(keeping, (copy.deepcopy(x),), {}))


@pytest.mark.parametrize("wrong", [{"activation": "swoosh"}, {"save": "everything"}])
def test_fused_linear_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        FusedLinear(8, 16, **wrong)


def test_fused_linear_bad_input():
    with pytest.raises(ValueError, match="in_features"):
        FusedLinear(8, 16)(torch.randn(3, 9))


def test_fused_mlp():
    fused = FusedMLP(12, 40, 20)
    plain = nn.Sequential()
    plain.add_module("fc1", nn.Linear(12, 40))
    plain.add_module("act", nn.GELU())
    plain.add_module("fc2", nn.Linear(40, 20))
    plain.load_state_dict(fused.state_dict())
    assert_same_module(plain, fused, leaf(6, 12))
    assert FusedMLP(12, 40).fc2.out_features == 12


def test_fused_mlp_drops_hidden_units_in_training_only():
    fused = FusedMLP(12, 40, dropout=0.5)
    x = torch.randn(6, 12)
    assert not torch.equal(fused(x), fused(x))
    fused.eval()
    assert torch.equal(fused(x), fused(x))


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp(bias):
    plain = PlainGated(bias, 13)
    fused = GatedMLP(13, 29, bias=bias)
    fused.load_state_dict(plain.state_dict())
    assert_same_module(plain, fused, leaf(2, 5, 13))


def test_gated_mlp_bad_activation():
    with pytest.raises(ValueError, match="swoosh"):
        GatedMLP(8, 16, activation="swoosh")


@pytest.mark.parametrize("kind", [FusedLinear, FusedMLP, GatedMLP])
def test_copy_pickle_and_compile(kind):
    module = kind(8, 16, activation="gelu")
    wanted = run(module, (leaf_8 := leaf(4, 8),), {})
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        leaf_8.grad = None
        assert_identical(run(copied, (leaf_8,), {}), wanted)
    leaf_8.grad = None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = run(compiled, (leaf_8,), {})
    assert_identical({k.replace("_orig_mod.", ""): v for k, v in found.items()}, wanted)
