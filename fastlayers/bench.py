"""`fastlayers bench`: time fastlayers beside PyTorch on this machine, print the ratios, write a CSV."""

import argparse
import csv
import importlib
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastlayers
from fastlayers import _native, backends
from fastlayers.benchmarks import runner
from fastlayers.benchmarks.tune import tune
from fastlayers.choices import own_path
from fastlayers.info import cpu_name

SUITES = ("attention", "linear_act", "adam", "train", "install")
SECONDS, QUICK_SECONDS = 20.0, 3.0  # of timing per case


def add_arguments(parser):
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", type=suite, help=f"{', '.join(SUITES)}; all of them by default")
    add("-k", dest="words", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    add("--quick", action="store_true", help="a few seconds per case; leaves out the clean build")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: as torch chooses)")
    add("--out", metavar="FILE.csv", type=Path, help="write the results there")
    add("--list", action="store_true", help="print the cases and time nothing")
    add("--tune", action="store_true", help="find the best backend per shape on this GPU, for calls that name none")


def suite(text):
    if text not in SUITES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(SUITES)}")
    return text


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted an integer of at least 1, got {text!r}")
    return int(text)


def run(args):
    if args.tune:
        return run_tune(args)
    if args.out and not args.out.parent.is_dir():
        print(f"fastlayers bench: --out {args.out}: there is no folder {args.out.parent}", file=sys.stderr)
        return 2
    cases = [
        case
        for name in args.suites or SUITES
        for case in importlib.import_module(f"fastlayers.benchmarks.{name}").CASES
        if args.words in case.name and not (args.quick and case.slow)
    ]
    if not cases:
        print(f"fastlayers bench: no case of {' '.join(args.suites or SUITES)} has {args.words!r} in its name")
        return 2
    if args.list:
        print("\n".join(f"{case.suite:<11} {case.name}" for case in cases))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items() if name != "command"))
    rows, failed = [], False
    for case in cases:
        results, problem = run_guarded(case, QUICK_SECONDS if args.quick else SECONDS)
        print("\n" + "\n".join(as_text(case, results, problem)), flush=True)
        rows += [{**row, **machine} for row in as_rows(case, results)]
        failed = failed or bool(problem) or any(result.problem for result in results)
    if args.out:
        write_csv(args.out, rows)
        print(f"\nwritten to {args.out}")
    return 1 if failed else 0


def run_tune(args):
    if args.out or args.list:
        print(f"fastlayers bench: --tune writes {own_path()}; it takes neither --out nor --list", file=sys.stderr)
        return 2
    if backends.cuda_device == "cuda" and not torch.cuda.is_available():
        print("fastlayers bench: --tune chooses among GPU kernels, and torch sees no NVIDIA GPU", file=sys.stderr)
        return 2
    if not tune(args.suites or SUITES, args.words, args.quick):
        print("fastlayers bench: --tune found no call to choose a backend for", file=sys.stderr)
        return 2
    return 0


def run_guarded(case, seconds):
    """The case's results, and why it could not be set up (with no results) or None."""
    torch.manual_seed(0)
    try:
        return runner.run_case(case, seconds), None
    except Exception as error:
        return [], runner.one_line(error)


def describe_machine():
    """What a number means nothing without."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": _native.cpu_isa,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "fastlayers": fastlayers.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["fastlayers", *sys.argv[1:]]),
    }


def commit():
    """The commit of the source tree that is running, with -dirty where it was changed since; "" for a wheel."""
    source = Path(fastlayers.__file__).parent.parent
    if not (source / ".git").exists():
        return ""
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def ratio_to(case, results, result):
    """(median, 20th, 80th percentile) of how many times faster ours was than this candidate, or None."""
    ours = results[0]
    if result is ours or not ours.seconds or not result.seconds:
        return None
    each = runner.ratios(ours, result)
    return tuple(runner.percentile(each, percent) for percent in (50, 20, 80))


def as_text(case, results, problem):
    """The lines that show one case."""
    lines = [f"{case.suite}: {case.name}"]
    if problem:
        return [*lines, f"  not run: {problem}"]
    width = max(len(result.candidate) for result in results) + 2
    for result in results:
        name = f"  {result.candidate:<{width}}"
        if result.problem:
            lines.append(f"{name}failed: {result.problem}")
            continue
        low, high = result.percentile(20), result.percentile(80)
        text = (
            f"{name}{duration(result.median):>9}  ({duration(low)} .. {duration(high)}, {len(result.seconds)} rounds)"
        )
        text += "".join(f"  {speed}" for speed in speeds(case, result))
        if result.deviation is not None:
            text += f"  deviation {result.deviation:.2f}"
        lines.append(text)
    lines += [line for result in results if (line := verdict(case, results, result))]
    return lines


def verdict(case, results, result):
    """What became of the case's target that concerns this candidate; "" where there is none."""
    if case.limit is not None and result.seconds:
        reached = "reached" if result.median <= case.limit else "MISSED"
        return f"  {duration(result.median)}, wanted at most {duration(case.limit)}: {reached}"
    ratio = ratio_to(case, results, result)
    if ratio is None:
        return ""
    text = f"  {ratio[0]:.2f} times the speed of {result.candidate} ({ratio[1]:.2f} .. {ratio[2]:.2f})"
    wanted = case.targets.get(result.candidate)
    if wanted is None:
        return text
    return f"{text}, wanted {wanted:g}: {'reached' if ratio[0] >= wanted else 'MISSED'}"


def duration(seconds):
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.4g} {unit}"


def speeds(case, result):
    if case.flops:
        yield f"{case.flops / result.median / 1e9:.0f} GFLOP/s"
    elif case.bytes:
        yield f"{case.bytes / result.median / 1e9:.1f} GB/s"


def as_rows(case, results):
    """One row of the CSV per candidate."""
    for result in results:
        ratio = ratio_to(case, results, result) or ("", "", "")
        timed = bool(result.seconds)
        yield {
            "suite": case.suite,
            "case": case.name,
            "candidate": result.candidate,
            "milliseconds": 1e3 * result.median if timed else "",
            "milliseconds_p20": 1e3 * result.percentile(20) if timed else "",
            "milliseconds_p80": 1e3 * result.percentile(80) if timed else "",
            "rounds": len(result.seconds),
            "gflops": case.flops / result.median / 1e9 if timed and case.flops else "",
            "gbytes_per_second": case.bytes / result.median / 1e9 if timed and case.bytes else "",
            "times_the_speed": ratio[0],
            "times_the_speed_p20": ratio[1],
            "times_the_speed_p80": ratio[2],
            "wanted": case.targets.get(result.candidate, case.limit or ""),
            "deviation": "" if result.deviation is None else result.deviation,
            "problem": result.problem or "",
        }


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
