"""The one place that owns timing: candidates alternate in one process, each checked before it is timed."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch

OURS = "fastlayers"


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work.

    step:  does the work once; every call is timed, and what it returns is dropped
    check: how far its results are from exact, an agreement.Deviation; None where the case has nothing to compare
    clock: seconds that step() took, by default on the wall; a step that times a process of its own brings its own
    """

    step: Callable
    check: Callable | None = None
    clock: Callable | None = None


@dataclass(frozen=True)
class Case:
    """One row of a benchmark table: the same work done by each candidate, the first of them ours.

    candidates: makes them, name -> Candidate; called when the case runs, so that a case costs no memory before
    targets: other candidate -> how many times faster than it fastlayers has to be
    limit:   seconds that fastlayers may take, for a case without another candidate
    flops, bytes: what one step computes, and what it has to read and write at least once
    """

    suite: str
    name: str
    candidates: Callable
    targets: dict = field(default_factory=dict)
    limit: float | None = None
    flops: float = 0
    bytes: float = 0
    slow: bool = False  # minutes for one step: left out by --quick, timed once


@dataclass
class Result:
    """What became of one candidate of one case; `problem` is why it was not timed."""

    candidate: str
    seconds: list = field(default_factory=list)
    deviation: float | None = None
    problem: str | None = None

    @property
    def median(self):
        return statistics.median(self.seconds) if self.seconds else math.nan

    def percentile(self, percent):
        return percentile(self.seconds, percent)


def percentile(values, percent):
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratios(ours, other):
    """How many times faster ours was, round by round: both were timed within the same seconds."""
    return [theirs / mine for mine, theirs in zip(ours.seconds, other.seconds)]


def last_level_cache():
    """Bytes of the largest cache of CPU 0; 32 MiB where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 << 20)


class Rotation:
    """Inputs in turn: enough copies that, with the copies between, none still lies in the last-level cache.

    At most 8 copies and 1 GiB: beyond that a machine's shared cache is larger than what one process is given of it.
    """

    def __init__(self, make, bytes_each):
        copies = math.ceil(2 * last_level_cache() / bytes_each) + 1
        self.items = [make() for _ in range(max(1, min(copies, 8, (1 << 30) // bytes_each)))]
        self.calls = count()

    def __next__(self):
        return self.items[next(self.calls) % len(self.items)]


def run_case(case, seconds, minimum_rounds=5):
    """Check, warm up and time a case's candidates; one Result each. A candidate that fails stops no other."""
    results, ready = [], []
    for name, candidate in case.candidates().items():
        result = Result(name)
        results.append(result)
        try:
            if candidate.check:
                found = candidate.check()
                result.deviation, result.problem = found.ratio, found.problem
            if result.problem is None:
                ready.append((result, candidate, 1 if case.slow else _calls_per_sample(candidate)))
        except Exception as error:
            result.problem = one_line(error)
    _measure(ready, *((0, 1) if case.slow else (seconds, minimum_rounds)))
    return results


def one_line(error):
    return f"{type(error).__name__}: {error}".partition("\n")[0]


SHORTEST_SAMPLE = 0.002  # seconds; below it the clock and the scheduler weigh


def _calls_per_sample(candidate):
    """Warm up, and find how many calls make a sample long enough to be timed."""
    _seconds(candidate, 1)
    fastest = min(_seconds(candidate, 1) for _ in range(2))
    return max(1, math.ceil(SHORTEST_SAMPLE / max(fastest, 1e-9)))


def _seconds(candidate, calls):
    """Seconds per call over `calls` calls."""
    if candidate.clock:
        return sum(candidate.clock(candidate.step) for _ in range(calls)) / calls
    _wait_for_gpu()
    start = time.perf_counter()
    for _ in range(calls):
        candidate.step()
    _wait_for_gpu()
    return (time.perf_counter() - start) / calls


def _wait_for_gpu():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _measure(ready, seconds, minimum_rounds):
    """Rounds of one sample per candidate, the first place going round, until the time is up."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for number in count():
            if not ready or (number >= minimum_rounds and time.perf_counter() - start >= seconds):
                return
            first = number % len(ready)
            for entry in ready[first:] + ready[:first]:
                result, candidate, calls = entry
                try:
                    result.seconds.append(_seconds(candidate, calls))
                except Exception as error:
                    result.problem, result.seconds = one_line(error), []
            ready = [entry for entry in ready if entry[0].problem is None]
    finally:
        if collecting:
            gc.enable()
