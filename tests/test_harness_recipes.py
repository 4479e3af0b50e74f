"""Each recipe in a short form, its data good and bad, tuning, the example with Hugging Face's Trainer, and one step of
one neuron against the calculation by hand."""

import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import fastlayers
from fastlayers import cli
from fastlayers.harness import UserError, data, gpt, images, metrics, mnist_cnn, tune


def run(folder, *options):
    """exit status, report.json"""
    status = cli.main([*map(str, options), "--out", str(folder)])
    return status, json.loads((folder / "report.json").read_text())


# Digits.


@pytest.mark.parametrize("recipe, steps, accuracy", [("mnist-mlp", 90, 0.8), ("mnist-cnn", 60, 0.6)])
def test_digits_are_learnt_and_both_agree(recipe, steps, accuracy, tmp_path, capsys):
    status, report = run(tmp_path, "train", recipe, "--compare", "--steps", steps, "--check-steps", 2)
    assert status == 0 and report["agreement"]["ok"] and report["agreement"]["steps"] == 2
    assert report["data"]["train"] == 4000 and report["data"]["test"] == 1000
    assert min(report["accuracy"].values()) > accuracy
    found = capsys.readouterr().out.split("loaded back into a new model: accuracy ")[1]
    assert found.startswith(f"{report['accuracy']['fastlayers']:.1%}")


def test_the_convolutions_fit_the_layers_behind_them():
    model = mnist_cnn.make_model(10)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10) and model[6].in_features == 64 * 12 * 12


def test_augmentation_moves_pictures_and_keeps_them():
    digits = images.mnist().train["input"][:64]
    still = images.augment(digits, seed=0, rotation=0.0, scaling=0.0, shift=0.0)
    torch.testing.assert_close(still, digits)
    moved = images.augment(digits, seed=0)
    assert torch.equal(moved, images.augment(digits, seed=0)) and not torch.equal(moved, images.augment(digits, seed=1))
    assert moved.shape == digits.shape and moved.min() >= 0.0 and moved.max() <= 1.0
    assert abs(moved.sum() / digits.sum() - 1.0) < 0.1


def test_a_turn_is_a_turn():
    """A bar that is turned by 90 degrees lies across, pixel for pixel, on pictures that are not square, too."""
    bar = torch.zeros(64, 1, 9, 9)
    bar[:, :, :, 4] = 1.0
    turned = images.augment(bar, seed=0, rotation=180.0, scaling=0.0, shift=0.0)
    torch.testing.assert_close(turned[:, 0, 4, 4], torch.ones(64))
    wide = torch.zeros(64, 1, 5, 21)
    wide[:, :, 2, 8:13] = 1.0
    turned = images.augment(wide, seed=0, rotation=180.0, scaling=0.0, shift=0.0)
    assert (turned.sum((1, 2, 3)) / 5.0 - 1.0).abs().max() < 0.3


def write_pictures(folder, classes=("bars", "spots"), count=10):
    generator = numpy.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 60, (40, 30), dtype=numpy.uint8)
            pixels[:, 10:14] += numpy.uint8(180 * (name == "bars"))
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def test_pictures_of_ones_own(tmp_path):
    write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "bars" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "spots" / "notes.txt").write_text("no picture either")
    command = ["train", "mnist-cnn", "--data", tmp_path / "pictures", "--batch-size", 4, "--epochs", 6, "--no-augment"]
    status, report = run(tmp_path / "run", *command)
    assert status == 0 and report["accuracy"]["fastlayers"] == 1.0
    assert report["data"]["classes"] == {"bars": 10, "spots": 10} and report["data"]["test"] == 4
    assert [row.split(":")[0] for row in report["data"]["bad_rows"]] == ["bars/broken.png", "spots/notes.txt"]


def test_pictures_come_from_one_place(capsys):
    assert cli.main(["train", "mnist-mlp", "--data", "a", "--mnist", "b"]) == 2
    assert "--data and --mnist: wanted one of them" in capsys.readouterr().err


