"""ops.adam_step and ops.grad_norm: every backend against torch's own Adam and the float64 reference."""

import itertools

import pytest
import torch

from fastlayers import backends, ops
from tests.backends import BACKENDS, on_host
from tests.numerics import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1823,), (33, 65), (3, 4, 5, 6), (), (0, 5), (1,)]
SHAPES += [(70001,) if "cpu" in BACKENDS["adam"] else (4099,)]  # more than one task, more than one block
pytestmark = pytest.mark.parametrize("backend", [*BACKENDS["adam"], "reference"])


def make(shapes=SHAPES, dtype=torch.float32, steps=2, seed=0):
    """Parameters, and their gradients for a few steps."""
    generator, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()
    make_all = lambda: [torch.randn(s, generator=generator, device="cpu").to(device, dtype) for s in shapes]  # noqa: E731
    return make_all(), [make_all() for _ in range(steps)]


def state_of(params, moment_dtype=None, amsgrad=False, masters=False):
    zeros = [[torch.zeros_like(p, dtype=moment_dtype) for p in params] for _ in range(3)]
    return {
        "exp_avgs": zeros[0],
        "exp_avg_sqs": zeros[1],
        "max_exp_avg_sqs": zeros[2] if amsgrad else [],
        "steps": [torch.zeros(()) for _ in params],
        "master_params": [p.float().clone() for p in params] if masters else [],
    }


HYPER = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.1)


def run(params, grads, state, backend, **options):
    for step_grads in grads:
        ops.adam_step(params, step_grads, **state, **{**HYPER, **options}, backend=backend)
    return [*params, *state["exp_avgs"], *state["exp_avg_sqs"], *state["max_exp_avg_sqs"]]


def exactly(params, grads, amsgrad=False, **options):
    """The same in float64."""
    params = [p.double() for p in params]
    grads = [[g.double() for g in step] for step in grads]
    return run(params, grads, state_of(params, amsgrad=amsgrad), "reference", **options)


