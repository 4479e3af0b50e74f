"""FusedMultiheadAttention and FusedTransformerEncoderLayer against torch's own."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlayers
from fastlayers.nn import FusedMultiheadAttention, FusedTransformerEncoderLayer
from tests.modules import MODULE_BACKENDS, assert_agrees, assert_same_module, copied, leaf, run
from tests.numerics import assert_accurate

BATCH, HEADS, SEQ_Q, SEQ_K, EMBED = 3, 4, 5, 7, 32


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(dtype=torch.float32, **options):
    original = nn.MultiheadAttention(EMBED, HEADS, **options).to(dtype)
    for parameter in original.parameters():  # biases start at 0, which would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    fused = FusedMultiheadAttention(EMBED, HEADS, **options).to(dtype)
    fused.load_state_dict(original.state_dict())
    return original, fused


def some_true(*shape):
    """A bool mask, a third of it True, that masks out no whole row."""
    mask = torch.rand(*shape) < 0.33
    mask[..., 0] = False
    return mask


def causal(size):
    return nn.Transformer.generate_square_subsequent_mask(size)


MASKS = {
    "none": lambda q, k: {},
    "bool": lambda q, k: {"attn_mask": some_true(q, k)},
    "bool per head": lambda q, k: {"attn_mask": some_true(BATCH * HEADS, q, k)},
    "float": lambda q, k: {"attn_mask": leaf(q, k)},
    "float per head": lambda q, k: {"attn_mask": leaf(BATCH * HEADS, q, k)},
    "padding": lambda q, k: {"key_padding_mask": some_true(BATCH, k)},
    "float padding": lambda q, k: {"key_padding_mask": torch.randn(BATCH, k)},
    "both bool": lambda q, k: {"attn_mask": some_true(q, k), "key_padding_mask": some_true(BATCH, k)},
    "both float": lambda q, k: {"attn_mask": torch.randn(q, k), "key_padding_mask": torch.randn(BATCH, k)},
}
LAYOUTS = {
    "batch_first": {"batch_first": True},
    "sequence first": {},
    "bias_kv and zero": {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    "kdim and vdim": {"batch_first": True, "kdim": 20, "vdim": 24},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_multihead_attention(layout, mask, need_weights):
    options = LAYOUTS[layout]
    original, fused = pair(**options)
    shapes = [
        (BATCH, SEQ_Q, EMBED),
        (BATCH, SEQ_K, options.get("kdim", EMBED)),
        (BATCH, SEQ_K, options.get("vdim", EMBED)),
    ]
    if not options.get("batch_first"):
        shapes = [(s, b, e) for b, s, e in shapes]
    inputs = [leaf(*shape) for shape in shapes]
    kwargs = {"need_weights": need_weights, "average_attn_weights": False, **MASKS[mask](SEQ_Q, SEQ_K)}
    assert_same_module(original, fused, *inputs, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_self_attention(dtype, need_weights):
    original, fused = pair(dtype, batch_first=True)
    x = leaf(BATCH, SEQ_Q, EMBED, dtype=dtype)
    assert_same_module(original, fused, x, x, x, need_weights=need_weights)


def test_key_is_value():
    original, fused = pair(batch_first=True)
    memory = leaf(BATCH, SEQ_K, EMBED)
    assert_same_module(original, fused, leaf(BATCH, SEQ_Q, EMBED), memory, memory, need_weights=False)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", ["batch_first", "sequence first", "bias_kv and zero"])
def test_causal_hint(layout, padded, need_weights):
    original, fused = pair(**LAYOUTS[layout])
    x = leaf(BATCH, SEQ_Q, EMBED) if layout != "sequence first" else leaf(SEQ_Q, BATCH, EMBED)
    kwargs = {"attn_mask": causal(SEQ_Q), "is_causal": True, "need_weights": need_weights}
    if padded:
        kwargs["key_padding_mask"] = torch.zeros(BATCH, SEQ_Q).masked_fill(some_true(BATCH, SEQ_Q), float("-inf"))
    assert_same_module(original, fused, x, x, x, **kwargs)


@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched(need_weights):
    original, fused = pair()
    q, k = leaf(SEQ_Q, EMBED), leaf(SEQ_K, EMBED)
    kwargs = {"key_padding_mask": some_true(SEQ_K), "attn_mask": some_true(HEADS, SEQ_Q, SEQ_K)}
    assert_same_module(original, fused, q, k, k, need_weights=need_weights, **kwargs)


@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_that_attend_to_nothing_give_the_bias_alone(need_weights):
    _, fused = pair(batch_first=True)
    x = leaf(BATCH, SEQ_Q, EMBED)
    padding = torch.zeros(BATCH, SEQ_Q, dtype=torch.bool)
    padding[1] = True
    out, weights = fused(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(out[1], fused.out_proj.bias.expand(SEQ_Q, EMBED))
    assert weights is None or not weights[1].any()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in fused.parameters()) and x.grad.isfinite().all()


@pytest.mark.parametrize("average", [False, True])
def test_weights_have_torchs_shape(average):
    original, fused = pair(batch_first=True)
    x = torch.randn(BATCH, SEQ_Q, EMBED)
    for inputs in (x, x[0]):
        wanted = original(inputs, inputs, inputs, average_attn_weights=average)[1]
        assert fused(inputs, inputs, inputs, average_attn_weights=average)[1].shape == wanted.shape


def test_eval_and_no_grad_as_torchs_fast_path():
    original, fused = pair(batch_first=True)
    original.eval(), fused.eval()
    x = torch.randn(BATCH, SEQ_Q, EMBED)
    with torch.no_grad():
        wanted, ours = original(x, x, x)[0], fused(x, x, x, need_weights=False)[0]
        exact = copy.deepcopy(original).double()(x.double(), x.double(), x.double())[0]
    assert_accurate(ours, exact, wanted)


@pytest.mark.parametrize("backend", MODULE_BACKENDS)
def test_dropout_draws_the_masks_of_the_reference(backend):
    _, fused = pair(batch_first=True, dropout=0.3)
    x = leaf(BATCH, 33, EMBED)
    found = {}
    for name, dtype in (("ours", torch.float32), ("eager", torch.float32), ("exact", torch.float64)):
        with fastlayers.use_backend(backend if name == "ours" else "reference"):
            torch.manual_seed(3)
            module, y = copy.deepcopy(fused).to(dtype), x.detach().to(dtype).requires_grad_()
            found[name] = run(module, (y, y, y), {"need_weights": False})
    assert_agrees(**found)
    torch.manual_seed(4)
    y = x.detach().clone().requires_grad_()
    assert not torch.equal(run(fused, (y, y, y), {"need_weights": False})["output 0"], found["ours"]["output 0"])
    assert torch.equal(fused.eval()(x, x, x)[0], fused(x, x, x)[0])


def test_dropout_with_weights_returns_what_was_used():
    _, fused = pair(batch_first=True, dropout=0.5)
    x = torch.randn(BATCH, SEQ_Q, EMBED)
    _, weights = fused(x, x, x, average_attn_weights=False)
    assert (weights == 0).any() and not (weights == 0).all()


def test_autocast():
    original, fused = pair(batch_first=True)
    x = leaf(BATCH, SEQ_Q, EMBED)
    assert_same_module(original, fused, x, x, x, need_weights=False, autocast=torch.bfloat16)


def test_state_dict_both_ways_and_pickle():
    original, fused = pair(add_bias_kv=True, kdim=20)
    assert list(original.state_dict()) == list(fused.state_dict())
    original.load_state_dict(fused.state_dict())
    q, k, v = torch.randn(SEQ_Q, BATCH, EMBED), torch.randn(SEQ_K, BATCH, 20), torch.randn(SEQ_K, BATCH, EMBED)
    for copy_of_fused in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copy_of_fused(q, k, v)[0], fused(q, k, v)[0])


def test_compiles_into_one_graph():
    _, fused = pair(batch_first=True)
    x = leaf(BATCH, SEQ_Q, EMBED)
    kwargs = {"attn_mask": some_true(SEQ_Q, SEQ_Q), "key_padding_mask": some_true(BATCH, SEQ_Q), "need_weights": False}
    wanted = fused(x, x, x, **kwargs)[0]
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, x, x, **kwargs)[0], wanted)


def test_bad_arguments():
    _, fused = pair(batch_first=True)
    x = torch.randn(BATCH, SEQ_Q, EMBED)
    with pytest.raises(RuntimeError, match="attn_mask"):
        fused(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask has to be \(..., 5, 5\)"):
        fused(x, x, x, attn_mask=torch.zeros(1, SEQ_Q))
    with pytest.raises(ValueError, match="in_features 32, input has 8"):
        fused(x[..., :8], x, x)
    with pytest.raises(AssertionError, match="key_padding_mask"):
        fused(x, x, x, key_padding_mask=torch.zeros(SEQ_Q))
    with pytest.raises(ValueError, match="seqlen"):
        fused(x, x, x[:, :3], need_weights=False)
    with pytest.raises(AssertionError, match="divisible"):
        FusedMultiheadAttention(10, 3)


def layers(dtype=torch.float32, **options):
    options = {"dropout": 0.0, "batch_first": True, **options}
    original = nn.TransformerEncoderLayer(EMBED, HEADS, 48, **options).to(dtype)
    fused = FusedTransformerEncoderLayer(EMBED, HEADS, 48, **options).to(dtype)
    fused.load_state_dict(original.state_dict())
    return original, fused


@pytest.mark.parametrize("norm_first, bias", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu, nn.GELU(approximate="tanh"), nn.Mish()])
def test_encoder_layer(activation, norm_first, bias):
    original, fused = layers(activation=activation, norm_first=norm_first, bias=bias)
    x = leaf(BATCH, SEQ_Q, EMBED)
    assert_same_module(original, fused, x, src_key_padding_mask=some_true(BATCH, SEQ_Q))
    assert_same_module(original, fused, x, src_mask=causal(SEQ_Q), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encoder_layer_in_low_precision(dtype):
    original, fused = layers(dtype, batch_first=False)
    assert_same_module(original, fused, leaf(SEQ_Q, BATCH, EMBED, dtype=dtype), src_mask=torch.randn(SEQ_Q, SEQ_Q))


def test_encoder_layer_autocast():
    original, fused = layers(activation="gelu")
    assert_same_module(original, fused, leaf(BATCH, SEQ_Q, EMBED), autocast=torch.bfloat16)


def test_encoder_layer_has_torchs_dropouts():
    original, fused = layers(dropout=0.25)
    original.self_attn.dropout = fused.self_attn.dropout = 0.0  # its masks are Philox', not torch's
    x = leaf(BATCH, SEQ_Q, EMBED)
    results = []
    for module in (original, fused):
        torch.manual_seed(5)
        results.append(run(module, copied((x,)), {})["output 0"])
    assert torch.equal(results[0] == 0, results[1] == 0)
    assert fused.self_attn(x, x, x)[1].shape == (BATCH, SEQ_Q, SEQ_Q)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_with_nested_tensors_in_eval_mode():
    original, fused = (nn.TransformerEncoder(layer, 2).eval() for layer in layers())
    x, padding = torch.randn(BATCH, SEQ_Q, EMBED), torch.zeros(BATCH, SEQ_Q, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        assert torch.equal(fused(x, src_key_padding_mask=padding), original(x, src_key_padding_mask=padding))


def test_encoder_layer_keeps_torchs_hooks_and_wrappers():
    _, fused = layers()
    seen = []
    fused.linear1.register_forward_hook(lambda module, args, output: seen.append(output.min()))
    fused(torch.randn(BATCH, SEQ_Q, EMBED))
    assert len(seen) == 1 and seen[0] < 0  # the hook sees the Linear's output, before relu


def test_encoder_layer_copy_pickle_and_compile():
    _, fused = layers()
    x = torch.randn(BATCH, SEQ_Q, EMBED)
    wanted = fused(x)
    for module in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(module(x), wanted)
    assert torch.equal(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), wanted)
