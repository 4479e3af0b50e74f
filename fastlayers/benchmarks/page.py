"""Results as one HTML page that needs nothing else: no script, no network, light and dark."""

import math
from html import escape

from fastlayers.benchmarks import digest, pictures
from fastlayers.benchmarks.results import FAILED, SKIPPED
from fastlayers.benchmarks.runner import OTHERS_MAY, OURS
from fastlayers.benchmarks.shown import duration

DARK = ("#3bc9db", "#ff922b", "#b197fc", "#f783ac", "#69db7c", "#ffd43b", "#ced4da", "#74c0fc")  # of pictures.PALETTE
DARK_VERDICTS = {"faster": "#69db7c", "cannot be told from noise": "#adb5bd", "slower": "#ff8787"}

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #24292f; --faint: #57606a; --line: #d0d7de; --card: #f6f8fa;
%(light)s }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --line: #30363d;
--card: #161b22; %(dark)s } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { margin: .5rem 0 0; font-size: 1.7rem } h2 { margin: 2.5rem 0 .5rem; font-size: 1.3rem }
h3 { margin: 0 0 .3rem; font-size: 1rem } p { max-width: 46rem } small, .faint { color: var(--faint) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .87rem }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0 }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.tile { padding: .5rem 1rem; min-width: 6rem } .card { padding: .8rem; margin: .8rem 0 }
.tile b { display: block; font-size: 1.6rem }
.charts { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(16.5rem, 1fr)) }
.charts svg { width: 100%%; height: auto; max-width: 26rem } .wide svg { width: 100%%; height: auto; max-width: 60rem }
.wide { overflow-x: auto } svg text { font-family: inherit !important; fill: currentColor }
.strips { display: grid; grid-template-columns: max-content 1fr; column-gap: .8rem; align-items: center }
.strip { display: block; width: 100%%; font-size: .8rem }
.strip line { stroke: var(--line) } .strip .one { stroke: var(--ink) }
@media (max-width: 40rem) { .strips { grid-template-columns: 1fr } .strips span { margin-top: .35rem } }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .3rem 0; font-size: .9rem }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%%; margin-right: .35rem }
.mark { font-weight: 600 } summary { cursor: pointer; padding: .3rem 0 } code { overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .87rem; margin: .5rem 0 }
dt { color: var(--faint) } dd { margin: 0; overflow-wrap: anywhere }
.notice { border-left: 4px solid var(--c1); padding: .4rem .8rem; background: var(--card) }
"""
TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s</title><style>%(style)s</style></head>
<body>%(body)s</body></html>
"""

MACHINE = ("gpu", "cpu", "threads", "isa", "driver", "cuda", "torch", "triton", "python", "fastlayers", "others")
RUN = ("commit", "date", "command")
VERDICT_NAMES = {name: f"v{number}" for number, name in enumerate(pictures.VERDICTS)}


def html(title, body):
    """The whole page around its body."""

    def variables(colours, verdicts):
        found = [f"--c{number}: {colour};" for number, colour in enumerate(colours)]
        return " ".join([*found, *(f"--{VERDICT_NAMES[name]}: {colour};" for name, colour in verdicts.items())])

    style = STYLE % {
        "light": variables(pictures.PALETTE, pictures.VERDICTS),
        "dark": variables(DARK, DARK_VERDICTS),
    }
    return TEMPLATE % {"title": escape(title), "style": style, "body": body}


def embedded(svg):
    """An SVG for the page, its colours replaced by the page's own, which know light and dark."""
    svg = svg[svg.index("<svg") :]
    names = {pictures.INK: "currentColor", pictures.GRID: "var(--line)"}
    names |= {colour: f"var(--c{number})" for number, colour in enumerate(pictures.PALETTE)}
    names |= {pictures.VERDICTS[verdict]: f"var(--{name})" for verdict, name in VERDICT_NAMES.items()}
    for colour, name in names.items():
        svg = svg.replace(f": {colour}", f": {name}")
    return svg


def of(rows):
    """The page of a run's rows."""
    cases, first = digest.cases_of(rows), rows[0]
    device = first["gpu"] or f"{first['cpu']}, {first['threads']:.0f} threads"
    parts = [f"<h1>fastlayers on {escape(device)}</h1>", f"<p class=faint>measured {escape(first['date'])}</p>"]
    parts += [_tiles(cases), _facts(first), _overview(cases), _losses(cases), _targets(cases)]
    for suite, group in digest.by("suite", cases).items():
        if digest.by("panel", group):
            parts.append(_suite(suite, group))
    parts += [_absent(rows), _everything(cases), _method(rows)]
    return html(f"fastlayers on {device}", "\n".join(parts))