def test_folders_that_hold_no_classes(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        images.folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there are 0 classes"):
        images.folder(tmp_path)
    write_pictures(tmp_path, count=1)
    with pytest.raises(UserError, match="'bars' has fewer"):
        images.folder(tmp_path)


def test_the_whole_of_mnist_needs_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UserError, match="--mnist needs the torchvision that belongs to torch 2"):
        images.mnist(tmp_path)


class WholeMNIST:
    """What torchvision.datasets.MNIST gives, in small."""

    def __init__(self, folder, train, download):
        assert download
        count = 30 if train else 10
        self.data = torch.full((count, 28, 28), 255 if train else 51, dtype=torch.uint8)
        self.targets = torch.arange(count) % 10

    def __len__(self):
        return len(self.data)


def test_the_whole_of_mnist_keeps_its_own_split(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(MNIST=WholeMNIST))
    data = images.mnist(tmp_path)
    assert data.train["input"].shape == (30, 1, 28, 28) and data.test["input"].shape == (10, 1, 28, 28)
    assert (data.train["input"] == 1).all() and (data.test["input"] == 51 / 255).all()
    assert data.train["labels"].tolist() == [*range(10)] * 3 and data.classes == [str(digit) for digit in range(10)]


# Text.


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
    """One label in the column "label"; one, two or none of them in the column "labels"."""
    path = tmp_path_factory.mktemp("data") / "animals.csv"
    sounds = {"cat": "miaow", "dog": "bark", "cat;dog": "miaow and bark"}
    kinds = [f"says {sound},{label.split(';')[0]},{label}" for label, sound in sounds.items()]
    rows = [f"number {number} {kind}" for number in range(30) for kind in kinds]
    path.write_text("\n".join(["text,label,labels", *rows]) + "\n")
    return path


def test_two_classes_on_a_frozen_base(animals, tmp_path, capsys):
    """One logit with binary cross-entropy, and Adam on the head alone."""
    options = ["--data", animals, "--freeze-base", "--epochs", 1, "--seq-len", 16, "--compare", "--check-steps", 1]
    status, report = run(tmp_path, "train", "text-classification", *options, "--predict", "number 7 says bark")
    assert status == 0 and report["agreement"]["ok"] and report["config"]["optimizer"] == "adam"
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["id2label"] == {"0": "dog"} and saved["problem_type"] == "multi_label_classification"
    assert "predict  'number 7 says bark': " in capsys.readouterr().out
    assert report["data"]["classes"] == {"cat": 60, "dog": 30}


def test_several_labels_at_once(animals, tmp_path, capsys):
    options = ["--data", animals, "--label-column", "labels", "--label-separator", ";", "--freeze-base", "--lr", 0.05]
    options += ["--seq-len", 16, "--epochs", 12, "--predict", "number 7 says miaow and bark"]
    status, report = run(tmp_path, "train", "text-classification", *options)
    assert status == 0 and report["data"]["classes"] == {"cat": 60, "dog": 60}
    assert report["macro_f1"]["fastlayers"] > 0.9
    assert "'number 7 says miaow and bark': cat (" in capsys.readouterr().out
    assert not (tmp_path / "confusion.png").exists() and (tmp_path / "roc.png").exists()


def test_several_labels_need_examples_on_both_sides():
    with pytest.raises(UserError, match="label 'rare' has no example to"):
        data.split_several("few", [("one", "rare"), *((f"text {n}", "often") for n in range(50))], ";")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "a.csv", "--dataset", "b"], "--data and --dataset: wanted one of them"),
        (["--label-separator", ";"], "only the files of --data"),
        (["--accumulate", "17"], "--accumulate 17: a batch has only 16 examples"),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    assert cli.main(["train", "text-classification", *options]) == 2
    assert message in capsys.readouterr().err


# Metrics.


def test_metrics_of_two_classes_by_one_logit():
    logits, labels = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]]), torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    found = metrics.evaluation(0.5, logits, labels)
    assert found["accuracy"] == 0.75 and found["precision"] == 0.75 and found["auc"] == 1.0
    two = torch.cat([torch.zeros(4, 1), logits], 1)
    assert metrics.evaluation(0.5, two, labels[:, 0].long()) == found


def test_metrics_of_several_labels():
    logits = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = metrics.evaluation(0.5, logits, labels)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["recall"] == 1.0


