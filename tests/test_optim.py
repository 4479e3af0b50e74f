"""FusedAdam and FusedAdamW as drop-in replacements for torch.optim.Adam and AdamW."""

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from fastlayers.optim import FusedAdam, FusedAdamW
from tests.numerics import assert_accurate
from tests.optimizers import PAIRS, assert_trains_like_torch, like, model, train

both = pytest.mark.parametrize("ours,theirs", PAIRS)


def torch_cases(kind):
    return next(info for info in optim_db if info.optim_cls is kind)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torchs_own_cases(ours, theirs, dtype):
    for case in torch_cases(theirs).optim_inputs_func(device="cpu"):
        assert_trains_like_torch(ours, theirs, dtype, **case.kwargs)


@both
def test_torchs_own_error_cases(ours, theirs):
    for case in torch_cases(theirs).optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR and issubclass(case.error_type, Exception):
            with pytest.warns() if case.error_type is UserWarning else pytest.raises(case.error_type):
                ours(given.params, **given.kwargs)


@both
@pytest.mark.parametrize(
    "options",
    [
        dict(lr=torch.tensor(0.02)),
        dict(betas=(0.0, 0.5)),
        dict(betas=(torch.tensor(0.8), torch.tensor(0.95))),
        dict(eps=0.1, amsgrad=True, maximize=True),
    ],
)
def test_other_options(ours, theirs, options):
    assert_trains_like_torch(ours, theirs, **options)


@both
@pytest.mark.parametrize("options", [dict(foreach=True), dict(fused=True), dict(fused=False), dict(capturable=True)])
def test_implementation_options_change_nothing(ours, theirs, options):
    params = model()
    plain = like(params)
    assert torch.equal(train(ours(params, **options), params), train(ours(plain), plain))


BAD_OPTIONS = {
    "lr": [float("nan"), -1.0],
    "eps": [float("nan"), -1e-8],
    "betas": [(1.0, 0.9), (0.9, -0.1), (float("nan"), 0.9)],
    "weight_decay": [float("nan"), -0.1],
    "differentiable": [True],
    "moment_dtype": [torch.float64, torch.int8, "bfloat16"],
    "max_grad_norm": [0.0, -1.0, float("nan")],
}


@both
@pytest.mark.parametrize("name,value", [(name, value) for name, values in BAD_OPTIONS.items() for value in values])
def test_bad_options(ours, theirs, name, value):
    with pytest.raises(ValueError):
        ours(model(), **{name: value})


@both
def test_sparse_and_complex_are_refused(ours, theirs):
    param = torch.nn.Parameter(torch.zeros(3, 4))
    param.grad = torch.eye(3, 4).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        ours([param]).step()
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match="complex64"):
        ours([param]).step()


@both
def test_groups_missing_gradients_and_closure(ours, theirs):
    params, others = model(), model()
    results = []
    for kind, tensors in ((ours, params), (theirs, others)):
        optimizer = kind([{"params": tensors[:2], "lr": 0.1}, {"params": tensors[2:], "weight_decay": 0.5}])
        for step in range(3):
            for i, tensor in enumerate(tensors):
                tensor.grad = None if (step + i) % 3 == 0 else torch.full_like(tensor, 0.25 * (i + 1))
            loss = optimizer.step(lambda: torch.tensor(7.0, requires_grad=torch.is_grad_enabled()))
            assert loss.item() == 7 and loss.requires_grad
        results.append([optimizer.state[t].get("step", torch.tensor(0.0)).item() for t in tensors])
    assert results[0] == results[1]
    for mine, other in zip(params, others):
        torch.testing.assert_close(mine, other)


def saved(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@both
@pytest.mark.parametrize("amsgrad", [False, True])
def test_checkpoints_go_both_ways(ours, theirs, amsgrad):
    """Four steps with either, saved, loaded by either, four more: as eight in one go."""
    params = model()
    eager = like(params)
    wanted = train(theirs(eager, amsgrad=amsgrad, foreach=False), eager, 8)
    exact = like(params, torch.float64)
    exact = train(theirs(exact, amsgrad=amsgrad, foreach=False), exact, 8)
    for first, second in ((ours, theirs), (theirs, ours), (ours, ours)):
        mine = like(params)
        optimizer = first(mine, amsgrad=amsgrad)
        generator = torch.Generator().manual_seed(1)
        for step in range(8):
            for param in mine:
                param.grad = torch.randn(param.shape, generator=generator).bfloat16().float()
            optimizer.step()
            if step == 3:
                state, optimizer = saved(optimizer), second(mine, amsgrad=amsgrad)
                optimizer.load_state_dict(state)
        assert_accurate(torch.cat([p.detach().flatten() for p in mine]), exact, wanted)


def test_checkpoints_keep_masters_and_moments_as_they_are():
    params = model(torch.bfloat16)
    optimizer = FusedAdamW(params, master_weights=True, lr=1e-5)
    train(optimizer, params)
    again = like(params)
    other = FusedAdamW(again, master_weights=True, lr=1e-5)
    other.load_state_dict(saved(optimizer))
    for mine, theirs in zip(optimizer.state.values(), other.state.values()):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
    assert torch.equal(train(optimizer, params), train(other, again))
    torch.optim.AdamW(like(params)).load_state_dict(saved(optimizer))


@both
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickle(ours, theirs, clone):
    params = model()
    optimizer = ours(params, max_grad_norm=0.5, moment_dtype=torch.bfloat16)
    train(optimizer, params)
    params2, optimizer2 = clone((params, optimizer))
    assert isinstance(optimizer2, theirs) and optimizer2.max_grad_norm == 0.5
    assert torch.equal(train(optimizer, params), train(optimizer2, params2))


@both
@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(ours, theirs, overflow):
    params, plain = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, other = ours(params), ours(plain)
    loss = sum((p * p).sum() for p in params)
    scaler.scale(loss).backward()
    sum((p * p).sum() for p in plain).backward()
    if overflow:
        params[0].grad[0, 0] = float("inf")
    else:
        other.step()
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, params, plain))
    assert scaler.get_scale() == (512 if overflow else 1024)


