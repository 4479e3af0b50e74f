"""One model in training: how it starts, a step of it, and its evaluation."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

import fastlayers
from fastlayers.harness import distributed
from fastlayers.harness.forward import example_losses, logits_of, losses_of

EVALUATION_BATCH = 64


@dataclass
class Run:
    """A model, what trains it, and what was seen of it. Two in one loop see the same batches under the same seeds."""

    name: str  # "pytorch" or "fastlayers"
    model: torch.nn.Module
    forward: torch.nn.Module  # the model, or what distributes its batches over processes
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    losses: list[float] = field(default_factory=list)  # mean over the examples of each step
    seconds: list[float] = field(default_factory=list)  # forward, backward and optimizer of each step
    evaluations: list[dict] = field(default_factory=list)  # {"step", metric: value}
    best: dict | None = None  # state_dict of the best evaluation, where early stopping will want it
    logits: torch.Tensor | None = None  # of the test set, at the last evaluation

    @property
    def final(self):
        """The evaluation of the model that is kept."""
        if self.best is None:
            return self.evaluations[-1]
        return min(self.evaluations, key=lambda found: found["test_loss"])


def start(name, model, config, steps):
    """A run at its first step. On fastlayers, Adam is fused, and clips by itself."""
    training_mode(model)
    forward = distributed.wrap(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(name, trained, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(config, step, steps))
    scaler = torch.amp.GradScaler(trained[0].device.type, enabled=config.dtype == "float16")
    return Run(name, model, forward, optimizer, scheduler, scaler)


def training_mode(model):
    """Dropout on, but not in modules that are frozen as a whole."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def make_optimizer(name, parameters, config):
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, **options)
    if name == "pytorch":
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](parameters, **options)
    fused = {"adam": fastlayers.optim.FusedAdam, "adamw": fastlayers.optim.FusedAdamW}[config.optimizer]
    return fused(parameters, **options, max_grad_norm=config.clip)


def schedule(config, step, steps):
    """The share of the highest learning rate that a step takes: linear warm-up, then the schedule's shape."""
    warmup = max(1, round(config.warmup * steps)) if config.warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return shapes[config.schedule]


def step_seed(seed, step):
    """Dropout and augmentation of a step depend on the run's seed and the step alone, not on what was drawn before."""
    return seed * 1_000_003 + step


def batch_indices(count, config, step):
    """Which of `count` examples a step sees: each epoch in its own order, without the rest that fills no batch; of
    these, the share of this process."""
    per_epoch = count // config.batch_size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(step_seed(config.seed, epoch)))
    return distributed.share(order[place * config.batch_size : (place + 1) * config.batch_size])


def select(examples, indices, device):
    return {name: tensor[indices].to(device) for name, tensor in examples.items()}


def train_step(run, batch, config):
    """Forward, backward and optimizer, in config.accumulate parts; returns the mean loss of the examples."""
    count, total = len(batch["labels"]), 0.0
    parts = list(zip(*(tensor.chunk(config.accumulate) for tensor in batch.values())))
    for number, part in enumerate(parts, start=1):
        last = number == len(parts)
        with nullcontext() if last else distributed.no_sync(run.forward):
            loss = example_losses(run.forward, dict(zip(batch, part)), config.torch_dtype).sum() / count
            total = total + loss.detach()
            run.scaler.scale(loss + penalty(run.model, config) if last else loss).backward()
    if config.clip and not getattr(run.optimizer, "max_grad_norm", None):
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return distributed.mean(total)


def penalty(model, config):
    """L1 and L2 regularisation: of the weights, not of biases and normalisations."""
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1] if config.l1 or config.l2 else []
    return sum((config.l1 * p.abs().sum() + config.l2 * p.square().sum() for p in weights), 0.0)


def timed_step(run, batch, config, seed):
    torch.manual_seed(seed)
    begin = _now(batch["labels"].device)
    loss = train_step(run, batch, config)
    run.seconds.append(_now(batch["labels"].device) - begin)
    run.losses.append(loss.item())


@torch.no_grad()
def predict(model, examples, config, device):
    """mean loss, logits (examples, classes) in the order of the examples; no logits of language models."""
    model.eval()
    order = evaluation_order(examples)
    losses, logits = torch.empty(len(order)), None
    for indices in order.split(EVALUATION_BATCH):
        batch = trimmed(select(examples, indices, device))
        found = logits_of(model, batch, config.torch_dtype).float()
        losses[indices] = losses_of(found, batch["labels"]).cpu()
        if found.dim() == 2:
            logits = found.new_empty(len(order), found.shape[1], device="cpu") if logits is None else logits
            logits[indices] = found.cpu()
    training_mode(model)
    return losses.mean().item(), logits


def evaluation_order(examples):
    """By length where there is padding, so that batches can be cut."""
    if "attention_mask" in examples:
        return examples["attention_mask"].sum(1).argsort(stable=True)
    return torch.arange(len(examples["labels"]))


def trimmed(batch):
    """Padded text cut to the longest of the batch, which changes no prediction."""
    if "attention_mask" not in batch:
        return batch
    longest = batch["attention_mask"].sum(1).max()
    return {n: t[:, :longest] if n != "labels" and t.dim() > 1 else t for n, t in batch.items()}


def _now(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
