"""`fastlayers bench report`: a page and pictures from the CSV of a run, and from nothing else."""

import sys
from pathlib import Path

from fastlayers.benchmarks import digest, page, pictures, results

PAGE_NAME = "report.html"


def add_arguments(parser):
    held = f"a folder with {results.CSV_NAME}, or such a file"
    parser.add_argument("results", metavar="RESULTS", type=Path, help=held)
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write (default: beside the results)")


def run(args):
    try:
        rows = results.read(args.results)
        folder = args.out or (args.results if args.results.is_dir() else args.results.parent)
        written = write(rows, folder)
    except (OSError, ValueError) as error:
        print(f"fastlayers bench report: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"written: {path}" for path in written))
    return 0


def write(rows, folder):
    """The files that were written: the page, an overview, and per suite and quantity a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = digest.cases_of(rows)
    written = [folder / PAGE_NAME]
    written[0].write_text(page.of(rows), encoding="utf-8")
    if any(case.panel and case.best for case in cases):
        written.append(folder / "overview.png")
        pictures.save_overview(cases, written[-1])
    for suite, group in digest.by("suite", cases).items():
        colours = pictures.colours_of(digest.candidates_of(group))
        for quantity in pictures.QUANTITIES:
            path = folder / f"{suite}-{quantity}.png"
            if pictures.save_suite(group, quantity, colours, path):
                written.append(path)
    return written
