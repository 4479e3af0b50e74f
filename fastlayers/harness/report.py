"""What a run shows and leaves behind: progress bars, tables, report.json, metrics.jsonl, TensorBoard events."""

import importlib.metadata
import json
import platform
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import fastlayers
from fastlayers import _native
from fastlayers.harness import UserError, distributed, loop, plots
from fastlayers.harness.config import HARMLESS

BAD_ROWS_SHOWN = 5
PROBLEMS_SHOWN = 10
PERCENT = ("accuracy", "precision", "recall")
TITLES = {"macro_f1": "macro-F1", "auc": "AUC (ROC)", "test_loss": "test loss", "perplexity": "perplexity"}
console = Console(highlight=False)


def announce(job, config, swaps, picture, device):
    """What is about to be trained on what, and what swap_ did."""
    data = job.data
    trained, tested = len(data.train["labels"]), len(data.test["labels"])
    say("data", f"{data.source}: {trained} to train on, {tested} to test on")
    if data.sizes:
        of = f"of {min(data.sizes.values())} to {max(data.sizes.values())} examples"
        say("classes", f"{len(data.sizes)}, {of}: {', '.join(data.sizes)}")
    if data.bad_rows:
        more = "; ..." if len(data.bad_rows) > BAD_ROWS_SHOWN else ""
        say("bad rows", f"{len(data.bad_rows)} left out: {'; '.join(data.bad_rows[:BAD_ROWS_SHOWN])}{more}")
    say("model", f"{picture.kind}, {picture.parameters / 1e6:.1f} M parameters, {config.dtype}")
    several = f", {distributed.processes()} processes ({config.parallel})" if distributed.processes() > 1 else ""
    say("device", f"{device}, {torch.get_num_threads()} threads, kernels: {kernels(device)}{several}")
    say("swapped", f"{len(swaps.swapped)} modules, {len(swaps.left)} left as they were (all named in report.json)")


def say(what, text):
    if distributed.is_first():
        console.print(Text.assemble((f"{what:<9}", "bold"), text), soft_wrap=True)


def kernels(device):
    """Which compiled kernels serve the swapped model here."""
    if device.type == "cpu" and _native.error:
        return f"none, all on the reference backend ({_native.error})"
    return _native.cpu_isa if device.type == "cpu" else device.type


def progress():
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not distributed.is_first(),
    )


