"""fastlayers bench: the runner measures what it says, and one failure does not stop the rest."""

import argparse
import csv
import itertools
import time

import pytest
import torch

from fastlayers import bench
from fastlayers.agreement import Deviation
from fastlayers.benchmarks import adam, attention, install, linear_act, runner, train
from fastlayers.benchmarks.runner import OURS, Candidate, Case

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
    ratio = runner.percentile(runner.ratios(*results), 50)
    assert 2.0 < ratio < 3.2


def test_short_work_is_repeated_until_a_sample_is_long_enough():
    calls = itertools.count()
    [result] = runner.run_case(case({OURS: Candidate(lambda: next(calls))}), seconds=0.05)
    assert next(calls) > 1000 * len(result.seconds)
    assert 0 < result.median < 1e-4


def test_candidates_alternate_and_the_first_place_goes_round():
    order = []
    candidates = {name: Candidate(lambda name=name: (order.append(name), time.sleep(0.003))) for name in "abc"}
    results = runner.run_case(case(candidates), seconds=0, minimum_rounds=6)
    timed = "".join(order)[9:]  # three warm-up calls of each come first
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
    monkeypatch.setattr(runner, "last_level_cache", lambda: 1000)
    numbers = itertools.count()
    rotation = runner.Rotation(lambda: next(numbers), 500)
    assert [next(rotation) for _ in range(6)] == [0, 1, 2, 3, 4, 0]
    assert len(runner.Rotation(lambda: 0, 1).items) == 8
    assert len(runner.Rotation(lambda: 0, 1 << 31).items) == 1


SUITES = {"attention": attention, "linear_act": linear_act, "adam": adam, "train": train, "install": install}


def test_every_wanted_ratio_is_declared():
    """The table that this project set out to reach."""
    wanted = {
        "attention": [{"sdpa": 1.2}] * 2 + [{"sdpa": 1.5}] * 2 + [{"sdpa": 4.0}],
        "linear_act": [{"F.gelu(F.linear)": 1.15}] * 2,
        "adam": [{"AdamW": 4.0, "AdamW(fused=True)": 1.0}, {"AdamW(fused=True)": 2.5}],
        "train": [{train.EAGER: 1.5}, {train.EAGER: 2.5}],
        "install": [{}, {}],
    }
    assert tuple(wanted) == bench.SUITES
    assert {name: [one.targets for one in suite.CASES] for name, suite in SUITES.items()} == wanted
    assert [one.limit for one in install.CASES] == [0.1, 300]


def test_the_large_adam_case_is_what_it_says():
    shapes = adam.bert_base_shapes()
    assert len(shapes) == 220
    assert round(sum(torch.Size(shape).numel() for shape in shapes) / 1e6) == 109  # 108.5


def parse(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("arguments", [["attentoin"], ["--threads", "0"], ["--threads", "two"], ["--fast"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_arguments_that_fit_nothing(capsys, tmp_path):
    assert bench.run(parse("adam", "-k", "float64")) == 2
    assert "float64" in capsys.readouterr().out
    assert bench.run(parse("--out", str(tmp_path / "missing" / "out.csv"))) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_list_names_every_case(capsys):
    assert bench.run(parse("--list")) == 0
    listed = capsys.readouterr().out
    assert all(one.name in listed for suite in SUITES.values() for one in suite.CASES)
    assert bench.run(parse("--list", "--quick")) == 0
    assert "clean build" not in capsys.readouterr().out


@pytest.fixture
def two_cases(monkeypatch):
    fine = case(
        {OURS: sleeper(0.003, check=lambda: FINE), "other": sleeper(0.006), "broken": Candidate(lambda: 1 / 0)},
        targets={"other": 1.5, "broken": 1.0},
        flops=3e6,
    )

    def no_memory():
        raise MemoryError("too large")

    monkeypatch.setattr(adam, "CASES", [Case("adam", "cannot be set up", no_memory), fine])
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.1)


def test_output_and_csv(two_cases, capsys, tmp_path):
    path = tmp_path / "out.csv"
    assert bench.run(parse("adam", "--quick", "--out", str(path))) == 1
    text = capsys.readouterr().out
    assert "not run: MemoryError: too large" in text
    assert "deviation 0.25" in text and "GFLOP/s" in text
    assert "wanted 1.5: reached" in text
    assert "failed: ZeroDivisionError" in text
    rows = list(csv.DictReader(path.open()))
    assert [row["candidate"] for row in rows] == [OURS, "other", "broken"]
    assert 1.5 < float(rows[1]["times_the_speed"]) < 2.2
    assert rows[2]["problem"].startswith("ZeroDivisionError") and rows[2]["milliseconds"] == ""
    for column in ("cpu", "threads", "isa", "torch", "python", "fastlayers", "commit", "date", "command"):
        assert column in rows[0]


def test_a_missed_target_is_said(two_cases, capsys, monkeypatch):
    monkeypatch.setattr(adam, "CASES", [case({OURS: sleeper(0.004), "other": sleeper(0.003)}, targets={"other": 2.0})])
    assert bench.run(parse("adam", "--quick")) == 0
    assert "wanted 2: MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us"), (1e-9, "0.001 us")]
)
def test_durations(seconds, text):
    assert bench.duration(seconds) == text


@pytest.mark.parametrize("one", attention.CASES + linear_act.CASES, ids=lambda one: one.name)
def test_declared_candidates_are_right(one):
    """Each candidate's own check passes: what `fastlayers bench` does before it times anything."""
    torch.manual_seed(0)
    for candidate in one.candidates().values():
        assert candidate.check is None or candidate.check().problem is None
