"""Results as rows, and the rows as CSV and JSON: one per candidate of a case, with all that the number depends on."""

import csv
import json

from fastlayers.benchmarks import roofline
from fastlayers.benchmarks.runner import ratio

CSV_NAME, JSON_NAME = "results.csv", "results.json"
TIMED, FAILED, SKIPPED = "timed", "failed", "skipped"
NUMBERS = (  # columns that hold a number, or "" where there is none
    *("milliseconds", "milliseconds_p20", "milliseconds_p80", "rounds", "gflops", "gbytes_per_second"),
    *("tokens_per_second", "roofline_milliseconds", "roofline_share", "peak_mbytes", "times_the_speed"),
    *("times_the_speed_p20", "times_the_speed_p80", "wanted", "deviation", "copy_gbytes_per_second", "matmul_gflops"),
    *("gpu_clock_mhz", "gpu_temperature_c", "gpu_power_w", "threads"),
)


def rows_of(case, results, roofs, surroundings):
    """One row per candidate. times_the_speed: how many times faster than this candidate fastlayers was.

    roofs: what roofline.measure found; surroundings: facts of the machine, and of its state during this case
    """
    least = roofline.milliseconds(case, roofs)
    where = {
        "suite": case.suite,
        "line": case.place.line,
        "panel": case.place.panel,
        "axis": case.place.axis,
        "size": case.place.size,
        "case": case.name,
        "device": case.setting.device,
        "dtype": case.dtype,
        "cache": "cold" if case.setting.cold else "warm",
    }
    roof = {"copy_gbytes_per_second": roofs["copy_gbytes_per_second"], "matmul_gflops": roofs.get(case.dtype, "")}
    return [{**where, **_outcome(case, results, result, least), **roof, **surroundings} for result in results]


def _outcome(case, results, result, least):
    status = SKIPPED if result.skipped else FAILED if result.problem else TIMED
    beside = ratio(results[0], result)
    median = result.median if status == TIMED else None
    return {
        "candidate": result.candidate,
        "status": status,
        "milliseconds": _scaled(median, 1e3),
        "milliseconds_p20": _scaled(median and result.percentile(20), 1e3),
        "milliseconds_p80": _scaled(median and result.percentile(80), 1e3),
        "rounds": len(result.seconds),
        "gflops": _per_second(case.flops / 1e9, median),
        "gbytes_per_second": _per_second(case.bytes / 1e9, median),
        "tokens_per_second": _per_second(case.tokens, median),
        "roofline_milliseconds": "" if least is None else least,
        "roofline_share": _per_second((least or 0) / 1e3, median),
        "peak_mbytes": "" if result.peak_bytes is None else result.peak_bytes / 1e6,
        "times_the_speed": beside.median if beside else "",
        "times_the_speed_p20": beside.low if beside else "",
        "times_the_speed_p80": beside.high if beside else "",
        "verdict": beside.verdict if beside else "",
        "wanted": case.targets.get(result.candidate, case.limit or ""),
        "deviation": "" if result.deviation is None else result.deviation,
        "problem": result.skipped or result.problem or "",
    }


def _scaled(value, factor):
    return "" if value is None else value * factor


def _per_second(amount, seconds):
    return amount / seconds if amount and seconds else ""


def write(folder, rows, machine, roofs):
    """folder/results.csv with everything, and folder/results.json with the same, the machine's facts said once."""
    with open(folder / CSV_NAME, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    own = [{name: value for name, value in row.items() if name not in machine} for row in rows]
    text = json.dumps({"machine": machine, "roofline": roofs, "results": own}, indent=1)
    (folder / JSON_NAME).write_text(text + "\n")


def read(path):
    """The rows of a CSV or of the folder it lies in; numbers as floats, None where there is none.

    raises ValueError where it holds something else, OSError where it cannot be read
    """
    file = path / CSV_NAME if path.is_dir() else path
    with open(file, newline="") as opened:
        reader = csv.DictReader(opened)
        missing = {"suite", "case", "candidate", "status", *NUMBERS} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{file} holds no results of `fastlayers bench`: it lacks {', '.join(sorted(missing))}")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{file} holds no results, only a header")
    return [{**row, **{name: _number(file, name, row[name]) for name in NUMBERS}} for row in rows]


def _number(file, name, text):
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(f"{file}: {name} holds {text!r}, wanted a number") from None


def as_shared(rows, machine):
    """A Markdown table that can be pasted into an issue: no paths, and no command, which may hold some."""
    facts = [f"{name} {value}" for name, value in machine.items() if value and name != "command"]
    lines = [", ".join(facts), "", "| case | beside | fastlayers is | times as fast |", "|---|---|---|---|"]
    for row in rows:
        if row["times_the_speed"] not in ("", None):
            middle = f"{row['times_the_speed_p20']:.2f} .. {row['times_the_speed_p80']:.2f}"
            cells = row["case"], row["candidate"], row["verdict"], f"{row['times_the_speed']:.2f} ({middle})"
            lines.append(f"| {' | '.join(cells)} |")
        elif row["status"] == FAILED:
            lines.append(f"| {row['case']} | {row['candidate']} | failed: {row['problem']} | |")
    return "\n".join(lines) + "\n"
