"""The options that every recipe has, their meaning on the command line, and what values they take."""

import argparse
from dataclasses import MISSING, dataclass, fields

import torch

from fastlayers.harness import UserError


@dataclass
class Config:
    """What decides a training run. Recipes subclass it: they add options and change defaults."""

    compare: bool = False
    dtype: str = "float32"
    batch_size: int = 64
    accumulate: int = 1
    epochs: int = 1
    steps: int | None = None
    optimizer: str = "adamw"
    lr: float = 1e-3
    schedule: str = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    clip: float | None = None
    patience: int | None = None
    seed: int = 0
    deterministic: bool = False
    check_steps: int = 3
    parallel: str = "ddp"
    threads: int | None = None
    tensorboard: bool = False
    checkpoint_every: int | None = None
    resume: bool = False
    out: str | None = None

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)


def at_least(least):
    def integer(text):
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"wanted an integer of at least {least}, got {text!r}")
        return int(text)

    return integer


def _number(text):
    try:
        return float(text)
    except ValueError:
        return float("nan")


def positive(text):
    value = _number(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a positive number, got {text!r}")
    return value


def not_negative(text):
    value = _number(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a number of at least 0, got {text!r}")
    return value


def share(text):
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text!r}")
    return value


def one_of(*names):
    return {"choices": names}


YES_OR_NO = {"action": argparse.BooleanOptionalAction}

OPTIONS = {  # field of Config -> how its argument is read, or {"choices": ...}; metavar; help
    "compare": (None, None, "train the unmodified PyTorch model beside it and prove that both agree"),
    "check_steps": (at_least(0), "N", "steps that --compare checks"),
    "dtype": (one_of("float32", "bfloat16", "float16"), None, "of the arithmetic; parameters stay float32"),
    "batch_size": (at_least(1), "N", "examples a step, over all processes"),
    "accumulate": (at_least(1), "N", "parts that each batch is computed in, one after the other, to save memory"),
    "epochs": (at_least(1), "N", "passes over the training examples"),
    "steps": (at_least(1), "N", "optimizer steps, in place of --epochs"),
    "optimizer": (one_of("adamw", "adam", "sgd"), None, "adamw and adam are fused on fastlayers"),
    "lr": (positive, "X", "highest learning rate"),
    "schedule": (one_of("constant", "linear", "cosine"), None, "of the learning rate after the warm-up"),
    "warmup": (share, "X", "share of the steps in which the learning rate rises"),
    "weight_decay": (not_negative, "X", "decoupled from the gradient for adamw, else added to it"),
    "l1": (not_negative, "X", "adds X times the sum of all |weights| to the loss"),
    "l2": (not_negative, "X", "adds X times the sum of all squared weights to the loss"),
    "clip": (positive, "X", "largest norm of all gradients together"),
    "patience": (at_least(1), "N", "stop after N evaluations without a better one"),
    "seed": (at_least(0), "N", "of new weights, the order of examples and dropout"),
    "deterministic": (None, None, "the same bits on every run on one machine"),
    "parallel": (one_of("ddp", "fsdp"), None, "what torchrun's processes hold: whole models or shards"),
    "threads": (at_least(1), "N", "CPU threads"),
    "tensorboard": (None, None, "write events for TensorBoard, too"),
    "checkpoint_every": (at_least(1), "N", "steps between two checkpoints (default: one each epoch)"),
    "resume": (None, None, "go on from the newest whole checkpoint in the folder --out"),
    "out": (str, "FOLDER", "where the results go (default: a new folder under runs/)"),
}
HARMLESS = ("resume", "out", "check_steps", "tensorboard", "checkpoint_every", "threads", "parallel")


def add_arguments(parser, kind, options=None):
    """One argument for each field of the dataclass `kind`; `options` describes those that Config lacks."""
    described = OPTIONS | (options or {})
    for field in fields(kind):
        reader, metavar, text = described[field.name]
        default = None if field.default is MISSING else field.default
        flag = "--" + field.name.replace("_", "-")
        if reader is None:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        shown = f" (default: {default})" if default is not None else ""
        read_as = reader if isinstance(reader, dict) else {"type": reader}
        read_as |= {"metavar": metavar} if metavar else {}
        parser.add_argument(flag, default=default, help=text + shown, **read_as)


def read(kind, args):
    """The Config that the parsed arguments describe."""
    config = kind(**{field.name: getattr(args, field.name) for field in fields(kind)})
    if config.batch_size < config.accumulate:
        raise UserError(f"--accumulate {config.accumulate}: a batch has only {config.batch_size} examples")
    if config.resume and config.out is None:
        raise UserError("--resume needs --out FOLDER, the folder of the run that was interrupted")
    return config
