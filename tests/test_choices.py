"""The table of choices: which entry a call goes by, that `fastlayers bench --tune` writes it, what a bad one says."""

import dataclasses

import pytest
import torch

import fastlayers
from fastlayers import backends, bench, choices, cli, ops
from fastlayers.benchmarks import tune
from fastlayers.choices import Choice
from tests import simulator
from tests.backends import BACKENDS, SIMULATED, device_of
from tests.simulator import shipped_choices


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A place for a table of one's own."""
    path = tmp_path / "folder" / "choices.json"
    monkeypatch.setenv("FASTLAYERS_CHOICES", str(path))
    choices.reload()
    yield path
    choices.reload()


def choice(arch="sm_80", sizes=(1024, 64), order=("cuda",), **changes):
    made = Choice("attention", arch, "float16", False, sizes, order, "measured: here")
    return dataclasses.replace(made, **changes)


def find(capability=(8, 0), sizes=(1024, 64), **changes):
    call = {"op": "attention", "dtype": "float16", "gradient": False, **changes}
    return choices.find(call["op"], capability, call["dtype"], call["gradient"], sizes)


def test_the_nearest_entry_counts(own):
    near, far = choice(sizes=(1024, 64)), choice(sizes=(8192, 64), order=("triton", "cuda"))
    choices.write(own, [near, far])
    choices.reload()
    assert find(sizes=(1024, 64)) == find(sizes=(2000, 64)) == find(sizes=(1, 1)) == near
    assert find(sizes=(5000, 64)) == find(sizes=(10**6, 64)) == far
    assert find(sizes=(1024, 64, 3)) is None  # another kind of sizes
    assert find(dtype="float64") is None and find(gradient=True, dtype="float64") is None


def test_an_architecture_without_entries_goes_by_the_one_before(own):
    old, new = choice("sm_80"), choice("sm_90", sizes=(1, 1))
    choices.write(own, [old, new])
    choices.reload()
    assert find((8, 0)) == find((8, 9)) == old
    assert find((9, 0)) == find((12, 0)) == new
    assert find((7, 5)) is None


def test_every_shipped_entry_says_where_it_comes_from():
    assert choices.read(choices.SHIPPED) == list(shipped_choices.entries())
    for shipped in choices.read(choices.SHIPPED):
        assert shipped.source.startswith(("estimated: ", "measured: ")) and shipped.backends
        assert shipped.op in backends._reasons and set(shipped.backends) <= set(backends.NAMES)


def test_what_an_h100_measured_is_shipped():
    for sizes in ((2048, 128, 128, 64), (32, 8192, 8192, 128)):
        found = find((9, 0), sizes=sizes)
        assert found.backends[0] == "cuda" and found.source.startswith("measured: NVIDIA H100")
        assert find((12, 0), sizes=sizes).arch == "sm_120"


@pytest.mark.skipif(not {"cuda", "triton"} <= set(BACKENDS["adam"]) or not SIMULATED, reason="needs nvcc and triton")
def test_the_counts_behind_the_shipped_entries():
    """As simulated now: other compilers may count a little otherwise."""
    simulator.install("sm_80")
    try:
        for backend in ("cuda", "triton"):
            shipped = shipped_choices.COUNTS[64, backend]
            counted = shipped_choices.count_attention(64, backend)
            for (products, instructions), (products_now, instructions_now) in zip(shipped, counted):
                assert products_now == products
                assert instructions_now == pytest.approx(instructions, rel=0.2)
    finally:
        simulator.uninstall()


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[{}]", '[{"op": "attention"}]'])
def test_a_file_that_is_no_table_is_named(text, own):
    own.parent.mkdir()
    own.write_text(text)
    with pytest.raises(ValueError, match=r"choices.json is no table of choices .*fastlayers bench --tune"):
        choices.read(own)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_tuning_needs_a_gpu(own, capsys):
    assert cli.main(["bench", "--tune"]) == 2
    assert "torch sees no NVIDIA GPU" in capsys.readouterr().err
    assert cli.main(["bench", "--tune", "--list"]) == 2
    assert "it takes no --list" in capsys.readouterr().err and not own.exists()
    assert cli.main(["bench", "--tune", "--threads", "1"]) == 2
    assert "it takes no --threads" in capsys.readouterr().err and not own.exists()


def test_the_grid_covers_every_dtype_pass_and_op():
    calls = list(tune.grid())
    assert {call.dtype for call in calls} == set(tune.DTYPES) and {call.gradient for call in calls} == {False, True}
    assert {call.op for call in calls} == {"attention", "decode_attention", "linear_act", "gated_linear_act"}
    assert {call.suite for call in calls} <= set(bench.SUITES)
    assert len({call.name for call in calls}) == len(calls)


@pytest.fixture
def gpu(monkeypatch):
    if not SIMULATED or "cuda" not in BACKENDS["adam"]:
        pytest.skip("needs the simulator")
    from tests import simulator

    simulator.install("sm_80")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU that is simulated")
    yield
    simulator.uninstall()


def test_tuning_measures_writes_and_decides(own, gpu, monkeypatch, capsys):
    """The whole way, on the simulator, whose times mean nothing: reference comes out first."""
    small = [tune._attention(torch.float16, False, (1, 1, 16, 32)), tune._attention(torch.float64, False, (1, 1, 4, 4))]
    monkeypatch.setattr(tune, "grid", lambda: small)
    other = choice("sm_90")
    choices.write(own, [other])
    assert cli.main(["bench", "--tune", "--quick", "attention"]) == 0
    kept, found = choices.read(own)
    assert kept == other and set(found.backends) == {"cuda", "triton", "reference"}
    assert (found.op, found.arch, found.dtype, found.sizes) == ("attention", "sm_80", "float16", (1, 16, 16, 32))
    assert found.source.startswith("measured: a GPU that is simulated, fastlayers ")
    printed = capsys.readouterr().out
    assert "attention, forward, float16, B1 H1 S16 D32" in printed and "no kernel serves it here" in printed

    query = torch.randn(1, 1, 16, 32).half()
    for order in (("cuda", "reference"), ("reference", "cuda")):
        choices.write(own, [dataclasses.replace(found, backends=order)])
        choices.reload()
        answers = fastlayers.explain("attention", query, query, query)
        assert answers["cuda"] is None
        assert f"{order[0]:<9} chosen (measured: a GPU" in capsys.readouterr().out
    assert cli.main(["bench", "--tune", "--quick", "attention"]) == 0
    assert len(choices.read(own)) == 1  # the same call, measured again, replaces its entry


def test_what_a_table_names_has_to_be_able_to_serve(own, gpu):
    """An entry for a kernel that cannot take the call is passed over."""
    choices.write(own, [choice(sizes=(1, 4, 4, 300), order=("cuda", "triton", "reference"))])
    choices.reload()
    query = torch.randn(1, 1, 4, 300).half()
    assert ops.attention(query, query, query).shape == query.shape


@pytest.mark.skipif("cuda" not in BACKENDS["adam"], reason="needs nvcc, or a GPU")
def test_compiled_calls_that_name_no_backend():
    """The table, what was built and the GPU are asked while torch.compile traces, in one graph."""
    torch._dynamo.reset()

    def call(query, weight):
        out = ops.attention(query * 1, query, query)
        return ops.linear_act(out, weight) + backends._cuda_built()  # which is not asked of a simulated GPU

    with device_of("cuda"):
        arguments = torch.randn(1, 2, 33, 16, dtype=torch.float16), torch.randn(8, 16, dtype=torch.float16)
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments), call(*arguments))