def test_no_area_where_a_class_has_no_example():
    assert metrics.evaluation(0.5, torch.eye(3), torch.tensor([0, 1, 1]))["auc"] is None


# GPT.


def test_a_gpt_learns_to_write(tmp_path, capsys):
    (tmp_path / "text").write_text("the cat sat on the mat. " * 400)
    sizes = ["--layers", 2, "--width", 32, "--heads", 2, "--seq-len", 32, "--batch-size", 8]
    options = ["--data", tmp_path / "text", *sizes, "--steps", 80, "--lr", 0.01, "--compare", "--prompt", "the cat"]
    status, report = run(tmp_path / "run", "train", "gpt", *options, "--sample", 40)
    assert status == 0 and report["agreement"]["ok"]
    assert report["perplexity"]["fastlayers"] < 3.0 and len(report["swapped"]) >= 2
    sample = (tmp_path / "run" / "sample.txt").read_text()
    assert sample.startswith("the cat") and len(sample) == 47 and sample.strip() in capsys.readouterr().out


def test_a_gpt_sees_no_byte_before_its_turn():
    torch.manual_seed(0)
    model = gpt.GPT(seq_len=16, layers=2, width=32, heads=2, dropout=0.0).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9:] = 0
    for swapped in (False, True):
        if swapped:
            fastlayers.swap_(model)
        first, second = model(tokens), model(changed)
        torch.testing.assert_close(first[:, :9], second[:, :9])
        assert not torch.allclose(first[:, 9:], second[:, 9:])


def test_epochs_of_a_gpt_are_epochs(tmp_path):
    (tmp_path / "text").write_text("abcdefgh" * 100)  # 720 bytes to train on, 44 windows, 11 steps an epoch
    sizes = ["--layers", 1, "--width", 8, "--heads", 1, "--seq-len", 16, "--batch-size", 4, "--sample", 0]
    _, report = run(tmp_path / "run", "train", "gpt", "--data", tmp_path / "text", *sizes, "--epochs", 2)
    assert report["steps"] == 22


def test_windows_of_text():
    found = gpt.windows(b"abcdefghi", 4)
    assert bytes(found["input"].flatten().tolist()) == b"abcdefgh"
    assert bytes(found["labels"].flatten().tolist()) == b"bcdefghi"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "nowhere.txt"], "--data nowhere.txt: No such file or directory"),
        (["--width", "30", "--heads", "4"], "--width 30 is not a multiple of --heads 4"),
    ],
)
def test_what_gpt_cannot_do(options, message, capsys):
    assert cli.main(["train", "gpt", *options]) == 2
    assert message in capsys.readouterr().err


def test_too_little_text(tmp_path):
    (tmp_path / "short").write_text("too short")
    with pytest.raises(UserError, match="wanted at least 2580 bytes for --seq-len 256"):
        gpt.read_text(tmp_path / "short", 256)


# Tuning.

TINY = ["--hidden", "16", "--examples", "100", "--batch-size", "16", "--epochs", "3"]


def trials(folder):
    import optuna

    return optuna.load_study(storage=f"sqlite:///{folder / 'study.db'}", study_name="mlp").trials


def test_tuning_goes_on_where_it_stopped(tmp_path, capsys):
    command = ["tune", "mlp", *TINY, "--search", "lr=1e-3:1:log", "--search", "l2=0:0.1", "--out", str(tmp_path)]
    for count in (3, 5):
        assert cli.main([*command, "--trials", str(count)]) == 0
        assert len(trials(tmp_path)) == count
    assert len({trial.params["lr"] for trial in trials(tmp_path)}) == 5, "the draws begin anew"
    said = capsys.readouterr().out
    assert "best     fastlayers train mlp --lr " in said
    for name in ("history", "slice", "intermediate", "importances", "contour"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "trial-0000" / "report.json").read_text())
    assert trials(tmp_path)[0].value == min(one["test_loss"] for one in report["evaluations"]["fastlayers"])
    assert report["config"]["lr"] == trials(tmp_path)[0].params["lr"]


