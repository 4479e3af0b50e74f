"""fastlayers bench: the runner measures what it says, and one failure does not stop the rest."""

import itertools
import time

import pytest
import torch

from fastlayers.agreement import Deviation
from fastlayers.benchmarks import clocks, inputs, memory, runner
from fastlayers.benchmarks.runner import OURS, Candidate, Case, Ratio, Setting, Skip

FINE = Deviation(0.25, None)


def case(candidates, **options):
    return Case("test", "sleeping", lambda: candidates, **options)


def sleeper(seconds, **options):
    return Candidate(lambda: time.sleep(seconds), **options)


def test_a_known_sleep_is_measured_right():
    slow, fast = sleeper(0.03), sleeper(0.01)
    results = runner.run_case(case({OURS: fast, "other": slow}), seconds=0.5)
    assert [result.candidate for result in results] == [OURS, "other"]
    for result, wanted in zip(results, (0.01, 0.03)):
        assert wanted <= result.median < wanted + 0.005
        assert wanted <= result.percentile(20) <= result.median <= result.percentile(80)
    found = runner.ratio(*results)
    assert 2.0 < found.low <= found.median <= found.high < 3.2 and found.verdict == "faster"
    assert runner.ratio(results[1], results[0]).verdict == "slower"


def test_short_work_is_repeated_until_a_sample_is_long_enough():
    calls = itertools.count()
    [result] = runner.run_case(case({OURS: Candidate(lambda: next(calls))}), seconds=0.05)
    assert next(calls) > 1000 * len(result.seconds)
    assert 0 < result.median < 1e-4


def test_candidates_alternate_and_the_first_place_goes_round():
    order = []
    candidates = {name: Candidate(lambda name=name: (order.append(name), time.sleep(0.003))) for name in "abc"}
    results = runner.run_case(case(candidates), seconds=0, minimum_rounds=6)
    timed = "".join(order)[9:-3]  # three warm-up calls of each come first, one for its memory last
    assert timed == "abcbcacab" * 2
    assert {len(result.seconds) for result in results} == {6}


def test_a_failing_candidate_stops_no_other():
    def fails():
        raise RuntimeError("no such kernel\nwith details")

    calls = itertools.count()

    def fails_later():
        time.sleep(0.003)
        if next(calls) > 4:
            raise MemoryError("gone")

    def failing_check():
        raise ValueError("cannot compare")

    candidates = {
        OURS: sleeper(0.003, check=lambda: FINE),
        "raises": Candidate(fails),
        "raises later": Candidate(fails_later),
        "wrong": sleeper(0.003, check=lambda: Deviation(7.0, "max error 7")),
        "check raises": sleeper(0.003, check=failing_check),
        "fine": sleeper(0.003),
    }
    results = {result.candidate: result for result in runner.run_case(case(candidates), seconds=0.05)}
    problems = {name: result.problem for name, result in results.items()}
    assert problems == {
        OURS: None,
        "raises": "RuntimeError: no such kernel",
        "raises later": "MemoryError: gone",
        "wrong": "max error 7",
        "check raises": "ValueError: cannot compare",
        "fine": None,
    }
    assert results[OURS].deviation == 0.25
    assert [name for name, result in results.items() if result.seconds] == [OURS, "fine"]


def test_others_are_not_left_out_for_a_hair():
    hair, nan = Deviation(1.5, "max error 1.5"), Deviation(float("nan"), "max error nan")
    candidates = {OURS: hair, f"{OURS} (cuda)": hair, "other": hair, "nan": nan}
    made = {name: sleeper(0.003, check=lambda found=found: found) for name, found in candidates.items()}
    problems = [result.problem for result in runner.run_case(case(made), seconds=0)]
    assert problems == ["max error 1.5", "max error 1.5", None, "max error nan"]


