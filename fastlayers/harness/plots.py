"""The pictures of a training run."""

import statistics
import textwrap

import numpy
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, roc_curve

from fastlayers.harness import metrics

COLOURS = {"pytorch": "#ee4c2c", "fastlayers": "#1f6f8b"}
NAMES = {"pytorch": "PyTorch", "fastlayers": "fastlayers"}
RIGHT, WRONG, BARS = "#2a7f3f", "#b3261e", "#7aa6b8"
CURVES = ("accuracy", "macro_f1", "test_loss", "perplexity")  # the first two that there are get drawn
MOST_CLASSES = 30  # beyond, names and numbers in a matrix cannot be read
SAMPLES = 12


def all_of(found, logits, job, folder):
    """Every picture that the run has something to show for."""
    training(found, folder / "training.png")
    evaluations(found, folder / "metrics.png")
    name = list(logits)[-1]
    if logits[name] is None:
        return
    classes = job.data.classes
    truth, predicted, probabilities = metrics.predictions(logits[name], job.data.test["labels"])
    balance(job.data.sizes, folder / "classes.png")
    samples(job, truth, predicted, probabilities, folder / "samples.png")
    roc(truth, probabilities, classes, folder / "roc.png")
    if truth.ndim == 1:
        confusion(truth, predicted, classes, folder / "confusion.png")