@both
@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_max_grad_norm_is_clip_grad_norm(ours, theirs, max_norm):
    params = model()
    double, eager = like(params, torch.float64), like(params)
    results = []
    for kind, tensors, clip in ((ours, params, False), (theirs, double, True), (theirs, eager, True)):
        options = {} if clip else {"max_grad_norm": max_norm}
        optimizer = kind([{"params": tensors[:2]}, {"params": tensors[2:]}], lr=0.1, eps=1.0, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for tensor in tensors:
                tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if clip:
                norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
            optimizer.step()
        norm = norm if clip else optimizer.grad_norm
        results.append(torch.cat([norm.reshape(1), *(t.detach().flatten() for t in tensors)]))
    assert_accurate(*results)


def test_moment_dtype_and_masters_in_the_state():
    params = [*model(torch.bfloat16), *model(torch.float32)]
    optimizer = FusedAdam(params, master_weights=True, amsgrad=True)
    train(optimizer, params, 1)
    assert {t.dtype for s in optimizer.state.values() for t in s.values()} == {torch.float32}
    assert ["master_param" in optimizer.state[p] for p in params] == [True] * 4 + [False] * 4
    small = FusedAdam(params, moment_dtype=torch.bfloat16)
    train(small, params, 1)
    assert {s["exp_avg"].dtype for s in small.state.values()} == {torch.bfloat16}


def test_small_updates_are_lost_without_and_kept_with_stochastic_rounding_or_masters():
    """bfloat16 weights of 1 and a step of 1/1000 of their spacing: rounding to nearest never moves."""
    moved = {}
    for name in (None, "stochastic_rounding", "master_weights"):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
        optimizer = FusedAdam([param], lr=2.0**-7 / 200, **({name: True} if name else {}))
        for _ in range(100):
            param.grad = torch.full_like(param, -1.0)
            optimizer.step()
        moved[name] = (param.float().mean() - 1).item() / (100 * 2.0**-7 / 200)
    assert moved[None] == 0 and abs(moved["stochastic_rounding"] - 1) < 0.02
    assert abs(moved["master_weights"] - 1) <= 1  # half a spacing was asked for: 0 or a whole one


def test_stochastic_rounding_follows_torchs_seed():
    results = []
    for seed in (0, 0, 1):
        params = model(torch.bfloat16)
        torch.manual_seed(seed)
        results.append(train(FusedAdam(params, stochastic_rounding=True), params))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_compiled_step():
    params = model()
    plain = like(params)
    optimizer = FusedAdamW(params)
    wanted = train(FusedAdamW(plain), plain)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    assert torch.equal(train(optimizer, params), wanted)


IN_ANOTHER_PROCESS = """
import torch
from fastlayers import _native
from tests.optimizers import PAIRS, assert_trains_like_torch, model, train
assert _native.cpu_isa == {isa!r}, _native.cpu_isa
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for ours, theirs in PAIRS:
        assert_trains_like_torch(ours, theirs, dtype, amsgrad=True, weight_decay=0.1, eps=1e-4)
params = model(torch.bfloat16)
torch.manual_seed(3)
print(train(PAIRS[0][0](params, stochastic_rounding=True, max_grad_norm=0.5), params).double().sum().item())
"""


def run_python(code, **environment):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_lower_instruction_sets(isa):
    from fastlayers import _native

    ascending = ["none", "avx2", "avx512", "avx512_bf16", "amx"]
    if ascending.index(_native.cpu_isa) < ascending.index(isa):
        pytest.skip(f"this CPU has no {isa}")
    total = float(run_python(IN_ANOTHER_PROCESS.format(isa=isa), FASTLAYERS_CPU_ISA=isa))
    params = model(torch.bfloat16)
    torch.manual_seed(3)
    here = train(FusedAdam(params, stochastic_rounding=True, max_grad_norm=0.5), params)
    assert abs(here.double().sum().item() - total) <= 0.02  # a last bit in float32 may tip one rounding


DISTRIBUTED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from fastlayers.optim import FusedAdamW
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
torch.manual_seed(0)
plain = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
sharded = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
sharded.load_state_dict(plain.state_dict())
fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)))
one, two = FusedAdamW(plain.parameters(), max_grad_norm=0.1), FusedAdamW(sharded.parameters(), max_grad_norm=0.1)
for _ in range(3):
    x = torch.randn(5, 6)
    for module, optimizer in ((plain, one), (sharded, two)):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
for a, b in zip(plain.parameters(), sharded.parameters()):
    assert isinstance(b, DTensor) and isinstance(two.state[b]["exp_avg"], DTensor)
    torch.testing.assert_close(a, b.full_tensor())
dist.destroy_process_group()
"""


def test_fsdp2_shards():
    run_python(DISTRIBUTED)
