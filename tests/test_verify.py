"""fastlayers verify: it covers every op, passes where the kernels are right, and says so where they are not."""

import argparse

import pytest
import torch

from fastlayers import _native, backends, ops, reference, verify

needs_kernels = pytest.mark.skipif(
    _native.error is not None or _native.cpu_isa == "none", reason="no compiled backend can run here"
)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return parser.parse_args(arguments)


@needs_kernels
def test_everything_agrees_on_this_machine(capsys):
    code = verify.run(parse("--quick"))
    text = capsys.readouterr().out
    assert code == 0, text
    assert "everything agrees" in text and "FAILED" not in text and "not served" not in text
    for check in verify.CHECKS:
        assert f"\n{check.op:<17} {check.option} " in text


def test_every_op_activation_and_attention_option_has_a_check():
    assert {check.op for check in verify.CHECKS} == set(verify.OPS)
    assert {"adam_step", "grad_norm", *verify.OPS} - {"adam"} == set(backends._reasons)
    for op in ("linear_act", "gated_linear_act"):
        assert set(reference.ACTIVATIONS) <= {check.option for check in verify.CHECKS if check.op == op}
    assert len({(check.op, check.option) for check in verify.CHECKS}) == len(verify.CHECKS)


def broken(function):
    def off(*args, backend=None, **kwargs):
        out = function(*args, backend=backend, **kwargs)
        return out if backend == "reference" else out * 1.02

    return off


@needs_kernels
def test_a_wrong_kernel_is_found_and_named(capsys, monkeypatch):
    monkeypatch.setattr(ops, "linear_act", broken(ops.linear_act))
    assert verify.run(parse("linear_act", "gated_linear_act", "--quick")) == 1
    text = capsys.readouterr().out
    wanted = sum(check.op == "linear_act" for check in verify.CHECKS) * len(verify.DTYPES)
    assert f"\n{wanted} FAILED" in text
    assert "cpu, linear_act, relu, float32: " in text
    assert "cpu, gated_linear_act" not in text


@needs_kernels
def test_an_exception_is_a_failure_and_stops_nothing(capsys, monkeypatch):
    def fails(*args, backend=None, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(ops, "decode_attention", fails)
    assert verify.run(parse("decode_attention", "--quick")) == 1
    text = capsys.readouterr().out
    assert text.count("RuntimeError: no memory") == 3 * len(verify.DECODE)


@needs_kernels
def test_an_op_that_a_backend_does_not_serve_is_no_failure(capsys, monkeypatch):
    monkeypatch.setitem(backends._reasons["linear_act"], "cpu", lambda facts: "not today")
    assert verify.run(parse("linear_act", "--quick")) == 0
    assert capsys.readouterr().out.count("not served") == 3 * sum(check.op == "linear_act" for check in verify.CHECKS)


def test_a_machine_without_kernels_is_told_why(capsys, monkeypatch):
    monkeypatch.setattr(_native, "error", "the native library was not built")
    monkeypatch.setattr(_native, "cpu_isa", "none")
    assert verify.run(parse("--quick")) == 1
    text = capsys.readouterr().out
    assert "backend cpu: not checked, the native library was not built" in text
    assert "nothing was checked" in text and "agrees" not in text


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("attentoin")
    assert stop.value.code == 2
    assert "attentoin" in capsys.readouterr().err


def test_a_check_compares_outputs_and_every_gradient():
    check = next(one for one in verify.ATTENTION if "additive" in one.option)
    with backends.use_backend("reference"):
        ours, exact, eager = check.results(torch.float32, "cpu", verify.SMALL)
    assert set(ours) == set(exact) == set(eager) == {"output 0", "dquery", "dkey", "dvalue", "dattn_mask"}
    assert {tensor.dtype for tensor in exact.values()} == {torch.float64}
