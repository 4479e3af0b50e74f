"""swap_ and unswap_ on models made of torch's own modules."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import fastlayers
from fastlayers.nn import FusedLinear, FusedMultiheadAttention, FusedTransformerEncoderLayer
from tests.modules import assert_identical, assert_same_module, leaf, run


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Chain(nn.Module):
    """A module that runs its children one after the other."""

    def __init__(self, activation=None):
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.act = activation or nn.GELU()
        self.fc2 = nn.Linear(16, 8)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        x = self.fc2(x)
        return x


class Nested(Chain):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Other(Chain):
    """Looks like Chain, computes something else."""

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x) + 1
        return self.fc2(x)


class Model(nn.Module):
    """One of everything."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
        self.chain, self.nested, self.gated = Chain(), Nested(), Gated()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.encoder(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.gated(self.nested(self.chain(self.mlp(x)))))


def pair(make=Model):
    original = make()
    swapped = copy.deepcopy(original)
    return original, swapped, fastlayers.swap_(swapped)


def kinds(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_model_computes_the_same(dtype):
    original, swapped, _ = pair(lambda: Model().to(dtype))
    assert_same_module(original, swapped, leaf(2, 5, 8, dtype=dtype))


def test_swapped_model_under_autocast():
    original, swapped, _ = pair()
    assert_same_module(original, swapped, leaf(2, 5, 8), autocast=torch.bfloat16)


def test_names_parameters_flags_and_hooks_stay():
    model = Model()
    model.head.weight.requires_grad_(False)
    model.mlp.eval()
    calls = []
    model.head.register_forward_hook(lambda *a: calls.append("forward"))
    model.head.register_forward_pre_hook(lambda *a: calls.append("pre"))
    before = (dict(model.named_parameters()), list(model.state_dict()), [m.training for m in model.modules()])
    modules = list(model.modules())
    fastlayers.swap_(model)
    assert list(model.modules()) == modules
    assert all(p is before[0][name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == before[1]
    assert [m.training for m in model.modules()] == before[2]
    assert not model.head.weight.requires_grad
    model(torch.randn(1, 2, 8))
    assert calls == ["pre", "forward"]


def test_isinstance_still_holds():
    original, swapped, _ = pair()
    for was, now in zip(original.modules(), swapped.modules()):
        assert isinstance(now, type(was))


def test_an_optimizer_made_before_the_swap_trains_it():
    swapped = Model()
    optimizer = torch.optim.SGD(swapped.parameters(), lr=0.1)
    fastlayers.swap_(swapped)
    before = [p.detach().clone() for p in swapped.parameters()]
    swapped(torch.randn(2, 5, 8)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, was) for p, was in zip(swapped.parameters(), before) if p.grad.any())


def test_report():
    _, _, report = pair()
    found = {entry.name: (entry.kind, entry.note) for entry in report.swapped}
    assert found["head"] == ("Linear", "FusedLinear")
    assert found["attention"] == ("MultiheadAttention", "FusedMultiheadAttention")
    assert found["encoder.layers.1"] == ("TransformerEncoderLayer", "FusedTransformerEncoderLayer")
    assert found["mlp"] == ("Sequential", "0+1, 2+3 in one op")
    assert found["chain"] == ("Chain", "fc1+act in one op")
    assert found["nested"] == ("Nested", "fc1+act in one op")
    assert found["gated"] == ("Gated", "gate+act in one op")
    assert report.left == [] and report.already == 0
    table = str(report)
    assert f"swapped {len(report.swapped)} modules, left 0" in table
    assert "encoder.layers.*.self_attn" in table and "x2" in table


def test_swapping_twice_is_harmless():
    original, swapped, first = pair()
    classes = kinds(swapped)
    second = fastlayers.swap_(swapped)
    assert kinds(swapped) == classes
    assert (second.swapped, second.left, second.already) == ([], [], len(first.swapped))
    fastlayers.unswap_(swapped)
    assert kinds(swapped) == kinds(original)


def test_unswap_restores_exactly():
    original, swapped, _ = pair()
    attributes = [set(m.__dict__) for m in original.modules()]
    fastlayers.unswap_(swapped)
    assert kinds(swapped) == kinds(original)
    assert [set(m.__dict__) for m in swapped.modules()] == attributes
    x = leaf(2, 5, 8)
    wanted = run(original, (x.detach().requires_grad_(),), {})
    assert_identical(run(swapped, (x,), {}), wanted)
    fastlayers.unswap_(swapped)
    assert kinds(swapped) == kinds(original)


def test_unswap_leaves_modules_that_were_made_fused():
    model = nn.Sequential(FusedLinear(4, 4), nn.Linear(4, 4))
    fastlayers.swap_(model)
    fastlayers.unswap_(model)
    assert kinds(model) == [nn.Sequential, FusedLinear, nn.Linear]


def test_unswap_of_a_part():
    original, swapped, _ = pair()
    fastlayers.unswap_(swapped.encoder)
    assert kinds(swapped.encoder) == kinds(original.encoder)
    assert type(swapped.head) is FusedLinear


def test_filter_fn():
    model = Model()
    seen = {}

    def only_attention(name, module):
        seen[name] = type(module)
        return isinstance(module, nn.MultiheadAttention)

    report = fastlayers.swap_(model, filter_fn=only_attention, strict=True)  # strict does not mind the filter
    assert type(model.attention) is FusedMultiheadAttention and type(model.head) is nn.Linear
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert {e.note for e in report.left} == {"filter_fn"} and seen["head"] is nn.Linear
    assert fastlayers.swap_(model).already == 3


def test_state_dict_both_ways_and_saving():
    original, swapped, _ = pair()
    original.load_state_dict(swapped.state_dict())
    swapped.load_state_dict(original.state_dict())
    file = io.BytesIO()
    torch.save(swapped, file)
    file.seek(0)
    x = torch.randn(2, 5, 8)
    assert torch.equal(torch.load(file, weights_only=False)(x), swapped(x))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_swapped_and_can_be_unswapped(how):
    original, swapped, _ = pair()
    twin = how(swapped)
    assert kinds(twin) == kinds(swapped)
    x = torch.randn(2, 5, 8)
    assert torch.equal(twin(x), swapped(x))
    fastlayers.unswap_(twin)
    assert kinds(twin) == kinds(original) and type(swapped.head) is FusedLinear


def test_compiles_into_one_graph():
    _, swapped, _ = pair()
    x = leaf(2, 5, 8)
    wanted = run(swapped, (x,), {})
    x.grad = None
    found = run(torch.compile(swapped, fullgraph=True, backend="aot_eager"), (x,), {})
    assert_identical({k.replace("_orig_mod.", ""): v for k, v in found.items()}, wanted)


def test_tied_and_shared_modules_are_handled_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.second.weight = self.first.weight
            act = nn.Tanh()
            self.body = nn.Sequential(self.first, act, self.second, act, self.first)

        def forward(self, x):
            return self.body(x)

    original, swapped, report = pair(Tied)
    assert swapped.first is swapped.body[0] is swapped.body[4]
    assert swapped.second.weight is swapped.first.weight
    assert [e.name for e in report.swapped] == ["first", "second", "body"]
    assert_same_module(original, swapped, leaf(3, 8))


ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh()]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.LeakyReLU(), F.relu, torch.tanh], ids=repr)
def test_activations(activation, monkeypatch):
    calls = []
    real = fastlayers.ops.linear_act
    monkeypatch.setattr(fastlayers.ops, "linear_act", lambda *a, **k: calls.append(a[3]) or real(*a, **k))
    original, swapped, report = pair(lambda: Chain(activation))
    assert "chain" not in report.left and len(report.swapped) == 3
    assert_same_module(original, swapped, leaf(3, 8))
    assert len(calls) == 2 and calls[0] != "identity" and calls[1] == "identity"


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.Mish(), nn.Hardtanh()], ids=repr)
def test_activations_that_the_ops_do_not_have(activation):
    original, swapped, report = pair(lambda: nn.Sequential(nn.Linear(8, 8), activation))
    assert [(e.name, e.kind) for e in report.left] == [("0", "Linear")]
    assert "do not have this activation" in report.left[0].note
    assert_same_module(original, swapped, leaf(3, 8))
    with pytest.raises(ValueError, match=f"not fused with {type(activation).__name__}"):
        fastlayers.swap_(original, strict=True)
    assert kinds(original)[:2] == [nn.Sequential, nn.Linear]  # strict changed nothing


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_instance_forward():
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: Doubled(8, 8), "a subclass of Linear"),
        (with_instance_forward, "forward was replaced"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), "not floating-point"),
        (Other, "does not know its forward"),
        (lambda: parametrize.register_parametrization(nn.Linear(8, 8), "weight", nn.Identity()), "a subclass"),
    ],
)
def test_left_with_a_reason(make, why):
    module = make()
    kind = type(module)
    report = fastlayers.swap_(nn.ModuleList([module]))
    assert type(module) is kind
    assert [e.name for e in report.left] == ["0"] and why in report.left[0].note
    with pytest.raises(ValueError, match=why):
        fastlayers.swap_(module, strict=True)


