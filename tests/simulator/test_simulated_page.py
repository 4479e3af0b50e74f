"""benchmarks/simulated.py: counts are the simulator's, bounds follow from them, and the page says what they are."""

import csv

import pytest

from fastlayers.benchmarks import simulated
from tests.backends import BACKENDS
from tests.simulator.gpus import GPUS

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc to compile the kernels")


@pytest.fixture
def small(monkeypatch):
    """Two small works, in code for sm_80 alone."""
    monkeypatch.setattr(simulated, "SEQLEN", 128)
    monkeypatch.setattr(simulated, "PARAMETERS", 4096)
    monkeypatch.setattr(simulated, "COMPILED_FOR", {"sm_80": "sm_80", "sm_89": "sm_80"})
    tensor = 2 * 128 * 64
    adam = simulated.Work("Adam", simulated._adam, 7 * 4 * 4096)
    attention = simulated.Work("attention", lambda *which: cuda_alone(64, False, *which), 4 * tensor, ladder=True)
    monkeypatch.setattr(simulated, "works", lambda: [adam, attention])


def cuda_alone(head_dim, gradient, backend, dtype):
    """Triton takes seconds to compile attention, and tests of its own."""
    return simulated._attention(head_dim, gradient, "cuda", dtype) if backend == "cuda" else []


def test_counts_and_bounds(small, tmp_path, capsys):
    assert simulated.main([str(tmp_path)]) == 0
    with open(tmp_path / "simulated.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    a100 = {(row["work"], row["implementation"]): row for row in rows if row["gpu"] == "A100"}
    assert {row["gpu"] for row in rows} == {"A100", "RTX 4090"}
    adam = a100["Adam", "fastlayers, CUDA C++"]
    assert adam["binding"] == "DRAM"
    dram = next(gpu.dram for gpu in GPUS if gpu.name == "A100")
    assert float(adam["microseconds"]) == pytest.approx(1e6 * 7 * 4 * 4096 / dram)
    ours, naive = a100["attention", "fastlayers, CUDA C++"], a100["attention", "ladder, 1_naive"]
    assert int(naive["instructions"]) > 20 * int(ours["instructions"])
    assert float(naive["tensor_share"]) == 0 < float(ours["tensor_share"])
    assert int(ours["wavefronts"]) == int(ours["wavefronts_minimum"])
    page = (tmp_path / "simulated.html").read_text()
    assert "Nothing on this page was measured" in page and page.count("<svg") == 2 and "(estimates)" in page


def test_bad_arguments(capsys):
    assert simulated.main([]) == 2
    assert "wanted one argument, the folder to write to" in capsys.readouterr().out
