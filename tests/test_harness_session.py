"""What every recipe gets from the session: metrics, schedules, checkpoints, resuming, several processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastlayers import cli
from fastlayers.harness import UserError, checkpoint, loop, mlp, session
from fastlayers.harness.config import Config

SMALL = ["train", "mlp", "--hidden", "48", "--examples", "200", "--batch-size", "32", "--optimizer", "adamw"]
ROOT = Path(__file__).parent.parent


def train(folder, *options):
    """report.json, the trained parameters"""
    assert cli.main([*SMALL, "--out", str(folder), *map(str, options)]) == 0
    return result(folder)


def result(folder):
    return json.loads((folder / "report.json").read_text()), load_file(folder / "model" / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Resuming.

DIES = """
import os, signal, sys
from fastlayers import cli
from fastlayers.harness import checkpoint, loop

calls = 0

def dying(function):
    def wrapper(*args):
        global calls
        calls += 1
        if calls == {nth}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return wrapper

{module}.{name} = dying({module}.{name})
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "module, name, nth",
    [("loop", "penalty", 13), ("checkpoint", "_to_disk", 13), ("checkpoint", "save_file", 4)],
    ids=["in a step", "before a checkpoint is whole", "while a checkpoint is written"],
)
def test_a_killed_run_resumes_to_the_same_bits(module, name, nth, tmp_path):
    options = ["--epochs", "3", "--compare", "--clip", "1", "--schedule", "cosine", "--warmup", "0.2"]
    wanted_report, wanted = train(tmp_path / "whole", *options)
    program = DIES.format(module=module, name=name, nth=nth)
    arguments = [*SMALL, "--out", str(tmp_path / "killed"), *options]
    killed = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "report.json").exists()
    done = [path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*")]
    assert done == ["step-00000005"]
    report, got = train(tmp_path / "killed", *options, "--resume")
    assert same(got, wanted)
    for key in ("losses", "evaluations", "agreement", "accuracy"):
        assert report[key] == wanted_report[key], key
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    without_time = [[{**json.loads(line), "seconds": 0} for line in some] for some in lines]
    assert without_time[0] == without_time[1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys):
    _, wanted = train(tmp_path / "whole", "--epochs", 3)
    train(tmp_path / "cut", "--epochs", 3)
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000010", "step-00000015"]
    file = checkpoints[1] / "fastlayers.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    _, got = train(tmp_path / "cut", "--epochs", 3, "--resume")
    assert (
        "step-00000015 is damaged (fastlayers.safetensors has changed since it was written)" in capsys.readouterr().out
    )
    assert same(got, wanted) and checkpoint._verified(checkpoints[1])["step"] == 15
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    assert cli.main([*SMALL, "--out", str(tmp_path / "cut"), "--epochs", "3", "--resume"]) == 2
    assert "holds no whole checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "1"], "holds a run already; go on with --resume, or choose another folder"),
        (["--resume", "--epochs", "1", "--lr", "0.7"], "had lr 0.05, now it is 0.7"),
        (["--resume", "--epochs", "1", "--compare"], "had compare False, now it is True"),
    ],
)
def test_what_cannot_be_resumed(options, message, tmp_path, capsys):
    train(tmp_path, "--epochs", 1)
    assert cli.main([*SMALL, "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_resume_needs_a_folder(capsys):
    assert cli.main([*SMALL, "--resume"]) == 2
    assert "--resume needs --out FOLDER" in capsys.readouterr().err


def test_a_finished_run_can_be_resumed(tmp_path):
    _, wanted = train(tmp_path, "--epochs", 2, "--patience", 1, "--lr", "0.5")
    _, got = train(tmp_path, "--epochs", 2, "--patience", 1, "--lr", "0.5", "--resume")
    assert same(got, wanted)


# Several processes.

SUMMED_OTHERWISE = 1e-4  # relative: float32 sums in another order, ten steps long
LOGITS_ROUNDING = 1e-5  # of a loss near 0, the difference of logits around 16, where float32 numbers lie 2e-6 apart


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


def length_between(first, second):
    return sum((first[name] - second[name]).square().sum() for name in first).sqrt().item()


@pytest.mark.parametrize("launcher, parallel", [("accelerate", "ddp"), ("torchrun", "fsdp")])
def test_two_processes_lose_what_one_does(launcher, parallel, tmp_path):
    options = ["--epochs", "2", "--clip", "0.5", "--l2", "0.001", "--accumulate", "2"]
    wanted, parameters = train(tmp_path / "one", *options)
    command = [
        sys.executable,
        "-m",
        *LAUNCHERS[launcher],
        "-m",
        "fastlayers.cli",
        *SMALL,
        "--out",
        str(tmp_path / "two"),
        "--parallel",
        parallel,
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    got, trained = result(tmp_path / "two")
    losses = pytest.approx(wanted["losses"]["fastlayers"], rel=SUMMED_OTHERWISE, abs=LOGITS_ROUNDING)
    assert got["losses"]["fastlayers"] == losses
    start = mlp.make_model(48, seed=0).state_dict()
    moved, apart = (length_between(parameters, other) for other in (start, trained))
    assert apart < 10 * SUMMED_OTHERWISE * moved  # Adam's first steps are as long where a gradient is nearly 0
    assert done.stdout.count("2 processes") == 1 and got["accuracy"] == wanted["accuracy"]
    more = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert more.returncode == 0 and same(result(tmp_path / "two")[1], trained), more.stderr[-4000:]


# The loop's options.


def job():
    return session.Job("mlp", mlp.make_model(48, seed=0), mlp.make_data(200, seed=0), mlp.save)


def test_parts_of_a_batch_add_up_to_the_batch():
    steps = []
    for accumulate in (1, 3):
        config = Config(batch_size=32, accumulate=accumulate, optimizer="sgd", lr=0.1, l1=1e-4)
        one = job()
        run = loop.start("fastlayers", one.model, config, steps=1)
        loss = loop.train_step(run, loop.select(one.data.train, torch.arange(32), torch.device("cpu")), config)
        steps.append((loss, one.model.state_dict()))
    torch.testing.assert_close(*(loss for loss, _ in steps))
    torch.testing.assert_close(*(state for _, state in steps))


@pytest.mark.parametrize("name, optimizer", [("fastlayers", "adamw"), ("pytorch", "adamw"), ("fastlayers", "sgd")])
def test_gradients_are_clipped(name, optimizer):
    """By the fused optimizer itself or by torch: a step of SGD is as long as the norm allows, and Adam's first one
    does not depend on it, so that its moments are looked at."""
    config = Config(batch_size=32, clip=1e-3, lr=1.0, optimizer=optimizer)
    one = job()
    before = [parameter.detach().clone() for parameter in one.model.parameters()]
    run = loop.start(name, one.model, config, steps=1)
    loop.train_step(run, loop.select(one.data.train, torch.arange(32), torch.device("cpu")), config)
    if optimizer == "sgd":
        moved = [a - b for a, b in zip(before, one.model.parameters())]
    else:
        moved = [run.optimizer.state[parameter]["exp_avg"] / 0.1 for parameter in one.model.parameters()]
    norm = torch.cat([tensor.flatten() for tensor in moved]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0.0)


def test_penalties_are_of_weights_alone():
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    assert loop.penalty(model, Config(l1=0.5, l2=0.25)).item() == 0.5 * 6 + 0.25 * 14
    assert loop.penalty(model, Config()) == 0


def test_schedules():
    rates = {
        kind: [round(loop.schedule(Config(schedule=kind, warmup=0.2), step, 10), 3) for step in range(10)]
        for kind in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == [0.5] + [1.0] * 9
    assert rates["linear"] == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates["cosine"] == [0.5, 1.0, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]


def test_every_epoch_sees_every_example_once_in_another_order():
    config = Config(batch_size=8, seed=3)
    epochs = [torch.cat([loop.batch_indices(32, config, 4 * epoch + place) for place in range(4)]) for epoch in (0, 1)]
    assert all(epoch.sort().values.tolist() == list(range(32)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_early_stopping_keeps_the_best(tmp_path):
    report, parameters = train(tmp_path, "--epochs", 30, "--patience", 2, "--lr", "0.02")
    losses = [found["test_loss"] for found in report["evaluations"]["fastlayers"]]
    best = min(losses)
    assert len(losses) < 30 and losses[-3] == best and report["test_loss"]["fastlayers"] == best
    kept = mlp.make_model(48, seed=0)
    kept.load_state_dict(parameters)
    loss, _ = loop.predict(kept, mlp.make_data(200, seed=0).test, Config(), torch.device("cpu"))
    assert loss == pytest.approx(best, rel=1e-5)


def test_deterministic_is_put_back(tmp_path):
    train(tmp_path, "--steps", 2, "--deterministic", "--threads", 1)
    assert not torch.are_deterministic_algorithms_enabled()


def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report, _ = train(tmp_path, "--epochs", 2, "--compare", "--tensorboard")
    for name in ("pytorch", "fastlayers"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
        seen = [event.value for event in events.Scalars("loss")]
        assert seen == pytest.approx(report["losses"][name])
        assert len(events.Scalars("accuracy")) == 2


def test_pictures(tmp_path):
    train(tmp_path, "--epochs", 1)
    for name in ("training", "metrics", "classes", "confusion", "roc", "samples", "model"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_checkpoints_are_readable_without_pickles(tmp_path):
    train(tmp_path, "--steps", 2)
    (path,) = (tmp_path / "checkpoints").iterdir()
    rest = torch.load(path / "fastlayers.pt", weights_only=True)
    assert set(rest) == {"optimizer", "scheduler", "scaler"}
    assert checkpoint._verified(path)["step"] == 2


def test_a_batch_larger_than_the_data():
    with pytest.raises(UserError, match="there are only 160 training examples"):
        session.count_steps(160, Config(batch_size=161))
