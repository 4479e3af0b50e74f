"""A training run from its first step to its report, for one model or for two side by side; every recipe ends here."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import fastlayers
from fastlayers.harness import UserError, checkpoint, distributed, loop, metrics, report
from fastlayers.harness.check import Agreement, check_step
from fastlayers.harness.dataset import Dataset
from fastlayers.harness.drawing import Drawing


@dataclass
class Job:
    """What a recipe hands over: an untrained model in plain PyTorch, and what it is to be trained on."""

    recipe: str
    model: nn.Module
    data: Dataset
    save: Callable  # save(model, state, folder): write the trained model; state is its whole state_dict
    sample: Callable | None = None  # sample(index): a test example to look at, an (H, W) array or a text
    augment: Callable | None = None  # augment(batch, seed): what a step sees in place of its batch


@dataclass
class Result:
    report: dict  # the contents of report.json
    folder: Path

    @property
    def status(self):
        """Exit status of the command."""
        return 0 if self.report.get("agreement", {"ok": True})["ok"] else 1


_watching = []  # functions that want to see each evaluation of the run on fastlayers


@contextmanager
def watched_by(function):
    """Within, function({"step", metric: value}) is called at each evaluation, and ends the run by raising."""
    _watching.append(function)
    try:
        yield
    finally:
        _watching.pop()


def run(job, config):
    """Train, evaluate, save and report."""
    device = distributed.start(config)
    try:
        with settings(config):
            return _run(job, config, device)
    finally:
        distributed.finish()


@contextmanager
def settings(config):
    """torch's threads and determinism as the config asks, and afterwards as they were."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.use_deterministic_algorithms(config.deterministic or strict)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def _run(job, config, device):
    steps, per_epoch = count_steps(len(job.data.train["labels"]), config)
    folder = report.run_folder(job.recipe, config)
    runs, swaps, picture = start_runs(job, config, device, steps)
    agreement = Agreement() if config.compare else None
    record = {"step": 0, "waited": 0, "agreement": None}
    report.announce(job, config, swaps, picture, device)
    if config.resume:
        record |= checkpoint.load(folder, runs, lambda text: report.say("damaged", text))
        agreement = agreement and Agreement(**record["agreement"])
        report.say("resumed", f"after step {record['step']} of {steps}")

    with report.progress() as progress, report.Log(folder, runs, config, steps) as log:
        task = progress.add_task("training", total=steps, completed=record["step"])
        for step in range(record["step"], steps):
            if record["waited"] == config.patience:
                break
            seed = loop.step_seed(config.seed, step)
            batch = make_batch(job, config, step, device)
            if agreement is not None and step < config.check_steps:
                progress.update(task, description=f"checking step {step + 1}")
                check_step(agreement, *(one.model for one in runs), batch, config.torch_dtype, seed, step)
                record["agreement"] = asdict(agreement)
            for one in runs if step % 2 == 0 else reversed(runs):  # what else the machine does falls on both alike
                loop.timed_step(one, batch, config, seed)
            log.step(step)
            record["step"] = step + 1
            if record["step"] % per_epoch == 0 or record["step"] == steps:
                for one in runs:
                    evaluate(one, job, config, device, record["step"])
                log.evaluation()
                follow_best(runs, config, record)
                for function in _watching:
                    function(runs[-1].evaluations[-1])
            if record["step"] % (config.checkpoint_every or per_epoch) == 0 or record["step"] == steps:
                checkpoint.save(folder, runs, record)
            losses = " / ".join(f"{one.losses[-1]:.3f}" for one in runs)
            progress.update(task, advance=1, description=f"training, loss {losses}")
        logits = {one.name: final_logits(one, job, config, device) for one in runs}

    found = report.results(job, config, runs, agreement, swaps, device)
    state = checkpoint.whole_state(runs[-1].model)
    if distributed.is_first():
        job.save(runs[-1].model, state, folder / "model")
        report.show(found, logits, job, picture, folder)
    return Result(found, folder)


def count_steps(examples, config):
    """steps of the whole run, steps of an epoch"""
    per_epoch = examples // config.batch_size
    if per_epoch == 0:
        raise UserError(f"--batch-size {config.batch_size}: there are only {examples} training examples")
    return config.steps or config.epochs * per_epoch, per_epoch


def start_runs(job, config, device, steps):
    """[the run on fastlayers], with --compare behind the one on plain PyTorch; what swap_ did; a drawing of it."""
    model = job.model.to(device)
    swapped = copy.deepcopy(model) if config.compare else model
    swaps = fastlayers.swap_(swapped)
    picture = Drawing(swapped, loop.select(job.data.test, torch.arange(1), device), swaps)
    runs = [loop.start("pytorch", model, config, steps)] if config.compare else []
    return [*runs, loop.start("fastlayers", swapped, config, steps)], swaps, picture


def make_batch(job, config, step, device):
    indices = loop.batch_indices(len(job.data.train["labels"]), config, step)
    batch = loop.select(job.data.train, indices, device)
    return batch if job.augment is None else job.augment(batch, loop.step_seed(config.seed, step))


def evaluate(one, job, config, device, step):
    """Add the metrics of the test set to the run's evaluations."""
    loss, one.logits = loop.predict(one.model, job.data.test, config, device)
    one.evaluations.append({"step": step, **metrics.evaluation(loss, one.logits, job.data.test["labels"])})


def final_logits(one, job, config, device):
    """Those of the model that is kept: with --patience the best, which is put back."""
    if one.best is not None:
        checkpoint.put_back(one.model, one.best)
    elif one.logits is not None:
        return one.logits
    return loop.predict(one.model, job.data.test, config, device)[1]


def follow_best(runs, config, record):
    """With --patience, remember the best weights, and for how many evaluations there were no better ones."""
    if config.patience is None:
        return
    scores = [-found["test_loss"] for found in runs[-1].evaluations]
    improved = len(scores) == 1 or scores[-1] > max(scores[:-1])
    record["waited"] = 0 if improved else record["waited"] + 1
    if improved:
        for one in runs:
            one.best = checkpoint.unshared(checkpoint.whole_state(one.model))