@pytest.mark.parametrize("child", [0, 1])
def test_hooks_are_never_bypassed(child):
    hooked = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    seen = []
    hooked[child].register_forward_hook(lambda module, args, output: seen.append(output))
    report = fastlayers.swap_(hooked)
    assert "hook" in report.left[0].note
    hooked(torch.randn(2, 8))
    assert len(seen) == 1

    later = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    fastlayers.swap_(later)
    later[child].register_forward_hook(lambda module, args, output: seen.append(output))
    later(torch.randn(2, 8))
    assert len(seen) == 2


def test_children_replaced_after_the_swap_run():
    """As adapters such as LoRA do it."""
    model = Chain()
    fastlayers.swap_(model)
    model.fc1 = Doubled(8, 16)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), model.fc2(model.act(model.fc1(x))))


def test_a_sequential_can_still_be_sliced_and_called_by_keyword():
    _, swapped, _ = pair()
    x = torch.randn(2, 8)
    assert torch.equal(swapped.mlp[:1](x), swapped.mlp[0](x))
    assert torch.equal(swapped.chain(x=x), swapped.chain(x))


def test_frozen_and_device_and_dtype_moves():
    _, swapped, _ = pair()
    swapped.requires_grad_(False).to(torch.bfloat16)
    assert swapped(torch.randn(1, 2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    swapped.to("meta")
    assert swapped(torch.randn(1, 2, 8, dtype=torch.bfloat16, device="meta")).device.type == "meta"


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model has to be a torch.nn.Module, got list"):
        fastlayers.swap_([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"unswap_: model has to be a torch.nn.Module, got NoneType"):
        fastlayers.unswap_(None)
    with pytest.raises(TypeError, match="filter_fn has to be callable"):
        fastlayers.swap_(nn.Linear(2, 2), filter_fn="head")


def test_the_model_itself_can_be_swapped():
    linear, layer = nn.Linear(4, 4), nn.TransformerEncoderLayer(8, 2, batch_first=True)
    assert str(fastlayers.swap_(linear)).count("(model)") == 1
    fastlayers.swap_(layer)
    assert type(linear) is FusedLinear and type(layer) is FusedTransformerEncoderLayer


def test_a_whole_transformer():
    """Encoder, decoder and cross attention; tgt_mask and padding."""
    original, swapped, report = pair(lambda: nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True))
    assert not report.left
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert_same_module(
        original,
        swapped,
        leaf(2, 5, 16),
        leaf(2, 4, 16),
        tgt_mask=mask,
        tgt_is_causal=True,
        memory_key_padding_mask=padding,
    )
