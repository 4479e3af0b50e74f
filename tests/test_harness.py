"""`fastlayers train text-classification` from end to end on a very small BERT, and the proof of agreement in it."""

import copy
import json
import math

import pytest
import torch
import transformers

import fastlayers
from fastlayers import cli
from fastlayers.harness import check, data, loop, session
from fastlayers.harness import text_classification as recipe
from fastlayers.harness.config import Config
from fastlayers.harness.dataset import Dataset


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory):
    """A folder with an untrained BERT of two layers and the real tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    transformers.AutoTokenizer.from_pretrained(recipe.model_folder(None)).save_pretrained(folder)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    sizes["initializer_range"] = 0.1  # large enough for attention to attend to something
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory):
    """A CSV file whose two classes are told apart by one word."""
    path = tmp_path_factory.mktemp("data") / "animals.csv"
    rows = [f"number {n} is a {animal},{animal}" for n in range(40) for animal in ("cat", "dog")]
    path.write_text("\n".join(["text,label", *rows, "nobody knows,"]) + "\n")
    return path


@pytest.fixture
def train(small_bert, two_classes, tmp_path, capsys):
    """train(*options) -> (exit status, report.json, what was printed); train.folder: where it is"""

    def run(*options):
        run.folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        common = ["--model", small_bert, "--data", two_classes, "--out", run.folder, "--seq-len", 32, "--batch-size", 8]
        status = cli.main(["train", "text-classification", *map(str, [*common, *options])])
        return status, json.loads((run.folder / "report.json").read_text()), capsys.readouterr().out

    return run


def test_compare_reports_both_and_proves_agreement(train):
    status, report, printed = train("--compare", "--steps", 6)
    assert status == 0
    for what in ("step_seconds", "accuracy", "macro_f1", "losses"):
        assert set(report[what]) == {"pytorch", "fastlayers"}
    assert report["speed_ratio"] == report["step_seconds"]["pytorch"] / report["step_seconds"]["fastlayers"]
    assert report["agreement"]["ok"] and 0.0 < report["agreement"]["worst_deviation"] <= 1.0
    assert report["agreement"]["steps"] == 3 and report["steps"] == 6
    assert all(math.isfinite(loss) for losses in report["losses"].values() for loss in losses)
    assert report["data"]["bad_rows"] == ["line 82: no label in column 'label'"]
    assert report["config"]["seq_len"] == 32 and report["versions"]["torch"] == torch.__version__
    assert "agreement ok" in printed and "speed ratio" in printed and "1 left out: line 82" in printed
    assert (train.folder / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_model_and_data_in_a_short_form(tmp_path):
    options = ["--steps", "2", "--seq-len", "32", "--batch-size", "4", "--check-steps", "1", "--threads", "2"]
    assert cli.main(["train", "text-classification", "--compare", "--out", str(tmp_path), *options]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["agreement"]["ok"] and report["agreement"]["steps"] == 1
    assert report["data"]["train"] + report["data"]["test"] >= 1500 and len(report["data"]["classes"]) >= 8


def test_training_learns_and_the_saved_model_predicts_the_same(train, two_classes):
    status, report, _ = train("--epochs", 12, "--lr", "3e-3")
    assert status == 0
    assert report["accuracy"] == {"fastlayers": 1.0} and "agreement" not in report and "speed_ratio" not in report
    assert (train.folder / "model" / "model.safetensors").is_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(train.folder / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(train.folder / "model")
    inputs = tokenizer(["number 99 is a cat", "number 99 is a dog"], return_tensors="pt")
    predicted = model(**inputs).logits.argmax(-1).tolist()
    assert [model.config.id2label[label] for label in predicted] == ["cat", "dog"]


def test_a_saved_model_can_be_trained_further(train):
    train("--steps", 1)
    status, report, _ = train("--model", train.folder / "model", "--steps", 1)
    assert status == 0 and report["steps"] == 1


def test_the_seed_decides_everything(train):
    curves = [train("--steps", 3, "--seed", seed)[1]["losses"]["fastlayers"] for seed in (1, 1, 2)]
    assert curves[0] == curves[1] != curves[2]


def test_freeze_base_trains_the_head_alone(train, small_bert):
    status, report, _ = train("--freeze-base", "--compare", "--steps", 4)
    assert status == 0 and report["agreement"]["ok"]
    before = transformers.BertModel.from_pretrained(small_bert, add_pooling_layer=True).state_dict()
    after = transformers.AutoModelForSequenceClassification.from_pretrained(train.folder / "model")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.bert.state_dict().items())


def test_a_frozen_body_runs_without_dropout_and_without_autograd(small_bert):
    config = recipe.settle(recipe.Config(model=str(small_bert), freeze_base=True))
    model, _ = recipe.pretrained(config, data.TextData("three", ["a", "b", "c"], [("one", 0)], [("two", 1)]))
    run = loop.start("fastlayers", model, config, steps=3)
    assert type(run.optimizer) is fastlayers.optim.FusedAdam
    assert model.dropout.training and not any(module.training for module in model.bert.modules())
    assert not model.bert(torch.ones(1, 4, dtype=torch.long)).pooler_output.requires_grad
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(train, dtype):
    status, report, _ = train("--dtype", dtype, "--compare", "--steps", 3)
    assert status == 0 and report["agreement"]["ok"]
    assert all(math.isfinite(loss) for losses in report["losses"].values() for loss in losses)


def test_check_steps_of_zero_proves_nothing_and_says_so(train):
    status, report, printed = train("--compare", "--steps", 2, "--check-steps", 0)
    assert status == 1 and not report["agreement"]["ok"] and "not checked" in printed


# The proof has to fail where something is wrong.


@pytest.fixture
def models_and_batch(small_bert, two_classes):
    config = recipe.settle(recipe.Config(model=str(small_bert), data=str(two_classes), seq_len=32, batch_size=8))
    texts = recipe.read_texts(config)
    model, tokenizer = recipe.pretrained(config, texts)
    swapped = copy.deepcopy(model)
    fastlayers.swap_(swapped)
    examples = recipe.encode(tokenizer, texts.train, 32, outputs=2)
    batch = loop.select(examples, loop.batch_indices(len(texts.train), config, step=0), torch.device("cpu"))
    return model.train(), swapped.train(), batch


def agreement_of(models_and_batch, dtype=torch.float32):
    agreement = check.Agreement()
    check.check_step(agreement, *models_and_batch, dtype, seed=0, step=0)
    return agreement


def test_agreement_of_right_models_is_ok_and_leaves_no_trace(models_and_batch):
    model, swapped, _ = models_and_batch
    agreement = agreement_of(models_and_batch)
    assert agreement.ok and agreement.worst_deviation <= 1.0 and not agreement.problems
    assert model.training and swapped.training
    assert all(parameter.grad is None for one in (model, swapped) for parameter in one.parameters())


@pytest.mark.parametrize(
    "name, dtype, factor",
    [
        ("bert.encoder.layer.0.attention.self.query.weight", torch.float32, 1.01),
        ("classifier.bias", torch.float32, 1.0001),
        ("bert.encoder.layer.1.output.dense.weight", torch.bfloat16, 1.5),
        ("bert.encoder.layer.1.output.dense.weight", torch.float16, 1.1),
    ],
)
def test_agreement_fails_on_one_perturbed_gradient(models_and_batch, name, dtype, factor):
    def perturb(gradient):
        return gradient * factor if fastlayers.backends._forced is None else gradient

    dict(models_and_batch[1].named_parameters())[name].register_hook(perturb)
    agreement = agreement_of(models_and_batch, dtype)
    assert not agreement.ok
    assert any(name in problem for problem in agreement.problems)


def test_agreement_fails_where_the_swap_lost_something(models_and_batch):
    model, swapped, batch = models_and_batch
    swapped.bert.encoder.layer[1].attention.self.scaling *= 1.001
    agreement = agreement_of((model, swapped, batch))
    assert not agreement.ok and any("against PyTorch" in problem for problem in agreement.problems)


def test_agreement_fails_on_a_wrong_kernel(models_and_batch, monkeypatch):
    """Outside the reference backend, attention drops a little too little; with dropout off nothing is wrong."""
    right = fastlayers.ops.attention

    def wrong(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
        forced = fastlayers.backends._forced == "reference"
        return right(query, key, value, attn_mask, dropout_p if forced else 0.99 * dropout_p, *args, **kwargs)

    monkeypatch.setattr(fastlayers.ops, "attention", wrong)
    agreement = agreement_of(models_and_batch)
    assert not agreement.ok
    assert all("against the reference" in problem for problem in agreement.problems)


def test_a_failed_agreement_fails_the_command(train, monkeypatch):
    def wrong(*args):
        losses = right(*args)
        return losses * 1.001 if fastlayers.backends._forced is None else losses

    right = check.example_losses
    monkeypatch.setattr(check, "example_losses", wrong)
    status, report, printed = train("--compare", "--steps", 2)
    assert status == 1 and not report["agreement"]["ok"] and report["agreement"]["worst_deviation"] > 1.0
    assert "FAILED" in printed


def test_dropout_masks_of_the_check_do_not_depend_on_the_dtype():
    masks = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        with check.SameDropout():
            masks.append(torch.nn.functional.dropout(torch.ones(64, 33, dtype=dtype), 0.25) != 0)
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert 0.2 < 1 - masks[0].double().mean() < 0.3


def test_an_example_that_a_rounding_decides_is_left_out():
    """One argument of the second example's ReLU is 1e-9; with 16 bits that says nothing, nor where most are so."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    batch = {"input": torch.tensor([[1.0, -2.0], [1.0, 1e-9], [3.0, 0.5]]), "labels": torch.tensor([0, 1, 0])}
    found, steady = check.exact_and_steady(model, batch, torch.float32, seed=0)
    assert steady.tolist() == [True, False, True] and found["loss"][1] == 0 and found["loss"][0] > 0
    batch["input"][0, 1] = 0.0
    assert check.exact_and_steady(model, batch, torch.float32, seed=0)[1].all()


def test_runs_take_turns_and_see_the_same_seeds(tmp_path, monkeypatch):
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.name = torch.nn.Parameter(torch.ones(2, 2)), "pytorch"

        def forward(self, input):
            if self.training:
                seen.append((self.name, torch.rand(()).item()))
            return input @ self.weight

    def swap(model):
        model.name = "fastlayers"
        return fastlayers.swap.SwapReport()

    seen = []
    monkeypatch.setattr(fastlayers, "swap_", swap)
    examples = {"input": torch.eye(2), "labels": torch.tensor([0, 1])}
    job = session.Job(
        "two", Recorder(), Dataset("two", examples, examples, ["a", "b"], {"a": 1, "b": 1}), lambda *_: None, str
    )
    session.run(job, Config(compare=True, check_steps=0, batch_size=2, epochs=4, out=str(tmp_path)))
    assert [name for name, _ in seen] == ["pytorch", "fastlayers", "fastlayers", "pytorch"] * 2
    draws = {name: [draw for who, draw in seen if who == name] for name in ("pytorch", "fastlayers")}
    assert draws["pytorch"] == draws["fastlayers"] and len(set(draws["pytorch"])) == 4
