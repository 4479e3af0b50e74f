"""Recipe: a small GPT, trained from scratch on text, byte by byte; it writes a sample of its own at the end."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import fastlayers
from fastlayers.harness import UserError, config, distributed, session
from fastlayers.harness.data import is_held_out
from fastlayers.harness.dataset import Dataset
from fastlayers.harness.mlp import save

BYTES = 256  # the vocabulary
STDLIB_BYTES = 4_000_000  # of the standard library's source; enough for thousands of steps


@dataclass
class Config(config.Config):
    batch_size: int = 16
    epochs: int | None = None
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float | None = 1.0
    data: str | None = None
    seq_len: int = 256
    layers: int = 6
    width: int = 192
    heads: int = 6
    dropout: float = 0.1
    sample: int = 400
    prompt: str = "def "


STEPS = 300  # where neither --steps nor --epochs says how many

OPTIONS = {
    "epochs": (config.at_least(1), "N", f"passes over the text (default: {STEPS} steps)"),
    "data": (str, "FILE", "text to learn from (default: the source of Python's standard library)"),
    "seq_len": (config.at_least(2), "N", "bytes that the model sees at once"),
    "layers": (config.at_least(1), "N", "transformer layers"),
    "width": (config.at_least(1), "N", "numbers that stand for each byte"),
    "heads": (config.at_least(1), "N", "attention heads"),
    "dropout": (config.share, "X", "share of activations that are dropped in training"),
    "sample": (config.at_least(0), "N", "bytes that the trained model writes"),
    "prompt": (str, "TEXT", "what the sample begins with"),
}


def add_arguments(parser):
    config.add_arguments(parser, Config, OPTIONS)


class GPT(nn.Module):
    """Decoder-only transformer (Radford et al. 2019), normalised before each block, with learned positions."""

    def __init__(self, seq_len, layers, width, heads, dropout):
        super().__init__()
        self.tokens = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(seq_len, width)
        options = {"dropout": dropout, "activation": "gelu", "batch_first": True, "norm_first": True}
        blocks = (nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, input):
        """input: (batch, length) bytes; returns (batch, length, BYTES) logits of the byte behind each."""
        length = input.shape[1]
        x = self.tokens(input) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


@torch.no_grad()
def write(model, prompt, count, temperature=0.8, seed=0):
    """`count` bytes behind the prompt, drawn one after the other from the model's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    text = torch.tensor([list(prompt)], device=parameter.device)
    model.eval()
    for _ in range(count):
        logits = model(text[:, -model.positions.num_embeddings :])[0, -1].float().cpu()
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        text = torch.cat([text, drawn[None].to(text.device)], 1)
    return bytes(text[0].tolist())


def read_text(path, seq_len):
    """Windows of seq_len + 1 bytes: a tenth of them, or of the standard library's files a fifth, is held out."""
    if path is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        parts = ([], [])
        for file in files:
            parts[is_held_out(file.name)].append(file.read_bytes())
        source, texts = "source of the Python standard library", [b"".join(part)[:STDLIB_BYTES] for part in parts]
    else:
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"--data {path}: {error.strerror}") from error
        source, texts = str(path), [text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]]
    train, test = (windows(text, seq_len) for text in texts)
    if not (len(train["labels"]) and len(test["labels"])):
        raise UserError(f"--data {path}: wanted at least {10 * (seq_len + 2)} bytes for --seq-len {seq_len}")
    return Dataset(source, train, {name: tensor[:64] for name, tensor in test.items()})


def windows(text, seq_len):
    """{"input": (windows, seq_len), "labels": the same one byte on}"""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.empty(0, dtype=torch.long)
    count = max(0, (len(tokens) - 1) // seq_len)
    inputs, labels = (tokens[start : start + count * seq_len].view(count, seq_len) for start in (0, 1))
    return {"input": inputs, "labels": labels}


def run(args):
    chosen = config.read(Config, args)
    if chosen.width % chosen.heads:
        raise UserError(f"--width {chosen.width} is not a multiple of --heads {chosen.heads}")
    if chosen.epochs is None:
        chosen.steps = chosen.steps or STEPS
    data = read_text(chosen.data, chosen.seq_len)
    torch.manual_seed(chosen.seed)
    sizes = chosen.seq_len, chosen.layers, chosen.width, chosen.heads, chosen.dropout
    result = session.run(session.Job("gpt", GPT(*sizes), data, save), chosen)
    if distributed.is_first() and chosen.sample:
        trained = GPT(*sizes)
        trained.load_state_dict(load_file(result.folder / "model" / "model.safetensors"))
        fastlayers.swap_(trained)
        text = write(trained, chosen.prompt.encode() or b"\n", chosen.sample, seed=chosen.seed)
        (result.folder / "sample.txt").write_bytes(text)
        print(text.decode("utf-8", "replace"))
    return result.status
