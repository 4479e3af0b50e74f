"""Recipe: handwritten digits, told apart by a small convolutional network."""

from dataclasses import dataclass

from torch import nn

from fastlayers.harness import config, mnist


@dataclass
class Config(mnist.Config):
    epochs: int = 10


def add_arguments(parser):
    mnist.add_arguments(parser, Config)


def make_model(classes):
    """Two 3 x 3 convolutions take 28 x 28 pixels to 24 x 24, which pooling halves: 64 channels of 12 x 12."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def run(args):
    return mnist.run("mnist-cnn", config.read(Config, args), make_model).status
