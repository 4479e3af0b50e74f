"""The one place that owns timing: candidates alternate in one process, each checked before it is timed."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from fastlayers.benchmarks import memory
from fastlayers.benchmarks.clocks import SHORTEST_SAMPLE, clock_of

OURS = "fastlayers"
OTHERS_MAY = 4.0  # times the deviation that we allow ourselves: nobody is left out for a hair, or for another rule
SLOW_CALL = 0.1  # seconds; a call that takes longer is warm after two


def is_ours(candidate):
    """fastlayers as it chooses, or one of its kernels by name."""
    return candidate.split(" (")[0] == OURS


class Skip(Exception):
    """In place of a candidate: why it does not take part."""


@dataclass(frozen=True)
class Setting:
    """What a run measures on; the declarations make their cases for it.

    device: "cpu" or "cuda"
    dtypes: names, "float32", "bfloat16", "float16"
    cold:   inputs come from memory, not from a cache that still holds them
    """

    device: str = "cpu"
    dtypes: tuple = ("float32", "bfloat16")
    cold: bool = True


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work.

    step:  does the work once; every call is timed, and what it returns is dropped
    check: how far its results are from exact, an agreement.Deviation; None where the case has nothing to compare
    clock: seconds that step() took, in place of the runner's; a step that times a process of its own brings its own
    """

    step: Callable
    check: Callable | None = None
    clock: Callable | None = None


@dataclass(frozen=True)
class Place:
    """Where a case stands in pictures: its panel, and the size (a number, or a text) along the panel's axis.

    line: of the overview, which several panels may share
    """

    line: str = ""
    panel: str = ""
    axis: str = ""
    size: float | str = ""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark table: the same work done by each candidate, the first of them ours.

    candidates: makes them, name -> Candidate or Skip; called when the case runs, so that a case costs no memory before
    targets: other candidate -> how many times faster than it fastlayers has to be
    limit:   seconds that fastlayers may take, for a case without another candidate
    flops, bytes, tokens: what one step computes, has to read and write at least once, and trains on
    """

    suite: str
    name: str
    candidates: Callable
    targets: dict = field(default_factory=dict)
    limit: float | None = None
    flops: float = 0
    bytes: float = 0
    tokens: int = 0
    slow: bool = False  # minutes for one step: left out by --quick, timed once
    place: Place = Place()
    dtype: str = ""
    setting: Setting = Setting()


@dataclass
class Result:
    """What became of one candidate of one case; `problem` is why it was not timed, `skipped` why it was not tried.

    peak_bytes: memory that one step takes beyond what lies there before it, or None where nobody tells
    """

    candidate: str
    seconds: list = field(default_factory=list)
    deviation: float | None = None
    problem: str | None = None
    skipped: str | None = None
    peak_bytes: int | None = None

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


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours was than another candidate: median, 20th and 80th percentile over the rounds."""

    median: float
    low: float
    high: float

    @property
    def verdict(self):
        if self.low <= 1 <= self.high:
            return "cannot be told from noise"
        return "faster" if self.median > 1 else "slower"


def ratio(ours, other):
    """The Ratio round by round, since both were timed within the same seconds; None where one of them was not."""
    if other is ours or not ours.seconds or not other.seconds:
        return None
    each = [theirs / mine for mine, theirs in zip(ours.seconds, other.seconds)]
    return Ratio(*(percentile(each, percent) for percent in (50, 20, 80)))


def run_case(case, seconds, minimum_rounds=5):
    """Check, warm up and time a case's candidates; one Result each. A candidate that fails stops no other."""
    clock, results, ready = clock_of(case.setting), [], []
    for name, candidate in case.candidates().items():
        result = Result(name)
        results.append(result)
        if isinstance(candidate, Skip):
            result.skipped = str(candidate)
            continue
        try:
            if candidate.check:
                found = candidate.check()
                result.deviation = found.ratio
                result.problem = found.problem if is_ours(name) or not found.ratio <= OTHERS_MAY else None
            if result.problem is None:
                ready.append(_Ready(result, candidate, clock, 1 if case.slow else None))
        except Exception as error:
            result.problem = one_line(error)
    _measure(ready, *((0, 1) if case.slow else (seconds, minimum_rounds)))
    for entry in ready:
        if entry.result.seconds and not entry.candidate.clock:
            entry.result.peak_bytes = memory.peak_bytes(entry.candidate.step, case.setting.device)
    return results


def one_line(error):
    return f"{type(error).__name__}: {error}".partition("\n")[0]


class _Ready:
    """A candidate that may be timed: warm, and with the number of calls that makes a sample long enough."""

    def __init__(self, result, candidate, clock, calls):
        self.result, self.candidate, self.clock = result, candidate, clock
        self.calls = calls or self._warm_up()

    def sample(self, calls):
        """Seconds per call over `calls` calls."""
        if self.candidate.clock:
            return sum(self.candidate.clock(self.candidate.step) for _ in range(calls)) / calls
        return self.clock(self.candidate.step, calls)

    def _warm_up(self):
        self.sample(1)
        fastest = self.sample(1)
        if fastest < SLOW_CALL:
            fastest = min(fastest, self.sample(1))
        return max(1, math.ceil(SHORTEST_SAMPLE / max(fastest, 1e-9)))


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
                try:
                    entry.result.seconds.append(entry.sample(entry.calls))
                except Exception as error:
                    entry.result.problem, entry.result.seconds = one_line(error), []
            ready = [entry for entry in ready if entry.result.problem is None]
    finally:
        if collecting:
            gc.enable()
