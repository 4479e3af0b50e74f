"""fastlayers bench report: a page and pictures from a CSV alone."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from PIL import Image

from fastlayers import cli
from fastlayers.benchmarks import digest, page, pictures, results
from fastlayers.benchmarks.runner import OURS, Candidate, Case, Place, Result, Setting

MACHINE = {"cpu": "A CPU <of> ours", "threads": 2, "gpu": "", "torch": "9.9", "date": "2030-01-02 03:04 UTC"}
STATE = {"gpu_clock_mhz": "", "gpu_temperature_c": "", "gpu_power_w": ""}
ROOFS = {"copy_gbytes_per_second": 10.0, "float32": 100.0}


def made(name, suite, place, ours, others, **options):
    """Rows of a case: milliseconds of ours and of {other: milliseconds}, or why it failed, or (None, why skipped)."""
    results_of_case = []
    for candidate, value in {OURS: ours, **others}.items():
        if isinstance(value, str):
            results_of_case.append(Result(candidate, problem=value))
        elif isinstance(value, tuple):
            results_of_case.append(Result(candidate, skipped=value[1]))
        else:
            seconds = [value * 1e-3 * factor for factor in (0.98, 1.0, 1.02, 0.99, 1.01)]
            results_of_case.append(Result(candidate, seconds, deviation=0.5, peak_bytes=int(value * 1e6)))
    case = Case(suite, name, lambda: {"": Candidate(None)}, place=place, dtype="float32", **options)
    return results.rows_of(case, results_of_case, ROOFS, {**STATE, **MACHINE})


def rows():
    found = []
    for size, (ours, other) in {256: (1.0, 3.0), 1024: (2.0, 2.0), 4096: (9.0, 6.0)}.items():
        place = Place("attention", "forward, float32", "sequence length", size)
        others = {"sdpa": other, "sdpa (math)": 4 * other, "flash-attn": (None, "not installed")}
        found += made(f"forward S{size}", "attention", place, ours, others, flops=1e7, bytes=1e6)
    found += made("target", "attention", Place(), 1.0, {"sdpa": 3.0, "broken": "RuntimeError: no <kernel>"}, flops=1e7)
    found += made("wanted", "adam", Place(), 1.0, {"AdamW": 1.5}, targets={"AdamW": 4.0}, bytes=1e6)
    for model in ("BERT, 1 x 2", "GPT-2, 3 x 4"):
        found += made(model, "train", Place("step", "training step", "model", model), 20.0, {"eager": 50.0}, tokens=128)
    return found


@pytest.fixture
def folder(tmp_path):
    results.write(tmp_path, rows(), MACHINE, ROOFS)
    return tmp_path


class Strict(HTMLParser):
    """Every tag that is opened is closed, in order; and what is loaded from elsewhere."""

    VOID = ("meta", "br", "path", "use")

    def __init__(self, text):
        super().__init__()
        self.open, self.loads = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag


def test_the_page_holds_everything_and_needs_nothing(folder, capsys):
    assert cli.main(["bench", "report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert f"written: {folder / 'report.html'}" in capsys.readouterr().out
    assert Strict(text).loads == [] and "<script" not in text and "url(http" not in text and "@import" not in text
    assert "A CPU &lt;of&gt; ours" in text and "no &lt;kernel&gt;" in text and "not installed" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert not re.search("|".join(pictures.PALETTE), text.partition("</style>")[2])  # colours are the page's own
    assert text.count("<svg") == 3 + 4 + 3  # lines, axis; four charts; a model has no roofline


def test_losses_are_shown_as_wins_are(folder):
    text = page.of(results.read(folder))
    tiles = re.findall(r">(\d+)</b>([a-z ]+)</div>", text)
    assert tiles == [("5", "faster"), ("1", "cannot be told from noise"), ("1", "slower")]
    lost = text.partition("Where fastlayers is slower</h2>")[2].partition("<h2>")[0]
    assert "1 cases, the worst first" in lost and "forward S4096" in lost and ">0.67</span>" in lost
    wanted = text.partition("What it set out to reach</h2>")[2].partition("<h2>")[0]
    assert ">1.50</span>" in wanted and "<td>no</td>" in wanted


def test_pictures_are_made_of_what_there_is(folder):
    cli.main(["bench", "report", str(folder)])
    made = {path.name for path in folder.glob("*.png")}
    kinds = {f"{suite}-{kind}.png" for suite in ("attention", "train") for kind in pictures.QUANTITIES}
    assert made == {"overview.png"} | kinds - {"train-roofline.png"}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.verify()
            assert min(image.size) > 200


def test_charts_say_what_the_rows_say(folder):
    """The points of a chart are where the rows put them: read back from its SVG."""
    cases = digest.cases_of(results.read(folder))
    group = digest.by("panel", cases)["forward, float32"]
    assert [case.place for case in group] == [256.0, 1024.0, 4096.0]
    assert [case.best["candidate"] for case in group] == ["sdpa"] * 3
    assert digest.candidates_of(group) == [OURS, "sdpa", "sdpa (math)"]
    for quantity in pictures.QUANTITIES:
        svg = pictures.panel_svg(group, quantity, pictures.colours_of(digest.candidates_of(group)))
        ET.fromstring(svg[svg.index("<svg") :])
        assert "sequence length" in svg and "256" in svg and "1k" in svg
    svg = pictures.panel_svg(group, "speed", pictures.colours_of([OURS, "sdpa", "sdpa (math)"]))
    (line,) = re.findall(rf'<path d="([^"]+)"[^>]*stroke: {pictures.PALETTE[0]}; stroke-width: 2.4', svg)
    heights = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", line)]
    assert heights == sorted(heights)  # 10, 5 and 1.1 GFLOP/s: the curve falls, and y grows downwards


def test_a_run_in_which_nothing_was_timed_has_a_page(tmp_path):
    results.write(tmp_path, made("none", "adam", Place("line", "panel", "size", 1), "no memory", {}), MACHINE, ROOFS)
    assert cli.main(["bench", "report", str(tmp_path / "results.csv"), "--out", str(tmp_path / "page")]) == 0
    assert "no memory" in (tmp_path / "page" / "report.html").read_text()


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("", "holds no results of `fastlayers bench`: it lacks"),
        ("a,b\n1,2\n", "it lacks"),
        ("{header}\n", "holds no results, only a header"),
        ("{header}\n{row}\n", "holds 'many', wanted a number"),
    ],
)
def test_a_file_that_is_no_result_is_named(text, message, tmp_path, capsys):
    names = ["suite", "case", "candidate", "status", *results.NUMBERS]
    if text is not None:
        row = ",".join("many" if name == "rounds" else "" for name in names)
        (tmp_path / "results.csv").write_text(text.format(header=",".join(names), row=row))
    assert cli.main(["bench", "report", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "results.csv" in shown


def test_settings_are_told_apart():
    cold, warm = (made("one", "adam", Place(), 1.0, {"b": 2.0}, setting=Setting(cold=cold)) for cold in (True, False))
    assert [case.cache for case in digest.cases_of([*cold, *warm])] == ["cold", "warm"]
