"""Pictures of results: speed, ratio to the best other, share of the roofline and peak memory, against size."""

import io
import math
import textwrap

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fastlayers.benchmarks import digest
from fastlayers.benchmarks.runner import OURS

INK = "#24292f"
GRID = "#d0d7de"
PALETTE = ("#0b7285", "#e8590c", "#7048e8", "#c2255c", "#2f9e44", "#b08900", "#495057", "#1971c2")  # ours is the first
VERDICTS = {"faster": "#2f9e44", "cannot be told from noise": "#868e96", "slower": "#e03131"}
QUANTITIES = ("speed", "ratio", "roofline", "memory")
TITLES = {
    "speed": "speed, {unit}",
    "ratio": "times as fast as the best other",
    "roofline": "share of the roofline, %",
    "memory": "peak memory of a step, MB",
}
COLUMNS = {"roofline": ("roofline_share", 100.0), "memory": ("peak_mbytes", 1.0)}
RC = {
    **{"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.labelcolor": INK},
    **{"axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK},
    **{"axes.titlesize": 9.5, "axes.titleweight": "bold"},
}


def colours_of(candidates):
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(candidates)}


def panel_svg(cases, quantity, colours):
    """One chart, for a page: text stays text, so that the page's font and colours apply. None: nothing to draw."""
    with matplotlib.rc_context({**RC, "svg.hashsalt": f"{cases[0].suite} {cases[0].panel} {quantity}"}):
        numbers = all(isinstance(case.place, float) for case in cases)
        figure = Figure(figsize=(3.7, 2.5), layout=None if numbers else "constrained")
        axes = figure.add_axes((0.13, 0.2, 0.85, 0.67)) if numbers else figure.subplots()
        if not chart(axes, cases, quantity, colours):
            return None
        return _svg(figure)


def bars_svg(name, values, title):
    """{text: number} as bars, on a scale of powers of ten where they lie far apart."""
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        figure = Figure(figsize=(7.2, 0.3 * len(values) + 0.9), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(list(values), list(values.values()), color=PALETTE[0], height=0.65)
        axes.bar_label(bars, fmt=_number, padding=3)
        axes.invert_yaxis()
        least, most = min(values.values()), max(values.values())
        if most > 10 * least:
            axes.set_xscale("log")
        axes.set_xlim(least / 3 if most > 10 * least else 0, 2 * most)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        return _svg(figure)


def _svg(figure):
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return stream.getvalue()


def save_suite(cases, quantity, colours, path):
    """All panels of a suite in one PNG; False where there is nothing to draw."""
    with matplotlib.rc_context(RC):
        drawn = {name: group for name, group in digest.by("panel", cases).items() if has(group, quantity)}
        if not drawn:
            return False
        columns = min(4, len(drawn))
        rows = math.ceil(len(drawn) / columns)
        figure = Figure(figsize=(max(7.2, 3.6 * columns), 2.6 * rows + 0.8), layout="constrained")
        every = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (name, group) in zip(every, drawn.items()):
            chart(axes, group, quantity, colours)
            axes.set_title(textwrap.fill(name, 38), loc="left")
        for axes in list(every)[len(drawn) :]:
            axes.axis("off")
        figure.suptitle(TITLES[quantity].format(unit=digest.speed_of(cases)[1]))
        if quantity != "ratio":
            used = digest.candidates_of([case for group in drawn.values() for case in group])
            lines = [matplotlib.lines.Line2D([], [], color=colours[name], marker="o", markersize=4) for name in used]
            figure.legend(lines, used, loc="outside lower center", ncols=min(4, len(used)), frameon=False)
        figure.savefig(path, dpi=144)
        return True


def has(cases, quantity):
    if quantity == "ratio":
        return any(case.best for case in cases)
    column = COLUMNS[quantity][0] if quantity in COLUMNS else digest.speed_of(cases)[0]
    return any(row[column] is not None for case in cases for row in case.timed)


def chart(axes, cases, quantity, colours):
    """Draw one panel; False where its results do not hold the quantity."""
    if not has(cases, quantity):
        return False
    numbers = all(isinstance(case.place, float) for case in cases)
    draw = _ratio if quantity == "ratio" else _lines if numbers else _bars
    unit = draw(axes, cases, quantity, colours)
    axes.set_title(TITLES[quantity].format(unit=unit), loc="left")
    axes.grid(axis="x" if draw is _bars else "y", color=GRID, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if numbers:
        _size_axis(axes, cases)
    return True


def _size_axis(axes, cases):
    sizes = [case.place for case in cases]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [_short(size) for size in sizes])
    axes.set_xlabel(cases[0].axis)


def _short(size):
    return f"{size / 1024:.0f}k" if size >= 1024 and size % 1024 == 0 else f"{size:.0f}"


def _number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _values(case, quantity, cases):
    """{candidate: number} of one case, and the unit."""
    column, unit = digest.speed_of(cases)
    column, factor = COLUMNS.get(quantity, (column, 1.0))
    return {row["candidate"]: row[column] * factor for row in case.timed if row[column] is not None}, unit


def _lines(axes, cases, quantity, colours):
    found = [(case.place, *_values(case, quantity, cases)) for case in cases]
    for name in digest.candidates_of(cases):
        points = [(place, values[name]) for place, values, _ in found if name in values]
        width, order = (2.4, 4) if name == OURS else (1.5, 3)
        axes.plot(*zip(*points), "o-", color=colours[name], markersize=4, linewidth=width, zorder=order)
    highest = max(value for _, values, _ in found for value in values.values())
    smallest = min(value for _, values, _ in found for value in values.values())
    if quantity == "memory" and 0 < smallest < highest / 30:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * highest or 1)
    return found[0][2]


