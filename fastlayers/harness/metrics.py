"""What an evaluation says: from labels and logits to numbers, as scikit-learn defines them."""

import math

import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score


def evaluation(loss, logits, labels):
    """{metric: value} of a test set; of a language model (logits None) the loss and the perplexity per token.

    labels: (N,) integers, or (N, L) of 0 and 1, where L 1 means two classes and more means several labels at once
    """
    if logits is None:
        return {"test_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    truth, predicted, probabilities = predictions(logits, labels)
    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0.0)
    found = {"test_loss": loss, "accuracy": accuracy_score(truth, predicted)}
    return found | {"precision": precision, "recall": recall, "macro_f1": f1, "auc": auc(truth, probabilities)}


def predictions(logits, labels):
    """truth, predicted, probabilities (N, classes), as numpy arrays; truth and predicted are (N,), or (N, L) of 0 and 1
    where several labels hold at once."""
    if not labels.is_floating_point():
        return labels.numpy(), logits.argmax(-1).numpy(), logits.double().softmax(-1).numpy()
    probabilities = logits.double().sigmoid()
    if labels.shape[1] > 1:
        return labels.long().numpy(), (logits > 0).long().numpy(), probabilities.numpy()
    both = torch.cat([1.0 - probabilities, probabilities], 1)
    return labels[:, 0].long().numpy(), (logits[:, 0] > 0).long().numpy(), both.numpy()


def auc(truth, probabilities):
    """Area under the ROC curve, mean over the classes, each against the rest; None where a class has no example or
    nothing else."""
    held = truth if truth.ndim == 2 else (truth[:, None] == range(probabilities.shape[1])).astype(int)
    if held.min(0).any() or not held.max(0).all():
        return None
    return float(roc_auc_score(held, probabilities, average="macro"))
