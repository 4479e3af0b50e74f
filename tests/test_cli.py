"""The command line: its table of subcommands, good and bad arguments, and one-sentence errors."""

import subprocess
import sys

import pytest

import fastlayers
from fastlayers import cli

TRAIN = ["train", "text-classification"]


@pytest.mark.parametrize("command", ["info", "verify", "train", "bench"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert f"fastlayers {command}" in capsys.readouterr().out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"fastlayers {fastlayers.__version__}\n"


def test_help_of_the_whole_imports_no_subcommand():
    program = "import sys; from fastlayers import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    program += "assert not {'transformers', 'matplotlib', 'rich', 'fastlayers.verify'} & set(sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert all(name in finished.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required"),
        (["learn"], "invalid choice: 'learn'"),
        (["train"], "the following arguments are required"),
        (["train", "image"], "invalid choice: 'image'"),
        ([*TRAIN, "--steps", "0"], "argument --steps: wanted an integer of at least 1, got '0'"),
        ([*TRAIN, "--batch-size", "-4"], "argument --batch-size: wanted an integer of at least 1, got '-4'"),
        ([*TRAIN, "--epochs", "1.5"], "argument --epochs: wanted an integer of at least 1, got '1.5'"),
        ([*TRAIN, "--seq-len", "1"], "argument --seq-len: wanted an integer of at least 2, got '1'"),
        ([*TRAIN, "--lr", "nan"], "argument --lr: wanted a positive number, got 'nan'"),
        ([*TRAIN, "--lr", "0"], "argument --lr: wanted a positive number, got '0'"),
        ([*TRAIN, "--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "missing.csv"], "fastlayers: missing.csv: there is no such file\n"),
        (["--model", "nowhere"], "fastlayers: --model nowhere: wanted a folder with a Hugging Face model"),
        (["--seq-len", "513"], "fastlayers: --seq-len 513: the model takes at most 512 tokens\n"),
        (["--batch-size", "5000"], "fastlayers: --batch-size 5000: there are only 2 training examples\n"),
    ],
)
def test_requests_that_cannot_be_met(options, message, capsys, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text,label\na,x\nb,x\nc,y\nd,y\n")
    assert cli.main([*TRAIN, "--data", str(data), "--out", str(tmp_path / "run"), *options]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_is_named():
    program = "import sys; sys.modules['transformers'] = None; from fastlayers import cli\n"
    program += f"sys.exit(cli.main({TRAIN}))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr == 'fastlayers: text-classification needs transformers: pip install "fastlayers[demo]"\n'
