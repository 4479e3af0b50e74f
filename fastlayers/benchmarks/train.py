"""The main job: one training step of a BERT of 22.7 M parameters on real text, plain PyTorch beside fastlayers."""

import copy
from itertools import cycle

import torch

import fastlayers
from fastlayers.agreement import Deviation
from fastlayers.benchmarks.runner import OURS, Candidate, Case

EAGER = "PyTorch eager (sdpa) + AdamW"
CHECKED_EXAMPLES = 2  # of the first batch; the float64 copy that judges them is slow


def _candidates(seq_len, batch_size):
    """Both models from the same weights, on the same batches, each with its own optimizer, dropout on."""
    from fastlayers.harness import check, loop
    from fastlayers.harness import text_classification as recipe

    batches_in_turn, lr = 4, 3e-4
    config = recipe.settle(recipe.Config(seq_len=seq_len, batch_size=batch_size, lr=lr))
    texts = recipe.read_texts(config)
    model, tokenizer = recipe.pretrained(config, texts)
    train_set = recipe.encode(tokenizer, texts.train, seq_len, model.config.num_labels)
    chosen = [loop.batch_indices(len(texts.train), config, step) for step in range(batches_in_turn)]
    batches = [loop.select(train_set, indices, torch.device("cpu")) for indices in chosen]
    swapped = copy.deepcopy(model)
    fastlayers.swap_(swapped)

    def candidate(name, model, check=None):
        # The first steps of a very long warm-up: the learning rate is nearly zero and the weights stay what they are.
        run = loop.start(name, model, config, steps=10**9)
        turn = cycle(batches)
        return Candidate(step=lambda: loop.train_step(run, next(turn), config), check=check)

    def agree():
        """Loss and every gradient: beside PyTorch without dropout, beside the reference backend with it."""
        agreement = check.Agreement()
        few = {name: tensor[:CHECKED_EXAMPLES] for name, tensor in batches[0].items()}
        check.check_step(agreement, model, swapped, few, config.torch_dtype, seed=0, step=0)
        return Deviation(agreement.worst_deviation, "; ".join(agreement.problems[:3]) or None)

    return {
        OURS: candidate("fastlayers", swapped, agree),
        EAGER: candidate("pytorch", model),
    }


def _case(seq_len, batch_size, wanted):
    return Case(
        suite="train",
        name=f"main job, one step, float32, dropout 0.1, seq {seq_len}, batch {batch_size}",
        candidates=lambda: _candidates(seq_len, batch_size),
        targets={EAGER: wanted},
    )


CASES = [_case(128, 16, wanted=1.5), _case(512, 8, wanted=2.5)]
