"""fastlayers' side of the cases under pytest-benchmark, which keeps runs and compares two of them.

pytest fastlayers/benchmarks --benchmark-only --benchmark-autosave
pytest fastlayers/benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%

-k chooses cases; `fastlayers bench` is what sets them beside other libraries.
"""

import pytest
import torch

from fastlayers.benchmarks import adam, attention, linear_act
from fastlayers.benchmarks.runner import OURS, Setting

SETTING = Setting("cuda", ("bfloat16",)) if torch.cuda.is_available() else Setting()


def finished(step):
    step()
    if SETTING.device == "cuda":
        torch.cuda.synchronize()


CASES = [case for suite in (attention, linear_act, adam) for case in suite.cases(SETTING)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(case, benchmark):
    torch.manual_seed(0)
    candidate = case.candidates()[OURS]
    found = candidate.check()
    assert found.ok, found.problem
    benchmark.group = case.suite
    benchmark(finished, candidate.step)