def training(found, path):
    """Loss curves on the left (thin: each step, thick: running mean), time of each step on the right."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, losses in found["losses"].items():
        steps = range(1, len(losses) + 1)
        dashed = "--" if name == "fastlayers" and len(found["losses"]) > 1 else "-"
        left.plot(steps, losses, color=COLOURS[name], alpha=0.25, linewidth=1)
        left.plot(steps, running_mean(losses), dashed, color=COLOURS[name], linewidth=2, label=NAMES[name])
        seconds = [1e3 * value for value in found["all_step_seconds"][name]]
        median = statistics.median(seconds)
        right.plot(steps, seconds, ".", color=COLOURS[name], alpha=0.5, markersize=4)
        right.axhline(median, color=COLOURS[name], linewidth=2, label=f"{NAMES[name]}, median {median:.4g} ms")
    left.set(title="training loss", xlabel="step", ylabel="loss")
    left.set_ylim(0, 1.2 * max(map(max, found["losses"].values())))
    ratio = f", {found['speed_ratio']:.2f} times as fast" if "speed_ratio" in found else ""
    right.set(title=f"time per step{ratio}", xlabel="step", ylabel="milliseconds")
    right.set_ylim(0, 1.6e3 * max(found["step_seconds"].values()))  # the warm-up of the first step may lie above
    finish(figure, path, left, right)


def running_mean(values, window=10):
    """Mean of the last `window` values at each place, of fewer at the beginning."""
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def evaluations(found, path):
    """Metrics of the test set at each evaluation."""
    first = next(iter(found["evaluations"].values()))
    wanted = [metric for metric in CURVES if metric in first[-1]][:2]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    every = figure.subplots(1, len(wanted))
    for axes, metric in zip(every, wanted):
        for name, seen in found["evaluations"].items():
            dashed = "--" if name == "fastlayers" and len(found["evaluations"]) > 1 else "-"
            values, label = [one[metric] for one in seen], f"{NAMES[name]}, last {seen[-1][metric]:.4g}"
            axes.plot([one["step"] for one in seen], values, f"o{dashed}", color=COLOURS[name], label=label)
        axes.set(title=f"{metric.replace('_', ' ')} of the held-out examples", xlabel="step")
    finish(figure, path, *every)


def balance(sizes, path):
    """How many examples each class has."""
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(sizes)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(sizes), list(sizes.values()), color=BARS)
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.set(title="examples of each class", xlabel="examples")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)


def confusion(truth, predicted, classes, path):
    """Rows: what an example is; columns: what it was taken for."""
    counts = confusion_matrix(truth, predicted, labels=range(len(classes)))
    side = 2.5 + 0.45 * min(len(classes), MOST_CLASSES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(counts, cmap="Blues"), ax=axes, shrink=0.8, label="examples")
    if len(classes) <= MOST_CLASSES:
        long = max(map(len, classes)) > 3
        turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(range(len(classes)), classes, **turned)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in numpy.argwhere(counts > 0):
            dark = counts[row, column] > counts.max() / 2
            axes.text(column, row, counts[row, column], ha="center", va="center", color="white" if dark else "black")
    axes.set(title="confusion matrix", xlabel="predicted", ylabel="true")
    figure.savefig(path, dpi=144)


def roc(truth, probabilities, classes, path):
    """True against false positives of each class against the rest, as the threshold falls."""
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.subplots()
    held = truth if truth.ndim == 2 else (truth[:, None] == range(probabilities.shape[1])).astype(int)
    drawn = range(held.shape[1]) if held.shape[1] != 2 or truth.ndim == 2 else (1,)
    areas = {}
    for number in drawn:
        if 0 < held[:, number].sum() < len(held):
            false, true, _ = roc_curve(held[:, number], probabilities[:, number])
            areas[number] = float(((false[1:] - false[:-1]) * (true[1:] + true[:-1]) / 2).sum())
            label = f"{classes[number]}, area {areas[number]:.3f}"
            axes.plot(false, true, linewidth=1.5, label=label)
    axes.plot((0, 1), (0, 1), ":", color="grey", label="chance")
    axes.set(title="ROC, each class against the rest", xlabel="false positive rate", ylabel="true positive rate")
    axes.set_aspect("equal")
    finish(figure, path, axes, fontsize=8)


def samples(job, truth, predicted, probabilities, path):
    """Held-out examples with what the model says of them; wrong ones, in red, stand first."""
    several = truth.ndim == 2
    wrong = (truth != predicted).any(1) if several else truth != predicted
    order = numpy.argsort(~wrong, kind="stable")
    chosen = [*order[: SAMPLES // 2], *numpy.linspace(0, len(truth) - 1, SAMPLES - SAMPLES // 2).astype(int)]
    chosen = list(dict.fromkeys(chosen))
    if isinstance(job.sample(chosen[0]), str):
        text_samples(job, chosen, wrong, truth, predicted, path)
        return
    columns = 6
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2 * columns, 2.5 * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flat
    for axes, index in zip(every, chosen):
        axes.imshow(job.sample(index), cmap="gray")
        sure = probabilities[index].max()
        says = f"{job.data.classes[predicted[index]]} ({sure:.0%})\nis {job.data.classes[truth[index]]}"
        axes.set_title(says, color=WRONG if wrong[index] else RIGHT, fontsize=10)
    for axes in figure.axes:
        axes.axis("off")
    figure.suptitle("predictions of held-out examples")
    figure.savefig(path, dpi=144)


def text_samples(job, chosen, wrong, truth, predicted, path):
    def named(labels):
        if numpy.ndim(labels) == 0:
            return job.data.classes[labels]
        return ", ".join(name for name, holds in zip(job.data.classes, labels) if holds) or "none"

    figure = Figure(figsize=(12, 0.62 * len(chosen) + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(len(chosen), -0.6), title="predictions of held-out examples")
    for x, title in ((0.0, "text"), (0.66, "predicted"), (0.84, "true")):
        axes.text(x, -0.45, title, weight="bold", va="center")
    for row, index in enumerate(chosen):
        lines = textwrap.wrap(job.sample(index), 100)
        text = "\n".join(lines[:2]) + (" ..." if len(lines) > 2 else "")
        axes.text(0.0, row + 0.3, text, fontsize=8, va="center", parse_math=False)
        colour = WRONG if wrong[index] else RIGHT
        axes.text(0.66, row + 0.3, named(predicted[index]), color=colour, va="center", parse_math=False)
        axes.text(0.84, row + 0.3, named(truth[index]), va="center", parse_math=False)
    figure.savefig(path, dpi=144)


def finish(figure, path, *every, **legend):
    for axes in every:
        axes.legend(frameon=False, **legend)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
