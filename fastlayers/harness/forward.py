"""What training, evaluation and the agreement check all do with a model: from a batch to logits and losses.

A batch is a dict of the model's inputs and "labels". The labels say which loss is meant:
    (batch,) integers         one class each: cross-entropy
    (batch, length) integers  the next token at each place: cross-entropy, mean over the places
    (batch, labels) floats    0 or 1 each: binary cross-entropy with logits, mean over the labels
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F


def logits_of(model, batch, dtype):
    """(batch, ..., classes), in the dtype of the parameters; `dtype` is that of the arithmetic in between."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    parameter = next(model.parameters()).dtype
    if parameter == torch.float64:
        inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    with mixed_precision(batch["labels"].device, dtype):
        out = model(**inputs)
    return getattr(out, "logits", out).to(parameter)


def example_losses(model, batch, dtype):
    """The loss of each example, (batch,)."""
    return losses_of(logits_of(model, batch, dtype), batch["labels"])


def losses_of(logits, labels):
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(-1)


def mixed_precision(device, dtype):
    """Autocast to a 16-bit dtype over float32 parameters; nothing for float32 and float64."""
    return torch.autocast(device.type, dtype) if dtype.itemsize == 2 else nullcontext()
