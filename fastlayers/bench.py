"""`fastlayers bench`: time fastlayers beside PyTorch and other packages on this machine, and write the results."""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from fastlayers import backends
from fastlayers.benchmarks import machine, results, roofline, runner, shown
from fastlayers.benchmarks.runner import Setting
from fastlayers.benchmarks.tune import tune
from fastlayers.choices import own_path
from fastlayers.info import machine_reason

SUITES = ("attention", "linear_act", "adam", "train", "install")
SECONDS, QUICK_SECONDS = 10.0, 1.0  # of timing per case
ROUNDS, QUICK_ROUNDS = 10, 5  # at least
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
COMMANDS = {"report": ("fastlayers.benchmarks.report", "make a page and pictures of results", "bench")}


def add_arguments(parser):
    add = parser.add_argument
    parser.epilog = "`fastlayers bench report FOLDER` makes a page and pictures of what --out FOLDER holds"
    add("suites", nargs="*", metavar="SUITE", type=suite, help=f"{', '.join(SUITES)}; all of them by default")
    add("-k", dest="words", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    add("--device", choices=("cpu", "cuda"), help="where to measure (default: cuda where there is a GPU)")
    add("--dtype", type=dtype, action="append", help="float32, bfloat16 or float16 (fp32, bf16, fp16); may be repeated")
    add("--warm", action="store_true", help="the same inputs each time, so that caches hold them (default: cold)")
    add("--quick", action="store_true", help="a second per case; leaves out the clean build")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: as torch chooses)")
    add("--out", metavar="FOLDER", type=Path, help=f"write {results.CSV_NAME} and {results.JSON_NAME} there")
    add("--share", action="store_true", help="end with a small text that can be pasted into an issue")
    add("--list", action="store_true", help="print the cases and time nothing")
    add("--tune", action="store_true", help="find the best backend per shape on this GPU, for calls that name none")


def suite(text):
    if text not in SUITES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(SUITES)}, or the command report")
    return text


def dtype(text):
    name = DTYPES.get(text, text)
    if name not in DTYPES.values():
        wanted = ", ".join((*DTYPES.values(), *DTYPES))
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {wanted}")
    return name


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted an integer of at least 1, got {text!r}")
    return int(text)


def run(args):
    if args.tune:
        return run_tune(args)
    problem = _problem(args)
    if problem:
        return refuse(problem)
    setting = setting_of(args)
    cases = chosen_cases(args, setting)
    if not cases:
        which = f"{' '.join(args.suites or SUITES)} on {setting.device} in {', '.join(setting.dtypes)}"
        return refuse(f"no case of {which} has {args.words!r} in its name")
    if args.list:
        print("\n".join(f"{case.suite:<11} {case.name}" for case in cases))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    return measure(args, setting, cases)


def refuse(problem):
    print(f"fastlayers bench: {problem}", file=sys.stderr)
    return 2


def _problem(args):
    """Why the arguments, each fine by itself, ask for what cannot be, or None."""
    if args.out and args.out.exists() and not args.out.is_dir():
        return f"--out {args.out}: wanted a folder, that is a file"
    if args.device == "cuda" and not torch.cuda.is_available():
        return f"--device cuda: {machine_reason('triton')}; --device cpu measures the CPU kernels"
    return None


def setting_of(args):
    """By default float32 and bfloat16 on a CPU, and the 16-bit dtype that a GPU multiplies fastest."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        dtypes = ("float32", "bfloat16")
    else:
        dtypes = ("bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16",)
    return Setting(device, tuple(dict.fromkeys(args.dtype)) if args.dtype else dtypes, not args.warm)


def chosen_cases(args, setting):
    return [
        case
        for name in args.suites or SUITES
        for case in importlib.import_module(f"fastlayers.benchmarks.{name}").cases(setting)
        if args.words in case.name and not (args.quick and case.slow)
    ]


def measure(args, setting, cases):
    """Time the cases; 1 where one failed. What is there already is written after each, so that a break loses little."""
    facts = machine.describe(setting)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value and name != "command"))
    roofs = roofline.measure(setting)
    print("this machine: " + ", ".join(_roof(name, value) for name, value in roofs.items()))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    rows, found, failed = [], [], False
    for case in cases:
        outcome, problem = run_guarded(case, args.quick)
        print("\n" + "\n".join(shown.as_text(case, outcome, problem)), flush=True)
        outcome = outcome or [runner.Result(runner.OURS, problem=problem)]
        rows += results.rows_of(case, outcome, roofs, {**machine.gpu_state(setting), **facts})
        found += outcome
        failed = failed or any(result.problem for result in outcome)
        if args.out:
            results.write(args.out, rows, facts, roofs)
    _close(args, rows, facts, found)
    return 1 if failed else 0


def _roof(name, value):
    return f"copies {value:.1f} GB/s" if name.startswith("copy") else f"multiplies {value:.0f} GFLOP/s in {name}"


def _close(args, rows, facts, found):
    skipped = shown.skipped(found)
    if skipped:
        print("\nskipped:")
        print("\n".join(f"  {candidate}: {reason} ({count} cases)" for candidate, reason, count in skipped))
    if args.out:
        print(f"\nwritten to {args.out}; `fastlayers bench report {args.out}` makes a page of it")
    if args.share:
        print("\n" + results.as_shared(rows, facts))


def run_tune(args):
    given = [
        f"--{name}" for name in ("out", "list", "share", "dtype", "device", "warm", "threads") if getattr(args, name)
    ]
    if given:
        return refuse(f"--tune writes {own_path()}, for the GPU and all dtypes; it takes no {' and no '.join(given)}")
    if backends.cuda_device == "cuda" and not torch.cuda.is_available():
        return refuse("--tune chooses among GPU kernels, and torch sees no NVIDIA GPU")
    if not tune(args.suites or SUITES, args.words, args.quick):
        return refuse("--tune found no call to choose a backend for")
    return 0


def run_guarded(case, quick):
    """The case's results, and why it could not be set up (with no results) or None."""
    torch.manual_seed(0)
    try:
        limits = (QUICK_SECONDS, QUICK_ROUNDS) if quick else (SECONDS, ROUNDS)
        return runner.run_case(case, *limits), None
    except Exception as error:
        return [], runner.one_line(error)
