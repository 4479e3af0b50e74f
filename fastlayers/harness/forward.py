"""What training, evaluation and the agreement check all do with a model: from a batch to logits and losses.

A batch is a dict of the model's inputs and "labels".
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F


def logits_of(model, batch, dtype):
    """(batch, classes), in the dtype of the parameters; `dtype` is that of the arithmetic in between."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with mixed_precision(batch["labels"].device, dtype):
        return model(**inputs).logits.to(next(model.parameters()).dtype)


def example_losses(model, batch, dtype):
    """Cross-entropy of each example, (batch,)."""
    return F.cross_entropy(logits_of(model, batch, dtype), batch["labels"], reduction="none")


def mixed_precision(device, dtype):
    """Autocast to a 16-bit dtype over float32 parameters; nothing for float32 and float64."""
    return torch.autocast(device.type, dtype) if dtype.itemsize == 2 else nullcontext()
