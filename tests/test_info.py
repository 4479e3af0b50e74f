"""fastlayers info: the facts are the machine's own, and every "no" has a reason."""

import argparse
import json

import pytest
import torch

from fastlayers import _native, backends, info


def run(capsys, *arguments):
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    assert info.run(parser.parse_args(arguments)) == 0
    return capsys.readouterr().out


def test_json_holds_the_build_and_the_machine(capsys):
    facts = json.loads(run(capsys, "--json"))
    assert facts["torch"] == torch.__version__
    assert facts["cpu"] == {"name": info.cpu_name(), "threads": torch.get_num_threads(), "isa": _native.cpu_isa}
    assert facts["library"]["error"] == _native.error
    assert {"torch_headers", "stable_abi_floor", "compiler", "nvcc", "cuda_archs", "cpu_isas"} <= set(facts["library"])
    assert set(facts["ops"]) == set(backends._reasons)


def test_text_names_every_op_and_gives_a_reason_for_every_no(capsys):
    text = run(capsys)
    for op, row in info.collect()["ops"].items():
        assert f"\n{op} " in text
        assert row["reference"] is None
        assert all(reason is None or reason in text for reason in row.values())
    assert _native.cpu_isa in text


def test_every_op_has_a_sample_call():
    for op, facts in backends._facts.items():
        args, kwargs = info._SAMPLE_CALLS[op]()
        assert facts(*args, **kwargs)["device"] == "cpu"


def test_the_answer_agrees_with_the_backend_that_a_call_gets():
    for op, row in info.collect()["ops"].items():
        args, kwargs = info._SAMPLE_CALLS[op]()
        chosen = backends.choose(op, backends._facts[op](*args, **kwargs))
        assert row[chosen] is None
        assert (chosen == "cpu") == (row["cpu"] is None)


def test_a_library_that_did_not_load_is_named(capsys, monkeypatch):
    monkeypatch.setattr(_native, "error", "the native library was not built; reinstall fastlayers")
    monkeypatch.setattr(_native, "cpu_isa", "none")
    text = run(capsys)
    assert "not in use: the native library was not built" in text
    assert all(row["cpu"] for row in info.collect()["ops"].values())


def test_a_forced_backend_is_shown(capsys):
    with backends.use_backend("reference"):
        assert "every call is served by reference" in run(capsys)
    assert "served by" not in run(capsys)


@pytest.mark.parametrize(
    ("archs", "capability", "wanted"),
    [
        (["75", "80", "90+PTX"], (7, 5), "75"),
        (["75", "80", "90+PTX"], (8, 9), "80"),
        (["75", "80", "90+PTX"], (9, 0), "90"),
        (["75", "80", "90+PTX"], (12, 0), "90 (PTX)"),
        (["75", "80", "90+PTX"], (7, 0), None),
        (["80"], (9, 0), None),
        (["80", "86"], (8, 9), "86"),
        (["90a"], (9, 0), "90a"),
        (["90a"], (10, 0), None),
    ],
)
def test_which_code_a_gpu_runs(archs, capability, wanted):
    assert info.code_for(archs, *capability) == wanted
