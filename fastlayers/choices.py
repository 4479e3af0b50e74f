"""Which backends serve a call best on a GPU: a small table by architecture, dtype and shape.

The package ships one (choices.json); `fastlayers bench --tune` measures one's own GPU and writes another, which comes
first. FASTLAYERS_CHOICES names its file; by default it lies in the user's cache folder. Every entry says where it comes
from.
"""

import functools
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Choice:
    """backends, best first, for calls like this one.

    arch:     "sm_80": this architecture and newer ones that have no entries of their own
    sizes:    what the op's facts call sizes, all positive
    gradient: forward and backward together were compared, not the forward alone
    source:   "estimated: ..." (from counts and published rates) or "measured: ...", on what and when
    """

    op: str
    arch: str
    dtype: str
    gradient: bool
    sizes: tuple
    backends: tuple
    source: str


SHIPPED = Path(__file__).parent / "choices.json"


def own_path():
    """Where this user's measured table lies, whether or not it exists."""
    if os.environ.get("FASTLAYERS_CHOICES"):
        return Path(os.environ["FASTLAYERS_CHOICES"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastlayers/choices.json"


def read(path):
    """The choices in a file; raises ValueError where it holds something else."""
    wanted = {field.name for field in fields(Choice)}
    try:
        choices, entries = [], json.loads(path.read_text())
        if not isinstance(entries, list):
            raise TypeError(f"wanted a list, got {type(entries).__name__}")
        for entry in entries:
            if set(entry) != wanted:
                raise ValueError(f"wanted {', '.join(sorted(wanted))}, got {', '.join(sorted(entry))}")
            choices.append(Choice(**{**entry, "sizes": tuple(entry["sizes"]), "backends": tuple(entry["backends"])}))
        return choices
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no table of choices ({error}); `fastlayers bench --tune` writes one") from None


def write(path, choices):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(choice)) for choice in choices)
    path.write_text(f"[\n{lines}\n]\n")


@functools.cache
def tables():
    """The user's own choices, then the shipped ones. reload() forgets them."""
    own = own_path()
    return [read(own) if own.exists() else [], read(SHIPPED)]


def reload():
    tables.cache_clear()
    find.cache_clear()


@functools.lru_cache(maxsize=4096)
def find(op, capability, dtype, gradient, sizes):
    """The choice nearest to a call, or None. capability: (8, 0); sizes are compared by their ratios.

    The user's own table comes first; within a table, the newest architecture that is not newer than the GPU.
    """
    for table in tables():
        fitting = [
            choice
            for choice in table
            if (choice.op, choice.dtype, choice.gradient) == (op, dtype, gradient)
            and len(choice.sizes) == len(sizes)
            and _capability(choice.arch) <= capability
        ]
        newest = max((_capability(choice.arch) for choice in fitting), default=None)
        nearest = [choice for choice in fitting if _capability(choice.arch) == newest]
        if nearest:
            return min(nearest, key=lambda choice: _distance(choice.sizes, sizes))
    return None


def _capability(arch):
    return divmod(int(arch.removeprefix("sm_")), 10)


def _distance(sizes, others):
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(sizes, others))
