"""Recipe: a wide two-layer perceptron that learns to tell two clouds of points apart."""

from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import nn

from fastlayers.harness import checkpoint, config, session
from fastlayers.harness.dataset import Dataset, class_sizes

FEATURES, CLASSES = 1000, ["left", "right"]


@dataclass
class Config(config.Config):
    optimizer: str = "sgd"
    lr: float = 0.05
    epochs: int = 3
    examples: int = 4096
    hidden: int = 10_000


OPTIONS = {
    "examples": (config.at_least(10), "N", "points that are drawn, one in five of them to test on"),
    "hidden": (config.at_least(1), "N", "units of the hidden layer"),
}


def add_arguments(parser):
    config.add_arguments(parser, Config, OPTIONS)


def make_data(count, seed):
    """Two normal clouds around opposite centres; a plane between them separates nearly all points."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(FEATURES, generator=generator) * 2.0 / FEATURES**0.5
    labels = torch.randint(2, (count,), generator=generator)
    points = torch.randn(count, FEATURES, generator=generator) + (2 * labels[:, None] - 1) * centre
    examples = {"input": points, "labels": labels}
    train, test = ({name: tensor[part] for name, tensor in examples.items()} for part in _parts(count))
    return Dataset("two clouds, drawn at random", train, test, CLASSES, class_sizes(labels.tolist(), CLASSES))


def _parts(count):
    return slice(count // 5, count), slice(count // 5)


def make_model(hidden, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, len(CLASSES)))


def save(model, state, folder):
    folder.mkdir(exist_ok=True)
    save_file(checkpoint.unshared(state), folder / "model.safetensors")


def run(args):
    chosen = config.read(Config, args)
    data = make_data(chosen.examples, chosen.seed)
    model = make_model(chosen.hidden, chosen.seed)
    job = session.Job("mlp", model, data, save, lambda index: data.test["input"][index].view(25, 40).numpy())
    return session.run(job, chosen).status