def test_a_grid_is_tried_once(tmp_path):
    command = ["tune", "mlp", *TINY, "--sampler", "grid", "--search", "lr=0.01,0.1", "--search", "optimizer=sgd,adam"]
    assert cli.main([*command, "--no-pruning", "--metric", "accuracy", "--out", str(tmp_path)]) == 0
    tried = {(trial.params["lr"], trial.params["optimizer"]) for trial in trials(tmp_path)}
    assert len(trials(tmp_path)) == 4 and len(tried) == 4


def test_hopeless_trials_are_stopped(tmp_path):
    command = ["tune", "mlp", *TINY, "--sampler", "grid", "--search", "lr=0.2,0.1,0.05,0.15,0.12,1e-9,1e-8"]
    assert cli.main([*command, "--trials", "30", "--out", str(tmp_path)]) == 0
    assert any(trial.state.name == "PRUNED" for trial in trials(tmp_path))


@pytest.mark.parametrize(
    "spec, wanted",
    [
        ("lr=1e-4:0.1:log", ("lr", ("range", 1e-4, 0.1, True))),
        ("batch-size=4:8", ("batch_size", ("range", 4, 8, False))),
        ("optimizer=sgd,adam", ("optimizer", ("choice", ["sgd", "adam"]))),
        ("batch_size=16,32", ("batch_size", ("choice", [16, 32]))),
    ],
)
def test_what_is_searched(spec, wanted):
    assert tune.dimension(spec) == wanted


@pytest.mark.parametrize(
    "options, message",
    [
        (["--search", "lr=3:1"], "wanted name=low:high"),
        (["--search", "lr=0:1:log"], "wanted name=low:high"),
        (["--search", "lr="], "wanted name=low:high"),
        (["--search", "speed=1,2"], "--search speed: the recipe has no such option; it has accumulate"),
        (["--sampler", "grid", "--search", "lr=1e-3:1"], "--sampler grid: wanted a choice for lr"),
        (["--compare"], "--compare and --resume are options of train"),
        (["--metric", "perplexity"], "--metric perplexity: the recipe's are"),
    ],
)
def test_what_cannot_be_tuned(options, message, tmp_path, capsys):
    try:
        status = cli.main(["tune", "mlp", *TINY, *options, "--out", str(tmp_path)])
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and message in capsys.readouterr().err


# Hugging Face's Trainer, and one neuron.


def test_the_example_with_trainer(tmp_path, capsys):
    path = Path(__file__).parent.parent / "examples" / "huggingface_trainer.py"
    spec = importlib.util.spec_from_file_location("example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(steps=2, folder=str(tmp_path))
    assert math.isfinite(found["eval_loss"]) and "swapped 51 modules" in capsys.readouterr().out


def test_one_step_of_one_neuron_by_hand():
    """z = 0.1 x 0.5 - 0.2 x 0.6 + 0.3 = 0.23; squared error, learning rate 0.1."""
    neuron = fastlayers.nn.FusedLinear(2, 1, activation="sigmoid").double()
    with torch.no_grad():
        neuron.weight.copy_(torch.tensor([[0.1, -0.2]], dtype=torch.float64))
        neuron.bias.fill_(0.3)
    optimizer = torch.optim.SGD(neuron.parameters(), lr=0.1)
    output = neuron(torch.tensor([[0.5, 0.6]], dtype=torch.float64))
    loss = (output - 0.7).square().sum()
    loss.backward()
    sigmoid = 1 / (1 + math.exp(-0.23))
    slope = 2 * (sigmoid - 0.7) * sigmoid * (1 - sigmoid)
    exact = {"rel": 1e-12}
    assert output.item() == pytest.approx(sigmoid, **exact)
    assert loss.item() == pytest.approx((sigmoid - 0.7) ** 2, **exact)
    assert neuron.weight.grad.flatten().tolist() == pytest.approx([0.5 * slope, 0.6 * slope], **exact)
    assert neuron.bias.grad.item() == pytest.approx(slope, **exact)
    optimizer.step()
    moved = [0.1 - 0.1 * 0.5 * slope, -0.2 - 0.1 * 0.6 * slope]
    assert neuron.weight.flatten().tolist() == pytest.approx(moved, **exact)
    assert neuron.bias.item() == pytest.approx(0.3 - 0.1 * slope, **exact)
