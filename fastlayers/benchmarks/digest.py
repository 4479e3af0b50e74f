"""Rows of results, put together again: what was compared in each case, and which cases make a panel of a picture."""

from dataclasses import dataclass

from fastlayers.benchmarks.results import TIMED
from fastlayers.benchmarks.runner import OURS, is_ours

KEY = ("suite", "line", "panel", "axis", "size", "case", "device", "dtype", "cache")


@dataclass
class Compared:
    """A case: the rows of its candidates, the first of them ours."""

    rows: list

    def __getattr__(self, name):
        if name not in KEY:
            raise AttributeError(name)
        return self.rows[0][name]

    @property
    def timed(self):
        return [row for row in self.rows if row["status"] == TIMED]

    @property
    def ours(self):
        """The row of fastlayers as it chooses, or None where it was not timed."""
        return next((row for row in self.timed if row["candidate"] == OURS), None)

    @property
    def best(self):
        """The row of the fastest of the others, or None."""
        others = [row for row in self.timed if row["times_the_speed"] and not is_ours(row["candidate"])]
        return min(others, key=lambda row: row["times_the_speed"], default=None)

    @property
    def place(self):
        """Its size on the panel's axis: a number, or a text."""
        try:
            return float(self.size)
        except ValueError:
            return self.size


def cases_of(rows):
    """[Compared] in the order in which they ran."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return [Compared(group) for group in found.values()]


def by(name, cases):
    """{value: [Compared]} by "suite", "line" or "panel", without the cases that stand in none."""
    found = {}
    for case in cases:
        if getattr(case, name):
            found.setdefault(getattr(case, name), []).append(case)
    return found


def candidates_of(cases):
    """Names of those that were timed, in the order of their first appearance, ours first."""
    names = dict.fromkeys(row["candidate"] for case in cases for row in case.timed)
    return sorted(names, key=lambda name: not is_ours(name))


def speed_of(cases):
    """The column that says how fast these are, and its unit."""
    for column, unit in (("gflops", "GFLOP/s"), ("tokens_per_second", "tokens/s"), ("gbytes_per_second", "GB/s")):
        if any(row[column] for case in cases for row in case.timed):
            return column, unit
    return "milliseconds", "ms"
