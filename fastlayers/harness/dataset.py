"""What every recipe trains on: examples as tensors, held-out ones beside them, and where they come from."""

from collections import Counter
from dataclasses import dataclass, field

import torch

TEST_SHARE = 5  # one example in five is held out for the evaluation


@dataclass
class Dataset:
    source: str
    train: dict[str, torch.Tensor]  # model input or "labels" -> (examples, ...), as forward.py takes them
    test: dict[str, torch.Tensor]
    classes: list[str] = field(default_factory=list)  # none for language models
    sizes: dict[str, int] = field(default_factory=dict)  # class -> examples in train and test together
    bad_rows: list[str] = field(default_factory=list)  # what was left out, and why: "line 7: empty text"


def class_sizes(labels, classes):
    """{class: number of examples}; labels: an index into classes each, or a tuple of them."""
    counts = Counter(one for label in labels for one in (label if isinstance(label, tuple) else (label,)))
    return {name: counts[number] for number, name in enumerate(classes)}