def run_folder(recipe, config):
    """The folder of the run, with its config.json; one that --resume goes on in has to be of the same config."""
    folder = Path(config.out or Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    path, wanted = folder / "config.json", {"recipe": recipe, **asdict(config)}
    if config.resume:
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--resume: {path}: {error}") from error
        for name, value in wanted.items():
            if name not in HARMLESS and before.get(name) != value:
                raise UserError(f"--resume: the run in {folder} had {name} {before.get(name)!r}, now it is {value!r}")
    elif distributed.is_first():
        if any(folder.glob("checkpoints/step-*")):
            raise UserError(f"--out {folder}: holds a run already; go on with --resume, or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=2) + "\n")
    return folder


class Log:
    """metrics.jsonl, a line per step and per evaluation of each run; and the same as events of TensorBoard."""

    def __init__(self, folder, runs, config, steps):
        self.folder, self.runs, self.config, self.steps = folder, runs, config, steps
        self.file = self.events = None

    def __enter__(self):
        if distributed.is_first():
            self.file = (self.folder / "metrics.jsonl").open("w")
            self.events = self._writers() if self.config.tensorboard else {}
            done = len(self.runs[0].losses)
            evaluated = [found["step"] for found in self.runs[0].evaluations]
            for step in range(done):  # what a resumed run had seen
                self.step(step)
                for number, wanted in enumerate(evaluated):
                    if wanted == step + 1:
                        self.evaluation(number)
        return self

    def __exit__(self, *error):
        if self.file is not None:
            for closing in (self.file, *self.events.values()):
                closing.close()

    def _writers(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError('--tensorboard needs tensorboard: pip install "fastlayers[demo]"') from error
        return {one.name: SummaryWriter(self.folder / "tensorboard" / one.name) for one in self.runs}

    def step(self, step):
        rate = self.config.lr * loop.schedule(self.config, step, self.steps)
        for one in self.runs:
            self._write(one, step + 1, {"loss": one.losses[step], "seconds": one.seconds[step], "lr": rate})

    def evaluation(self, number=-1):
        """Number: which of the runs' evaluations."""
        for one in self.runs:
            found = dict(one.evaluations[number])
            self._write(one, found.pop("step"), found)

    def _write(self, one, step, values):
        if self.file is None:
            return
        print(json.dumps({"run": one.name, "step": step, **values}), file=self.file, flush=True)
        if self.events:
            for name, value in values.items():
                if value is not None:
                    self.events[one.name].add_scalar(name, value, step)


def results(job, config, runs, agreement, swaps, device):
    """The contents of report.json."""
    seconds = {one.name: statistics.median(one.seconds) for one in runs}
    found = {name: {one.name: one.final[name] for one in runs} for name in runs[0].final if name != "step"}
    found |= {"step_seconds": seconds, "recipe": job.recipe, "steps": len(runs[0].losses)}
    if agreement is not None:
        found["speed_ratio"] = seconds["pytorch"] / seconds["fastlayers"]
        found["agreement"] = {"ok": agreement.ok, **asdict(agreement)}
    data = job.data
    sizes = {"train": len(data.train["labels"]), "test": len(data.test["labels"])}
    return found | {
        "losses": {one.name: one.losses for one in runs},
        "all_step_seconds": {one.name: one.seconds for one in runs},
        "evaluations": {one.name: one.evaluations for one in runs},
        "data": {"source": data.source, **sizes, "classes": data.sizes, "bad_rows": data.bad_rows},
        "swapped": [f"{entry.name} ({entry.kind}): {entry.note}" for entry in swaps.swapped],
        "left": [f"{entry.name} ({entry.kind}): {entry.note}" for entry in swaps.left],
        "config": asdict(config),
        "device": {"name": str(device), "threads": torch.get_num_threads(), "kernels": kernels(device)},
        "versions": versions(),
    }


def versions():
    found = {"fastlayers": fastlayers.__version__, "torch": torch.__version__}
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("transformers", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def show(found, logits, job, drawing, folder):
    """Write report.json and the pictures, print the tables."""
    (folder / "report.json").write_text(json.dumps(found, indent=2) + "\n")
    plots.all_of(found, logits, job, folder)
    drawing.save(folder / "model.png")
    console.print(summary(found))
    if "agreement" in found:
        show_agreement(found["agreement"])
    written = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    console.print(f"{folder}/: {', '.join(written)}", soft_wrap=True)


def summary(found):
    names = list(found["step_seconds"])
    table = Table(title=f"{found['recipe']}, {found['steps']} steps", title_style="bold", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for metric in found["evaluations"][names[0]][-1]:
        if metric != "step":
            table.add_row(TITLES.get(metric, metric), *(shown(metric, found[metric][name]) for name in names))
    table.add_row("time per step (median)", *(f"{found['step_seconds'][name] * 1e3:.1f} ms" for name in names))
    if "agreement" in found:
        table.add_row("speed ratio", "1.00", f"[bold green]{found['speed_ratio']:.2f}[/]")
    return table


def shown(metric, value):
    if value is None:
        return "-"
    return f"{value:.1%}" if metric in PERCENT else f"{value:.3f}"


def show_agreement(agreement):
    verdict = "[bold green]ok[/]" if agreement["ok"] else "[bold red]FAILED[/]"
    if not agreement["steps"]:
        verdict = "[bold red]not checked[/] (--check-steps 0)"
    console.print(
        f"[bold]agreement[/] {verdict}: losses and gradients of {agreement['steps']} steps, largest deviation "
        f"{agreement['worst_deviation']:.2f} of what is allowed ({agreement['worst_place']})",
        soft_wrap=True,
    )
    for problem in agreement["problems"][:PROBLEMS_SHOWN]:
        console.print(f"[red]  {problem}[/]", soft_wrap=True)
    if len(agreement["problems"]) > PROBLEMS_SHOWN:
        console.print(f"[red]  and {len(agreement['problems']) - PROBLEMS_SHOWN} more, in report.json[/]")
