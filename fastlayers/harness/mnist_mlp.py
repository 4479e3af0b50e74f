"""Recipe: handwritten digits, told apart by a perceptron with two hidden layers."""

from dataclasses import dataclass

from torch import nn

from fastlayers.harness import config, mnist


@dataclass
class Config(mnist.Config):
    epochs: int = 5


def add_arguments(parser):
    mnist.add_arguments(parser, Config)


def make_model(classes):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28, 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, classes),
    )


def run(args):
    return mnist.run("mnist-mlp", config.read(Config, args), make_model).status
