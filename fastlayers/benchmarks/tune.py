"""`fastlayers bench --tune`: time every backend that can serve a call on this GPU, and write the table of choices.

The grid below is what is timed; a call goes by the entry nearest to it (fastlayers/choices.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

import fastlayers
from fastlayers import backends, choices, ops
from fastlayers.benchmarks.runner import Candidate, Case, Setting, run_case

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SEQLENS = (128, 512, 2048, 8192)
ATTENTION = tuple((16384 // seqlen, 16, seqlen, dim) for seqlen in SEQLENS for dim in (64, 128))  # B, H, S, D
LAYERS = ((16, 4096, 4096), (512, 1024, 4096), (4096, 1024, 4096), (8192, 4096, 4096))  # rows, in and out features
SECONDS, QUICK_SECONDS = 2.0, 0.3  # of timing per call


@dataclass(frozen=True)
class Call:
    """One point of the grid. make: its arguments (args, kwargs), tensors on the GPU; gradient: backward, too."""

    suite: str
    op: str
    dtype: torch.dtype
    gradient: bool
    shape: str
    make: Callable

    @property
    def name(self):
        passes = "forward+backward" if self.gradient else "forward"
        return f"{self.op}, {passes}, {str(self.dtype).removeprefix('torch.')}, {self.shape}"


def grid():
    """The calls that are timed: about 16 k tokens of causal attention, layers of common widths, one-token decoding."""
    for dtype in DTYPES:
        for gradient in (False, True):
            for shape in ATTENTION:
                yield _attention(dtype, gradient, shape)
            for sizes in LAYERS:
                yield _linear("linear_act", 1, dtype, gradient, *sizes)
                yield _linear("gated_linear_act", 2, dtype, gradient, *sizes)
        for seqlen in (1024, 16384):
            yield _decoding(dtype, 8, seqlen, 128)


def _randn(dtype, gradient, *shapes):
    made = [torch.randn(shape, device=backends.cuda_device).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(gradient) for tensor in made]


def _attention(dtype, gradient, shape):
    def make():
        return _randn(dtype, gradient, shape, shape, shape), {"is_causal": True}

    return Call("attention", "attention", dtype, gradient, "B{} H{} S{} D{}".format(*shape), make)


def _decoding(dtype, batch, seqlen, head_dim):
    def make():
        query, cache = (batch, 32, 1, head_dim), (batch, 8, seqlen, head_dim)
        lengths = torch.full((batch,), seqlen, dtype=torch.int32, device=backends.cuda_device)
        return [*_randn(dtype, False, query, cache, cache), lengths], {"enable_gqa": True}

    shape = f"B{batch} H32/8 S{seqlen} D{head_dim}"
    return Call("attention", "decode_attention", dtype, False, shape, make)


def _linear(op, products, dtype, gradient, rows, in_features, out_features):
    def make():
        return _randn(dtype, gradient, (rows, in_features), *[(out_features, in_features)] * products), {}

    return Call("linear_act", op, dtype, gradient, f"{rows} x {in_features} x {out_features}", make)


def tune(suites, words, quick):
    """Time the calls of these suites whose name contains `words`; the number of choices written, printed on the way."""
    found = []
    for call in grid():
        if call.suite in suites and words in call.name:
            choice = measure(call, QUICK_SECONDS if quick else SECONDS)
            found += [choice] if choice else []
    if found:
        save(found)
        print(f"\n{len(found)} choices written to {choices.own_path()}")
    return len(found)


def measure(call, seconds):
    """The Choice for this call, from timings that are printed; None where no backend but reference can serve it."""
    args, kwargs = call.make()
    facts = backends.facts(call.op, *args, **kwargs)
    names = [name for name in backends.NAMES if name != "cpu" and backends.why_not(call.op, name, facts) is None]
    print(f"\n{call.name}", flush=True)
    if names == ["reference"]:
        print("  no kernel serves it here")
        return None
    candidates = {name: Candidate(_step(call, name, args, kwargs)) for name in names}
    case = Case("tune", call.name, lambda: candidates, setting=Setting(backends.cuda_device, cold=False))
    results = sorted(run_case(case, seconds), key=lambda result: (result.problem is not None, result.median))
    for result in results:
        print(f"  {result.candidate:<10} {result.problem or f'{1e3 * result.median:.3f} ms'}")
    best = tuple(result.candidate for result in results if result.problem is None)
    if not best:
        return None
    arch, dtype = "sm_{}{}".format(*backends.cuda_capability()), str(call.dtype).removeprefix("torch.")
    return choices.Choice(call.op, arch, dtype, call.gradient, facts["sizes"], best, _source())


def _source():
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    versions = f"fastlayers {fastlayers.__version__}, torch {torch.__version__}"
    return f"measured: {torch.cuda.get_device_name()}, {versions}, {today}"


def _step(call, backend, args, kwargs):
    function, leaves = getattr(ops, call.op), [arg for arg in args if arg.requires_grad]

    def step():
        with torch.set_grad_enabled(call.gradient):
            out = function(*args, **kwargs, backend=backend)
            return torch.autograd.grad(out, leaves, torch.ones_like(out)) if leaves else out

    return step


def save(found):
    """Into the user's own table, in place of what it had for the same calls."""

    def key(choice):
        return choice.op, choice.arch, choice.dtype, choice.gradient, choice.sizes

    path = choices.own_path()
    kept = [choice for choice in (choices.read(path) if path.exists() else []) if key(choice) not in map(key, found)]
    choices.write(path, [*kept, *found])
    choices.reload()