def test_checks_come_before_the_first_timing():
    order = []
    candidates = {
        name: Candidate(lambda: time.sleep(0.003), check=lambda name=name: (order.append(name), FINE)[1])
        for name in (OURS, "other")
    }
    runner.run_case(case(candidates), seconds=0)
    assert order == [OURS, "other"]


def test_a_clock_of_its_own_and_a_slow_case_timed_once():
    seconds = iter([3.0])
    [result] = runner.run_case(case({OURS: Candidate(None, clock=lambda step: next(seconds))}, slow=True), seconds=9)
    assert result.seconds == [3.0]


def test_percentiles():
    assert runner.percentile([3.0], 80) == 3.0
    assert runner.percentile([4.0, 1.0, 2.0, 3.0, 5.0], 50) == 3.0
    assert runner.percentile([0.0, 1.0], 20) == pytest.approx(0.2)


def test_rotation_gives_inputs_in_turn_and_stays_bounded(monkeypatch):
    monkeypatch.setattr(inputs, "largest_cache", lambda device: 1000)
    numbers = itertools.count()
    rotation = inputs.Rotation(lambda: next(numbers), 500, Setting())
    assert [next(rotation) for _ in range(6)] == [0, 1, 2, 3, 4, 0]
    assert len(inputs.Rotation(lambda: 0, 1, Setting()).items) == 8
    assert len(inputs.Rotation(lambda: 0, 1 << 31, Setting()).items) == 1
    assert len(inputs.Rotation(lambda: 0, 500, Setting(cold=False)).items) == 1


def test_what_lies_on_both_sides_of_1_is_noise():
    def result(*seconds):
        return runner.Result("one", list(seconds))

    assert runner.ratio(result(1, 1, 1, 1, 1), result(0.9, 0.95, 1.02, 1.1, 1.2)).verdict == "cannot be told from noise"
    assert Ratio(1.02, 1.01, 1.3).verdict == "faster" and Ratio(0.9, 0.8, 0.99).verdict == "slower"
    assert runner.ratio(result(1), result()) is None and runner.ratio(result(), result(1)) is None


def test_a_skipped_candidate_is_not_tried():
    results = runner.run_case(case({OURS: sleeper(0.003), "other": Skip("not installed")}), seconds=0)
    assert results[1].skipped == "not installed" and not results[1].seconds and results[1].problem is None


@pytest.mark.parametrize("megabytes", [32, 256])
def test_peak_memory_is_what_a_step_takes(megabytes):
    found = memory.peak_bytes(lambda: torch.ones(megabytes << 20, dtype=torch.uint8), "cpu")
    assert found == pytest.approx(megabytes << 20, rel=0.1, abs=4 << 20)


def test_peak_memory_leaves_out_what_was_there():
    kept = torch.ones(256 << 20, dtype=torch.uint8)
    torch.ones(1 << 30, dtype=torch.uint8)  # freed at once, and not to be counted either
    assert memory.peak_bytes(lambda: kept[:1000].clone(), "cpu") < 8 << 20


class FakeGpu:
    """A stream on which a kernel takes 3 ms, filling a buffer 50 ms, and recording an event nothing."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Buffer:
            def zero_(self):
                gpu.work("evict", 0.05)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.order.append("wait"))
        monkeypatch.setattr(clocks, "largest_cache", lambda device: 1 << 20)
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Buffer())

    def work(self, name, seconds):
        self.order.append(name)
        self.now += seconds


@pytest.mark.parametrize("cold", [True, False])
def test_cuda_events_time_the_step_alone(cold, monkeypatch):
    """On a stand-in for torch.cuda: each call between two events, the cache overwritten outside of them."""
    gpu = FakeGpu(monkeypatch)
    clock = clocks.clock_of(Setting("cuda", cold=cold))
    assert clock(lambda: gpu.work("step", 0.003), 4) == pytest.approx(0.003)
    assert gpu.order == (["evict", "step"] if cold else ["step"]) * 4 + ["wait"]