def _tiles(cases):
    """How the comparisons with the best other came out."""
    best = [case.best for case in cases if case.best]
    counts = {verdict: sum(row["verdict"] == verdict for row in best) for verdict in pictures.VERDICTS}
    tiles = [
        f'<div class=tile><b style="color: var(--{VERDICT_NAMES[verdict]})">{count}</b>{verdict}</div>'
        for verdict, count in counts.items()
    ]
    says = f"<p>{len(best)} cases in which fastlayers has somebody beside it; beside the fastest of them it is:</p>"
    return f"{says}<div class=tiles>{''.join(tiles)}</div>"


def _facts(first):
    pairs = [(name, first[name]) for name in (*MACHINE, *RUN) if first.get(name)]
    lines = "".join(f"<dt>{name}</dt><dd>{escape(_plain(value))}</dd>" for name, value in pairs)
    return f"<details open><summary>machine, versions, command</summary><dl>{lines}</dl></details>"


def _plain(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def _overview(cases):
    """A strip for each line, a dot for each case: drawn without a fixed width, so that it fits a phone."""
    lines = digest.by("line", [case for case in cases if case.best])
    if not lines:
        return ""
    ratios = [case.best["times_the_speed"] for group in lines.values() for case in group]
    ticks = pictures.ratio_ticks(ratios)
    low, high = math.log(ticks[0]), math.log(ticks[-1])

    def across(ratio):
        return f"{2 + 96 * (math.log(ratio) - low) / (high - low):.2f}%"

    grid = "".join(f'<line x1={across(x)} x2={across(x)} y2=100% class="{"one" if x == 1 else ""}"/>' for x in ticks)
    rows = []
    for name, group in lines.items():
        dots = "".join(_dot(case, across) for case in group)
        rows.append(f"<span>{escape(name)}</span><svg class=strip height=20>{grid}{dots}</svg>")
    texts = "".join(f"<text x={across(tick)} y=14 text-anchor=middle>{tick:g}</text>" for tick in ticks)
    says = "Times as fast as the fastest of the others, on a scale of ratios; a dot is a case."
    axis = f"<span></span><svg class=strip height=20>{texts}</svg>"
    return f"<h2>At a glance</h2><p>{says}</p><div class=strips>{''.join(rows)}{axis}</div>"


def _dot(case, across):
    row = case.best
    name, colour = f"{case.case}: {row['times_the_speed']:.2f}", VERDICT_NAMES[row["verdict"]]
    title = f"<title>{escape(name)}</title>"
    return f'<circle cx={across(row["times_the_speed"])} cy=10 r=5 style="fill: var(--{colour})">{title}</circle>'


def _losses(cases):
    """Every case that is slower than some other, the worst first."""
    lost = [(case, case.best) for case in cases if case.best and case.best["verdict"] == "slower"]
    if not lost:
        return "<h2>Where fastlayers is slower</h2><p>In no case of this run.</p>"
    lost.sort(key=lambda pair: pair[1]["times_the_speed"])
    lines = [_compared(case, row) for case, row in lost]
    shown = table(("case", "the faster", "times as fast as it"), lines)
    return f"<h2>Where fastlayers is slower</h2><p>{len(lost)} cases, the worst first.</p>{shown}"


def _compared(case, row):
    return f"{case.suite}: {case.case}", row["candidate"], _ratio(row)


def _ratio(row):
    """A number in the colour of what it amounts to."""
    low, high = row["times_the_speed_p20"], row["times_the_speed_p80"]
    colour = VERDICT_NAMES[row["verdict"]]
    number = f'<span class=mark style="color: var(--{colour})">{row["times_the_speed"]:.2f}</span>'
    return Html(f"{number} <small>({low:.2f} .. {high:.2f})</small>")


class Html(str):
    """Text that is HTML already, and stands in a column of numbers."""


def table(heads, lines):
    def cell(tag, value):
        right = isinstance(value, Html)
        return f"<{tag}{' class=n' if right else ''}>{value if right else escape(str(value))}</{tag}>"

    numbers = {place for line in lines for place, value in enumerate(line) if isinstance(value, Html)}
    top = "".join(cell("th", Html(head) if place in numbers else head) for place, head in enumerate(heads))
    body = "".join(f"<tr>{''.join(cell('td', value) for value in line)}</tr>" for line in lines)
    return f"<div class=scroll><table><tr>{top}</tr>{body}</table></div>"


def _targets(cases):
    """What the project set out to reach."""
    lines = []
    for case in cases:
        for row in (row for row in case.timed if row["wanted"]):
            beside, wanted, found, reached = row["candidate"], f"{row['wanted']:g}", "", False
            if row["times_the_speed"]:
                found, reached = _ratio(row), row["times_the_speed"] >= row["wanted"]
            else:
                took = row["milliseconds"] / 1e3
                beside, wanted = "a clock", f"at most {duration(row['wanted'])}"
                found, reached = Html(duration(took)), took <= row["wanted"]
            name = f"{case.suite}: {case.case}"
            lines.append((name, beside, Html(wanted), found, "yes" if reached else "no"))
    if not lines:
        return ""
    return f"<h2>What it set out to reach</h2>{table(('case', 'beside', 'wanted', 'found', 'reached'), lines)}"


def _suite(suite, cases):
    colours = pictures.colours_of(digest.candidates_of(cases))
    legend = "".join(
        f'<span><i style="background: var(--c{list(pictures.PALETTE).index(colour)})"></i>{escape(name)}</span>'
        for name, colour in colours.items()
    )
    cards = []
    for name, group in digest.by("panel", cases).items():
        svgs = (pictures.panel_svg(group, quantity, colours) for quantity in pictures.QUANTITIES)
        charts = "".join(f"<div>{embedded(svg)}</div>" for svg in svgs if svg)
        cards.append(f"<div class=card><h3>{escape(name)}</h3><div class=charts>{charts}</div></div>")
    return f"<h2>{escape(suite)}</h2><div class=legend>{legend}</div>{''.join(cards)}"


def _absent(rows):
    """What failed, and what was left out, each with its reason."""
    parts = []
    for status, title in ((FAILED, "What failed"), (SKIPPED, "What was left out")):
        found = {}
        for row in rows:
            if row["status"] == status:
                key = row["suite"], row["candidate"], row["problem"]
                found.setdefault(key, []).append(row["case"])
        lines = [(*key, cases[0] if len(cases) == 1 else Html(f"{len(cases)} cases")) for key, cases in found.items()]
        if lines:
            parts.append(f"<h2>{title}</h2>{table(('suite', 'candidate', 'why', 'where'), lines)}")
    return "".join(parts)


def _everything(cases):
    heads = (
        "case",
        "candidate",
        "median",
        "20 .. 80 %",
        "fastlayers is",
        "times as fast",
        "roofline",
        "memory",
        "deviation",
    )
    lines = []
    for case in cases:
        for row in case.timed:
            ends = (duration(row[f"milliseconds_{end}"] / 1e3) for end in ("p20", "p80"))
            lines.append(
                (
                    *(f"{case.suite}: {case.case}", row["candidate"], Html(duration(row["milliseconds"] / 1e3))),
                    *(Html(" .. ".join(ends)), row["verdict"], _ratio(row) if row["times_the_speed"] else ""),
                    *(_number(row["roofline_share"], "{:.0%}"), _number(row["peak_mbytes"], "{:.0f} MB")),
                    _number(row["deviation"], "{:.2f}"),
                )
            )
    return f"<h2>All numbers</h2><details><summary>{len(lines)} rows</summary>{table(heads, lines)}</details>"


def _number(value, form):
    return Html("" if value is None else form.format(value))


def _method(rows):
    """How to read the numbers."""
    products = {row["dtype"]: row["matmul_gflops"] for row in rows if row["matmul_gflops"]}
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in products.items()) or "no rate"
    cold, on_gpu = rows[0]["cache"] == "cold", rows[0]["device"] == "cuda"
    inputs = "come from memory: they take turns" if cold else "are the same each time, so that caches hold them"
    memory = "by torch's allocator" if on_gpu else "as resident memory of the process"
    return f"""<h2>How it was measured</h2>
<p>All candidates of a case run in one process and take turns, the first place going round; each was checked against
float64 before it was timed (deviation: 1 is the most that fastlayers is allowed, {OTHERS_MAY:g} the most for others).
Inputs {inputs}. A ratio is the median
of the ratios of the rounds, with their 20th and 80th percentiles; where these enclose 1, the case cannot be told from
noise.</p>
<p>The roofline is what a step would take if it only read and wrote each number once at the speed of a large copy or
addition ({rows[0]["copy_gbytes_per_second"]:.1f} GB/s), or only multiplied at the speed of torch's own matrix product
({rates}), whichever takes longer; both were measured on this machine in this run.
A cache that is faster than memory can carry a share beyond 100 %.</p>
<p>Memory is what one step takes beyond what lies there before it, {memory}.</p>
<p>fastlayers is the row named {OURS}; where it stands with a name in brackets, that kernel was asked for.</p>"""
