"""The benchmarks under pytest-benchmark: a run is kept, the next is compared with it, and a slower one fails."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = """
import time
from fastlayers import ops

fast = ops.linear_act

def slow(*args, **kwargs):
    time.sleep(0.3)
    return fast(*args, **kwargs)

ops.linear_act = slow
"""
ONE = "gelu and forward and float32 and 16 and 3072 and not backward"


def run(storage, *options):
    command = [sys.executable, "-m", "pytest", "fastlayers/benchmarks", "-q", "-p", "no:cacheprovider", "-k", ONE]
    command += ["--benchmark-only", f"--benchmark-storage={storage}", "--benchmark-max-time=0.2", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(storage)])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_regression_beyond_the_threshold_fails(tmp_path):
    (tmp_path / "made_slow.py").write_text(SLOW)
    first = run(tmp_path, "--benchmark-autosave")
    assert first.returncode == 0 and "1 passed" in first.stdout, first.stdout[-2000:] + first.stderr[-2000:]
    compare = ["--benchmark-compare", "--benchmark-compare-fail=median:400%"]
    slower = run(tmp_path, *compare, "-p", "made_slow")
    assert slower.returncode != 0 and "Performance has regressed" in slower.stdout + slower.stderr
    same = run(tmp_path, *compare)
    assert same.returncode == 0 and "1 passed" in same.stdout, same.stdout[-2000:] + same.stderr[-2000:]
