"""The proof of --compare: losses and gradients of the swapped model against their exact values."""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import fastlayers
from fastlayers.agreement import deviation
from fastlayers.harness.forward import example_losses

LOSS_SCALE = 1024.0  # for float16: keeps small gradients above its smallest number, as GradScaler does in training


@dataclass
class Agreement:
    """The verdict over all steps checked. A deviation of 1 is the largest that the rule allows.

    The rule is applied to two tensors a step: the losses of the examples, and the gradient of all parameters as one
    vector. Its bounds are maxima of rounding noise; parameter by parameter they are a matter of luck and of how
    outliers reach a few of them (torch's own SDPA, judged so against the same attention in plain torch operations,
    failed on 40 of 40 occasions, and the gradient of a key bias, exactly 0, is nothing but noise). As one vector it
    never did, and the bound still stands below 1/700 of the largest gradient of every other parameter.
    """

    steps: int = 0
    worst_deviation: float = 0.0
    worst_place: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self):
        return self.steps > 0 and not self.problems

    def add(self, ours, exact, eager, dtype, where):
        """Compare the losses and gradients of one step, each as losses_and_gradients returns them."""
        for what, one in (("loss", losses_of), ("gradient", gradient_of)):
            found = deviation(one(ours), one(exact), one(eager), dtype)
            if not found.ratio <= self.worst_deviation:
                self.worst_deviation, self.worst_place = found.ratio, f"{what}, {where}"
            if not found.ok:
                largest = f"; largest at {largest_error(ours, exact)}" if what == "gradient" else ""
                self.problems.append(f"{what}, {where}: {found.problem}{largest}")


def losses_of(found):
    return found["loss"]


def gradient_of(found):
    return torch.cat([tensor.flatten() for name, tensor in found.items() if name != "loss"])


def largest_error(ours, exact):
    """The parameter whose gradient is farthest from exact."""
    return max((name for name in exact if name != "loss"), key=lambda name: (ours[name] - exact[name]).abs().max())


def check_step(agreement, pytorch, swapped, batch, dtype, seed, step):
    """Check losses and gradients before a step is taken. On the first, both models have the same weights."""
    if step == 0:
        check_swap(agreement, swapped, pytorch, batch, dtype, seed, "step 1 without dropout, against PyTorch")
    check_kernels(agreement, swapped, batch, dtype, seed, f"step {step + 1}, against the reference")
    agreement.steps += 1


def check_kernels(agreement, model, batch, dtype, seed, where):
    """The swapped model with dropout on, against itself on the reference backend: the same Philox masks, plain torch.

    exact is a float64 copy on the reference backend, eager the model itself on the reference backend
    """
    with fastlayers.use_backend("reference"):
        exact, steady = exact_and_steady(model, batch, dtype, seed)
        eager = losses_and_gradients(model, batch, dtype, seed, steady)
    ours = losses_and_gradients(model, batch, dtype, seed, steady)
    agreement.add(ours, exact, eager, dtype, where)


def check_swap(agreement, swapped, unmodified, batch, dtype, seed, where):
    """The swapped model with dropout off, against the unmodified one with the same parameters.

    exact is a float64 copy of the unmodified model, eager the unmodified model itself
    """
    was_training = [module for module in (*swapped.modules(), *unmodified.modules()) if module.training]
    swapped.eval(), unmodified.eval()
    exact, steady = exact_and_steady(unmodified, batch, dtype, seed)
    ours = losses_and_gradients(swapped, batch, dtype, seed, steady)
    eager = losses_and_gradients(unmodified, batch, dtype, seed, steady)
    for module in was_training:
        module.training = True
    agreement.add(ours, exact, eager, dtype, where)


def exact_and_steady(model, batch, dtype, seed):
    """losses_and_gradients in float64, and 1 for each example that counts, 0 for those that a rounding may decide.

    Where an argument of ReLU lies within rounding of 0, its slope is a throw of a coin. In float32 few examples have
    such a place, and are left out; with 16 bits most have some, and a comparison of their sums means something.
    """
    doubled = copy.deepcopy(model).double()
    torch.manual_seed(seed)
    with SameDropout(), Kinks(len(batch["labels"]), torch.finfo(dtype).eps) as kinks, torch.no_grad():
        example_losses(doubled, batch, torch.float64)
    steady = ~kinks.near if 2 * kinks.near.sum() < len(kinks.near) else torch.ones_like(kinks.near)
    steady = steady.to(batch["labels"].device)
    return losses_and_gradients(doubled, batch, torch.float64, seed, steady), steady


def losses_and_gradients(model, batch, dtype, seed, steady):
    """{"loss": of each example, parameter name: gradient of the mean loss}, of the examples that are steady; leaves no
    gradient in the model."""
    scale = LOSS_SCALE if dtype is torch.float16 else 1.0
    torch.manual_seed(seed)
    with SameDropout():
        losses = example_losses(model, batch, dtype) * steady
        (losses.mean() * scale).backward()
    found = {"loss": losses.detach()}
    found |= {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class Kinks(TorchFunctionMode):
    """Finds the examples in which an argument of ReLU is within `eps` of 0, relative to the largest, times ROUNDINGS.

    Behind a convolution none is looked for: it is torch's own on both sides, and rounds alike.
    """

    ROUNDINGS = 64  # of the sums in front of it; generous

    def __init__(self, examples, eps):
        super().__init__()
        self.near, self.eps = torch.zeros(examples, dtype=torch.bool), eps

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.relu, torch.relu, torch.Tensor.relu) and args[0].dim() <= 3:
            size = args[0].detach().abs()
            near = (size <= self.ROUNDINGS * self.eps * size.max()).view(len(self.near), -1).any(1)
            self.near |= near.cpu()
        return function(*args, **(kwargs or {}))


class SameDropout(TorchFunctionMode):
    """torch's dropout with a mask that depends on seed and shape alone, not on the dtype as on CUDA."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.dropout:
            return function(*args, **kwargs)
        return _dropout(*args, **kwargs)


def _dropout(input, p=0.5, training=True, inplace=False):
    if not training or p == 0.0:
        return input
    keep = torch.empty(input.shape, device=input.device).bernoulli_(1.0 - p)
    return input * keep.to(input.dtype) / (1.0 - p)
