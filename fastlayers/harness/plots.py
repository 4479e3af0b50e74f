"""The picture of a training run."""

import statistics

from matplotlib.figure import Figure

COLOURS = {"pytorch": "#ee4c2c", "fastlayers": "#1f6f8b"}
TITLES = {"pytorch": "PyTorch", "fastlayers": "fastlayers"}


def training(found, path):
    """Loss curves on the left (thin: each step, thick: running mean), time of each step on the right."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, losses in found["losses"].items():
        steps = range(1, len(losses) + 1)
        dashed = "--" if name == "fastlayers" and len(found["losses"]) > 1 else "-"
        left.plot(steps, losses, color=COLOURS[name], alpha=0.25, linewidth=1)
        label = f"{TITLES[name]}, accuracy {found['accuracy'][name]:.1%}"
        left.plot(steps, running_mean(losses), dashed, color=COLOURS[name], linewidth=2, label=label)
        seconds = [1e3 * value for value in found["all_step_seconds"][name]]
        median = statistics.median(seconds)
        right.plot(steps, seconds, ".", color=COLOURS[name], alpha=0.5, markersize=4)
        right.axhline(median, color=COLOURS[name], linewidth=2, label=f"{TITLES[name]}, median {median:.0f} ms")
    left.set(title="training loss", xlabel="step", ylabel="cross-entropy")
    left.set_ylim(0, 1.2 * max(map(max, found["losses"].values())))
    ratio = f", {found['speed_ratio']:.2f} times as fast" if "speed_ratio" in found else ""
    right.set(title=f"time per step{ratio}", xlabel="step", ylabel="milliseconds")
    right.set_ylim(0, 1.6e3 * max(found["step_seconds"].values()))  # the warm-up of the first step may lie above
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)


def running_mean(values, window=10):
    """Mean of the last `window` values at each place, of fewer at the beginning."""
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
