"""FusedAdamW beside torch.optim.AdamW in each of its forms, and other packages' Adam."""

from dataclasses import dataclass
from functools import partial

import torch

import fastlayers
from fastlayers import backends, optim
from fastlayers.agreement import deviation
from fastlayers.benchmarks import others
from fastlayers.benchmarks.runner import Candidate, Case, Place
from fastlayers.benchmarks.work import gather, our_makers

SUITE = "adam"
TENSORS_TOUCHED = 7  # reads parameter, gradient and both moments, writes all but the gradient

TORCH = {  # candidate -> its constructor
    "AdamW": torch.optim.AdamW,
    "AdamW(foreach=True)": partial(torch.optim.AdamW, foreach=True),
    "AdamW(fused=True)": partial(torch.optim.AdamW, fused=True),
}


@dataclass(frozen=True)
class Call:
    """shapes: of the parameters."""

    device: str
    dtype: str
    shapes: tuple

    @property
    def elements(self):
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def transformer_shapes(vocabulary, width, layers):
    """The parameters of an encoder such as BERT: the word embedding, 6 matrices and 12 vectors a layer, 3 vectors."""
    matrices = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    vectors = [(4 * width,)] + [(width,)] * 11
    return ((vocabulary, width), *matrices * layers, *vectors * layers, *[(width,)] * 3)


MODELS = {  # millions of parameters, roughly, and their shapes
    "cpu": {4: (8192, 256, 3), 22: (30522, 384, 6), 108: (30522, 768, 12)},
    "cuda": {22: (30522, 384, 6), 108: (30522, 768, 12), 334: (30522, 1024, 24), 1300: (50257, 2048, 24)},
}
SMALL_TENSORS = {"cpu": (125, 500, 2000), "cuda": (500, 2000, 8000)}  # of 4,096 elements

TARGETS = [  # on CPU, float32: what, the shapes, and how many times as fast it has to be
    (
        "108 M parameters in 220 tensors",
        transformer_shapes(30522, 768, 12),
        {"AdamW": 4.0, "AdamW(fused=True)": 1.0},
    ),
    ("2,000 tensors of 4,096", ((4096,),) * 2000, {"AdamW(fused=True)": 2.5}),
]


def cases(setting):
    wanted = {shapes: targets for _, shapes, targets in TARGETS} if setting.device == "cpu" else {}
    for dtype in setting.dtypes:
        for millions, sizes in MODELS[setting.device].items():
            shapes = transformer_shapes(*sizes)
            name = f"{millions} M parameters in {len(shapes)} tensors"
            place = Place(f"AdamW, models, {dtype}", f"models, {dtype}", "million parameters", millions)
            yield _case(setting, Call(setting.device, dtype, shapes), name, place, wanted)
        for count in SMALL_TENSORS[setting.device]:
            place = Place(f"AdamW, small tensors, {dtype}", f"tensors of 4,096, {dtype}", "tensors", count)
            call = Call(setting.device, dtype, ((4096,),) * count)
            yield _case(setting, call, f"{count:,} tensors of 4,096", place, wanted)


def _case(setting, call, name, place, wanted):
    return Case(
        suite=SUITE,
        name=f"FusedAdamW step, {call.dtype}, {name}",
        candidates=lambda: _candidates(call),
        targets=wanted.get(call.shapes, {}) if call.dtype == "float32" else {},
        bytes=TENSORS_TOUCHED * getattr(torch, call.dtype).itemsize * call.elements,
        place=place,
        dtype=call.dtype,
        setting=setting,
    )


def _check(call, make):
    """Three steps of a few tensors, each beside torch's own steps in float64 and in the tested dtype."""
    shapes = [(64, 768), (4096,), (768,), (1,), (31, 7)]
    torch.manual_seed(0)
    dtype = getattr(torch, call.dtype)
    start = [torch.randn(shape).to(call.device, dtype) for shape in shapes]
    grads = [[torch.randn(shape).to(call.device, dtype) for shape in shapes] for _ in range(3)]

    def trained(make_optimizer, dtype):
        params = [tensor.to(dtype, copy=True).requires_grad_() for tensor in start]
        optimizer = make_optimizer(params)
        for step_grads in grads:
            for param, grad in zip(params, step_grads):
                param.grad = grad.to(dtype)
            optimizer.step()
        return params

    exact, eager = trained(torch.optim.AdamW, torch.float64), trained(torch.optim.AdamW, dtype)
    return max(map(deviation, trained(make, dtype), exact, eager), key=lambda found: found.ratio)


def _candidates(call):
    dtype = getattr(torch, call.dtype)
    grads = [torch.randn(shape, device=call.device).to(dtype) for shape in call.shapes]

    def candidate(make):
        params = [torch.randn(shape, device=call.device).to(dtype).requires_grad_() for shape in call.shapes]
        for param, grad in zip(params, grads):
            param.grad = grad
        return Candidate(step=make(params).step, check=lambda: _check(call, make))

    facts = backends.facts("adam_step", *[grads[:1]] * 4)
    makers = our_makers("adam_step", facts, lambda backend: _ours(candidate, backend))
    makers |= {name: partial(candidate, make) for name, make in TORCH.items()}
    makers |= others.makers(others.ADAM, lambda adapter: candidate(adapter(call)))
    return gather(makers)


def _ours(candidate, backend):
    """On one backend by name; use_backend reaches every call, and costs nothing beside a step."""
    made = candidate(optim.FusedAdamW)
    if backend is None:
        return made

    def within(function):
        def call():
            with fastlayers.use_backend(backend):
                return function()

        return call

    return Candidate(within(made.step), within(made.check))
