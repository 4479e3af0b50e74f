"""The training loop that every recipe runs, for one model or for two models side by side."""

import time
from dataclasses import dataclass, field

import torch

from fastlayers.harness.check import check_step
from fastlayers.harness.forward import example_losses, logits_of


@dataclass
class Run:
    """One model in training. Two of them in one loop see the same batches under the same seeds."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    losses: list[float] = field(default_factory=list)  # mean cross-entropy of each step's batch
    seconds: list[float] = field(default_factory=list)  # forward, backward and optimizer of each step


def train(runs, batches, config, agreement, progress):
    """Train each run on each batch {"labels": ..., **model inputs}.

    Two runs alternate step by step, and which goes first alternates too, so that whatever else the machine does falls
    on both alike. With an `agreement`, the first config.check_steps steps are checked, outside the time measured.
    """
    task = progress.add_task("training", total=len(batches))
    for step, batch in enumerate(batches):
        seed = step_seed(config.seed, step)
        if agreement is not None and step < config.check_steps:
            progress.update(task, description=f"checking step {step + 1}")
            check_step(agreement, *(run.model for run in runs), batch, config.torch_dtype, seed, step)
        for run in runs if step % 2 == 0 else reversed(runs):
            torch.manual_seed(seed)
            start = _now(batch["labels"].device)
            loss = train_step(run, batch, config.torch_dtype)
            run.seconds.append(_now(batch["labels"].device) - start)
            run.losses.append(loss.item())
        losses = " / ".join(f"{run.losses[-1]:.3f}" for run in runs)
        progress.update(task, advance=1, description=f"training, loss {losses}")


def train_step(run, batch, dtype):
    """Forward, backward and optimizer; returns the mean loss."""
    loss = example_losses(run.model, batch, dtype).mean()
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def predict(run, batches, config, progress):
    """The most probable class of every example of the batches, in their order."""
    task = progress.add_task(f"evaluating {run.name}", total=len(batches))
    run.model.eval()
    predictions = []
    for batch in batches:
        predictions += logits_of(run.model, batch, config.torch_dtype).argmax(-1).tolist()
        progress.advance(task)
    return predictions


def step_seed(seed, step):
    """Dropout draws of a step depend on the run's seed and the step alone, not on what was drawn before."""
    return seed * 1_000_003 + step


def _now(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
