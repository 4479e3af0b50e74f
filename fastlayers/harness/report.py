"""What a run shows and leaves behind: progress bars, the table, report.json and the plot."""

import json
import platform
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from sklearn.metrics import accuracy_score, f1_score

import fastlayers
from fastlayers import _native
from fastlayers.harness import data, plots

BAD_ROWS_SHOWN = 5
PROBLEMS_SHOWN = 10
console = Console(highlight=False)


def announce(config, texts, model, swaps, device):
    """What is about to be trained on what, and what swap_ did."""
    sizes = data.class_sizes(texts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say("data", f"{texts.source}: {len(texts.train)} to train on, {len(texts.test)} to test on")
    say("classes", f"{len(sizes)}, of {min(sizes.values())} to {max(sizes.values())} examples: {', '.join(sizes)}")
    if texts.bad_rows:
        more = "; ..." if len(texts.bad_rows) > BAD_ROWS_SHOWN else ""
        say("bad rows", f"{len(texts.bad_rows)} left out: {'; '.join(texts.bad_rows[:BAD_ROWS_SHOWN])}{more}")
    say("model", f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters, {config.dtype}")
    say("device", f"{device}, {torch.get_num_threads()} threads, kernels: {kernels(device)}")
    say("swapped", f"{len(swaps.swapped)} modules, {len(swaps.left)} left as they were (all named in report.json)")


def say(what, text):
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
    )


def run_folder(out, recipe):
    folder = Path(out or Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def results(recipe, config, texts, runs, labels, predictions, agreement, swaps, device):
    """The contents of report.json."""
    seconds = {run.name: statistics.median(run.seconds) for run in runs}
    found = {
        "step_seconds": seconds,
        "accuracy": {name: accuracy_score(labels, predicted) for name, predicted in predictions.items()},
        "macro_f1": {
            name: f1_score(labels, predicted, average="macro", zero_division=0.0)
            for name, predicted in predictions.items()
        },
    }
    if agreement is not None:
        found["speed_ratio"] = seconds["pytorch"] / seconds["fastlayers"]
        found["agreement"] = {"ok": agreement.ok, **asdict(agreement)}
    return found | {
        "recipe": recipe,
        "steps": len(runs[0].losses),
        "losses": {run.name: run.losses for run in runs},
        "all_step_seconds": {run.name: run.seconds for run in runs},
        "data": {
            "source": texts.source,
            "train": len(texts.train),
            "test": len(texts.test),
            "classes": data.class_sizes(texts),
            "bad_rows": texts.bad_rows,
        },
        "swapped": [f"{entry.name} ({entry.kind}): {entry.note}" for entry in swaps.swapped],
        "left": [f"{entry.name} ({entry.kind}): {entry.note}" for entry in swaps.left],
        "config": asdict(config),
        "device": {"name": str(device), "threads": torch.get_num_threads(), "kernels": kernels(device)},
        "versions": versions(),
    }


def versions():
    return {
        "fastlayers": fastlayers.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def show(found, folder):
    """Write report.json and the plot, print the table."""
    (folder / "report.json").write_text(json.dumps(found, indent=2) + "\n")
    plots.training(found, folder / "training.png")
    names = list(found["step_seconds"])
    table = Table(title=f"{found['recipe']}, {found['steps']} steps", title_style="bold", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("accuracy", *(f"{found['accuracy'][name]:.1%}" for name in names))
    table.add_row("macro-F1", *(f"{found['macro_f1'][name]:.3f}" for name in names))
    table.add_row("time per step (median)", *(f"{found['step_seconds'][name] * 1e3:.1f} ms" for name in names))
    if "agreement" in found:
        table.add_row("speed ratio", "1.00", f"[bold green]{found['speed_ratio']:.2f}[/]")
    console.print(table)
    if "agreement" in found:
        show_agreement(found["agreement"])
    console.print(f"{folder}/: report.json, training.png, model/", soft_wrap=True)


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