def eagerly(params, grads, amsgrad=False, maximize=False, decoupled_weight_decay=False, lr=HYPER["lr"]):
    """The same with torch's own optimizer, foreach off."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    kind = torch.optim.AdamW if decoupled_weight_decay else torch.optim.Adam
    betas, rest = (HYPER["beta1"], HYPER["beta2"]), {k: HYPER[k] for k in ("eps", "weight_decay")}
    optimizer = kind(params, lr=lr, betas=betas, amsgrad=amsgrad, maximize=maximize, foreach=False, **rest)
    for step_grads in grads:
        for param, grad in zip(params, step_grads):
            param.grad = grad.clone()
        optimizer.step()
    keys = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 3 if amsgrad else 2]
    return [*params, *(optimizer.state[p][key] for key in keys for p in params)]


def assert_same_as_torch(ours, exact, eager):
    """All tensors of a kind together: of a single number, eager's own error may be 0 by luck."""
    kinds = len(ours) // len(SHAPES)
    for kind in range(kinds):
        part = slice(kind * len(SHAPES), (kind + 1) * len(SHAPES))
        assert [(t.shape, t.dtype) for t in ours[part]] == [(t.shape, t.dtype) for t in eager[part]]
        joined = [torch.cat([t.detach().flatten() for t in tensors[part]]) for tensors in (ours, exact, eager)]
        assert_accurate(*joined, what=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")[kind])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("amsgrad,maximize", [(False, False), (True, False), (False, True)])
def test_same_as_torch(backend, dtype, decoupled, amsgrad, maximize):
    params, grads = make(dtype=dtype)
    options = dict(decoupled_weight_decay=decoupled, maximize=maximize)
    exact = exactly(params, grads, amsgrad, **options)
    eager = eagerly(params, grads, amsgrad, **options)
    ours = run([p.clone() for p in params], grads, state_of(params, amsgrad=amsgrad), backend, **options)
    assert_same_as_torch(ours, exact, eager)


def laid_out(tensor, layout):
    """A copy of a 4-dimensional tensor with the same values and another layout, inside guarded memory."""
    if layout == "channels_last":
        return tensor.to(memory_format=torch.channels_last, copy=True)
    if layout == "transposed":
        return tensor.transpose(0, 3).contiguous().transpose(0, 3)
    if layout == "sliced":
        base = torch.full((*tensor.shape[:3], 2 * tensor.shape[3] + 3), 7.0, dtype=tensor.dtype)
        view = base[..., 1 : 1 + 2 * tensor.shape[3] : 2]
        return view.copy_(tensor)
    if layout == "offset":  # contiguous, but not aligned for vectors
        base = torch.full((tensor.numel() + 8,), 7.0, dtype=tensor.dtype)
        return base[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)
    return tensor.clone()


LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "offset"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("param_layout,grad_layout", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts_elementwise_right(backend, dtype, param_layout, grad_layout):
    values, grads = make([(5, 7, 6, 11)], dtype)
    wanted = run([v.clone() for v in values], grads, state_of(values), backend)
    params = [laid_out(v, param_layout) for v in values]
    state = state_of(params)
    state["exp_avgs"] = [laid_out(t, grad_layout) for t in state["exp_avgs"]]
    ours = run(params, [[laid_out(g, grad_layout) for g in step] for step in grads], state, backend)
    for got, want in zip(ours, wanted):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["sliced", "offset"])
def test_neighbours_in_memory_are_not_touched(backend, layout):
    values, grads = make([(2, 3, 4, 37)])
    params = [laid_out(v, layout) for v in values]
    base = params[0]._base if params[0]._base._base is None else params[0]._base._base
    before = base.clone()
    run(params, grads, state_of(params), backend)
    mine = torch.zeros_like(base, dtype=torch.bool)
    mine.as_strided(params[0].shape, params[0].stride(), params[0].storage_offset()).fill_(True)
    assert torch.equal(base[~mine], before[~mine])
    assert not torch.equal(base[mine], before[mine])


def test_expanded_gradients(backend):
    params, _ = make([(6, 5)])
    row = torch.randn(5)
    wanted = run([params[0].clone()], [[row.repeat(6, 1)]], state_of(params), backend)
    expanded = row.expand(6, 5)
    ours = run([params[0].clone()], [[expanded]], state_of(params), backend)
    assert all(map(torch.equal, ours, wanted))
    scaled = (row * 4).expand(6, 5)
    ours = run([params[0].clone()], [[scaled]], state_of(params), backend, grad_scale=torch.tensor(4.0))
    assert all(map(torch.equal, ours, wanted)) and torch.equal(scaled, expanded)


@pytest.mark.parametrize("param_dtype,grad_dtype,moment_dtype", list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_every_mix_of_dtypes(backend, param_dtype, grad_dtype, moment_dtype):
    """One step from rest: what is stored is the float32 result, rounded once."""
    params, grads = make([(1029,)], param_dtype, steps=1)
    grads = [[g.to(grad_dtype) for g in step] for step in grads]
    wide = run(
        [p.float().clone() for p in params],
        [[g.float() for g in step] for step in grads],
        state_of(params, torch.float32),
        backend,
    )
    ours = run([p.clone() for p in params], grads, state_of(params, moment_dtype), backend)
    for got, want in zip(ours, wide):
        assert torch.equal(got, want.to(got.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights(backend, dtype):
    params, grads = make(dtype=dtype)
    masters = [p.float().clone() for p in params]
    float_grads = [[g.float() for g in step] for step in grads]
    wanted = run(masters, float_grads, state_of(masters), backend)
    state = state_of(params, torch.float32, masters=True)
    run(params, grads, state, backend)
    for param, master, want in zip(params, state["master_params"], wanted):
        assert torch.equal(master, want) and torch.equal(param, want.to(dtype))


def test_steps_are_per_parameter(backend):
    params, grads = make([(9,), (9,)])
    state = state_of(params)
    ours = [p.clone() for p in params]
    run(ours[:1], [[step[0]] for step in grads[:1]], {k: v[:1] for k, v in state.items()}, backend)
    run(ours, grads[1:], state, backend)
    assert [step.item() for step in state["steps"]] == [2, 1]
    alone = run([params[1].clone()], [[step[1]] for step in grads[1:]], state_of(params[1:]), backend)
    assert torch.equal(ours[1], alone[0])


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
def test_tensor_lr(backend, lr_dtype):
    params, grads = make()
    wanted = run([p.clone() for p in params], grads, state_of(params), backend, lr=0.125)
    lr = torch.tensor(0.125, dtype=lr_dtype, device="cpu")
    with on_host(backend, lr):
        ours = run([p.clone() for p in params], grads, state_of(params), backend, lr=lr)
    assert all(map(torch.equal, ours, wanted))
    if lr_dtype == torch.float32:
        ours = run(params, grads, state_of(params), backend, lr=torch.tensor(0.125))
        assert all(map(torch.equal, ours, wanted))


@pytest.mark.parametrize("decoupled", [False, True])
def test_steps_on_the_host(backend, decoupled):
    params, grads = make(steps=3)
    options = dict(decoupled_weight_decay=decoupled)
    exact, eager = exactly(params, grads, **options), eagerly(params, grads, **options)
    state = state_of(params)
    state["steps"] = [torch.zeros((), device="cpu") for _ in params]
    with on_host(backend, *state["steps"]):
        ours = run(params, grads, state, backend, **options)
    assert_same_as_torch(ours, exact, eager)
    assert [step.item() for step in state["steps"]] == [3] * len(params)


def test_grad_scale_unscales_and_leaves_unscaled_gradients(backend):
    params, grads = make(steps=1)
    wanted = run([p.clone() for p in params], grads, state_of(params), backend)
    scaled = [[g * 1024 for g in step] for step in grads]
    ours = run(params, scaled, state_of(params), backend, grad_scale=torch.tensor(1024.0))
    assert all(map(torch.equal, ours, wanted))
    assert all(map(torch.equal, scaled[0], grads[0]))


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 0.5])
def test_found_inf_changes_nothing(backend, found_inf):
    params, grads = make(steps=1)
    state, before = state_of(params), [p.clone() for p in params]
    scaled = [[g.clone() for g in grads[0]]]
    ours = run(params, scaled, state, backend, found_inf=torch.tensor(found_inf), grad_scale=torch.tensor(8.0))
    assert all(map(torch.equal, params, before)) and all(map(torch.equal, scaled[0], grads[0]))
    assert not any(t.any() for t in ours[len(params) :]) and not any(step.item() for step in state["steps"])


def test_nan_and_infinite_gradients_reach_the_parameter(backend):
    params, _ = make([(64,)])
    grad = torch.ones(64)
    grad[3], grad[40] = float("nan"), float("inf")
    (param, *_), before = run([params[0].clone()], [[grad]], state_of(params), backend), params[0]
    assert param[[3, 40]].isnan().all() and param.isnan().sum() == 2 and not torch.equal(param, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_norm(backend, dtype):
    if backend == "triton":
        pytest.skip("the norm is the native library's or the reference's")
    _, (grads,) = make([(40001,), (3, 5), (0,), (7, 9)], dtype, steps=1)
    grads[3] = grads[3].t()
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    eager = torch.stack([g.float().norm() for g in grads]).norm()
    assert_accurate(ops.grad_norm(grads, backend=backend), exact, eager)
    assert_accurate(ops.grad_norm(grads, torch.tensor(3.0), backend=backend), exact / 3, eager / 3)
    for value in (1e25, 3e37, 1e-25, 1e-44, 0.0, float("inf"), float("nan")):
        tensor = torch.full((3, 5), value)
        for grad in (tensor, tensor[:, ::2]):
            wanted = pytest.approx(grad.double().norm().item(), rel=1e-6, abs=1e-45, nan_ok=True)
            assert ops.grad_norm([grad], backend=backend).item() == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0003, 3.1e-6, -2.7, 300.7])
def test_stochastic_rounding_is_right_on_average(backend, dtype, value):
    """A step that moves the parameter to `value`, which the dtype cannot hold: the mean of many is `value`."""
    count = 60000
    params = [torch.zeros(count, dtype=dtype)]
    state = state_of(params, torch.float32)
    options = dict(lr=-value, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, rng=torch.tensor([7, 1], device="cpu"))
    run(params, [[torch.ones(count)]], state, backend, **options)
    target = torch.tensor(value, dtype=torch.float32).double()
    seen = params[0].double().unique()
    spacing = (seen.max() - seen.min()).item()
    assert len(seen) == 2 and seen.min() < target < seen.max()
    error = abs(params[0].double().mean() - target).item()
    assert error < 5 * spacing / 2 / count**0.5  # five standard deviations of the mean


@pytest.mark.parametrize("seed,offset", [(1, 3), (0, 16), (-5, 2**31 + 1), (2**40 + 7, 2**32 - 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment_dtype", [None, torch.float32], ids=str)
def test_stochastic_rounding_is_the_same_everywhere(backend, moment_dtype, dtype, seed, offset):
    """One seed, one result: on every backend, and in any layout that keeps the memory order."""
    params, grads = make([(1000,), (5, 7, 6, 11)], dtype, steps=1)
    results = {}
    for first, which in ((seed, backend), (seed, "reference"), (seed + 1, backend)):
        rng = torch.tensor([first, offset], device="cpu")
        state = state_of(params, moment_dtype or dtype)
        results[first, which] = run([p.clone() for p in params], grads, state, which, rng=rng)
    pairs = [pair for pair in zip(results[seed, backend], results[seed, "reference"]) if pair[0].dtype == dtype]
    different = sum((a != b).sum().item() for a, b in pairs)
    assert different <= 0.002 * sum(p.numel() for p in params)  # a last bit in float32 may tip the balance
    assert not torch.equal(results[seed, backend][0], results[seed + 1, backend][0])


def bad_calls():
    return {
        "a parameter that is no tensor": (dict(params=[3.0]), TypeError, "params"),
        "fewer gradients": (dict(grads=[]), ValueError, "grads"),
        "another shape": (dict(grads=[torch.zeros(4)]), ValueError, "shape"),
        "complex": (dict(params=[torch.zeros(3, dtype=torch.complex64)]), TypeError, "complex64"),
        "integers": (dict(grads=[torch.zeros(3, dtype=torch.int64)]), TypeError, "floating"),
        "sparse": (dict(grads=[torch.ones(3).to_sparse()]), TypeError, "sparse"),
        "steps of another dtype": (dict(steps=[torch.zeros((), dtype=torch.int64)]), TypeError, "steps"),
        "no steps": (dict(steps=[]), ValueError, "steps"),
        "another device": (dict(grads=[torch.zeros(3, device="meta")]), ValueError, "meta"),
        "beta1 of NaN": (dict(beta1=float("nan")), ValueError, "beta1"),
        "beta2 of 2": (dict(beta2=2.0), ValueError, "beta2"),
        "an expanded parameter": (dict(params=[torch.zeros(1).expand(3)]), ValueError, "memory"),
        "an unknown backend": (dict(backend="gpu"), ValueError, "gpu"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_calls(backend, case):
    change, error, words = bad_calls()[case]
    three = [torch.zeros(3)]
    call = dict(params=three, grads=[torch.ones(3)], exp_avgs=[torch.zeros(3)], exp_avg_sqs=[torch.zeros(3)])
    call.update(max_exp_avg_sqs=[], steps=[torch.zeros(())], **HYPER, backend=backend)
    with pytest.raises(error, match=words):
        ops.adam_step(**{**call, **change})


def test_opcheck(backend):
    if backend not in ("cpu", "cuda"):
        pytest.skip("a check of the registered operator")
    operators = backends.operators(backend)
    params, (grads,) = make([(17, 3), (4,)], steps=1)
    state = state_of(params, amsgrad=True)
    lists = [
        params,
        grads,
        *(state[k] for k in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "master_params", "steps")),
    ]
    numbers = (0.01, 0.9, 0.99, 0.1, 1e-8, 1.0, True, False)
    for extra in ((None,) * 5, (torch.tensor(0.1), torch.tensor(2.0), torch.tensor(0.0), torch.tensor(3.0), None)):
        torch.library.opcheck(operators.adam_step, (*lists, *extra, *numbers))
    torch.library.opcheck(operators.grad_norm, (grads, None))


def test_compiles_into_one_graph(backend):
    if backend == "triton":
        pytest.skip("the pointer table is built eagerly")
    params, (grads,) = make([(17, 3), (4,)], steps=1)
    wanted = run([p.clone() for p in params], [grads], state_of(params), backend)

    def step(params, grads, state):
        ops.adam_step(params, grads, **state, **HYPER, backend=backend)

    state = state_of(params)
    torch.compile(step, fullgraph=True, backend="aot_eager")(params, grads, state)
    for got, want in zip([*params, *state["exp_avgs"], *state["exp_avg_sqs"]], wanted):
        torch.testing.assert_close(got, want)


def test_autograd_notices_the_change(backend):
    """A tensor that the graph saved must not be used in backward after a step changed it."""
    params, (grads,) = make([(5,)], steps=1)
    params[0].requires_grad_()
    loss = (params[0] * params[0]).sum()
    run([params[0]], [grads], state_of([params[0].detach()]), backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