def _bars(axes, cases, quantity, colours):
    """A group of bars for each text on the axis, ours on top."""
    names, unit = digest.candidates_of(cases), ""
    for place, case in enumerate(cases):
        values, unit = _values(case, quantity, cases)
        for number, name in enumerate(names):
            if name in values:
                height = 0.8 / len(names)
                bars = axes.barh(place - 0.4 + (number + 0.5) * height, values[name], 0.9 * height, color=colours[name])
                axes.bar_label(bars, fmt=_number, padding=2, fontsize=8)
    axes.set_yticks(range(len(cases)), [str(case.size).replace(", ", "\n", 1) for case in cases])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    return unit


def _ratio(axes, cases, quantity, colours):
    """The median over the rounds, its 20th to 80th percentile, and a colour for what it amounts to."""
    drawn = [(case, case.best) for case in cases if case.best]
    numbers = all(isinstance(case.place, float) for case in cases)
    for place, (case, row) in enumerate(drawn):
        middle, low, high = (row[f"times_the_speed{end}"] for end in ("", "_p20", "_p80"))
        x = case.place if numbers else place
        errors = [[middle - low], [high - middle]]
        axes.errorbar([x], [middle], errors, fmt="o", color=VERDICTS[row["verdict"]], markersize=5, capsize=2)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_ylim(0, max(1.2, 1.12 * max(row["times_the_speed_p80"] for _, row in drawn)))
    if not numbers:
        axes.set_xticks(range(len(drawn)), [str(case.size).replace(", ", "\n") for case, _ in drawn], fontsize=7)
        axes.margins(x=0.2)
    return ""


def overview(cases):
    """One dot per case: how many times as fast as the best other."""
    lines = digest.by("line", [case for case in cases if case.best])
    figure = Figure(figsize=(7.2, 0.25 * len(lines) + 1.2), layout="constrained")
    axes = figure.subplots()
    for number, group in enumerate(lines.values()):
        ratios = [case.best["times_the_speed"] for case in group]
        axes.plot([min(ratios), max(ratios)], [number, number], color=GRID, linewidth=2, zorder=1)
        colours = [VERDICTS[case.best["verdict"]] for case in group]
        axes.scatter(ratios, [number] * len(group), c=colours, s=26, zorder=2)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = ratio_ticks([case.best["times_the_speed"] for group in lines.values() for case in group])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(ticks[0] / 1.05, ticks[-1] * 1.05)
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_title("times as fast as the fastest of the others; a dot is a case", loc="left")
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    dots = [matplotlib.lines.Line2D([], [], color=c, marker="o", linestyle="") for c in VERDICTS.values()]
    figure.legend(dots, VERDICTS, loc="outside lower right", ncols=3, frameon=False)
    return figure


def ratio_ticks(ratios):
    """Powers of 2 that enclose 1 and all of these."""
    low, high = math.floor(math.log2(min(ratios))), math.ceil(math.log2(max(ratios)))
    return [2.0**power for power in range(min(low, -1), max(high, 1) + 1)]


def save_overview(cases, path):
    with matplotlib.rc_context(RC):
        overview(cases).savefig(path, dpi=144)
