"""Fine-tune a BERT with Hugging Face's Trainer on fastlayers: the model is swapped and the optimizer passed in, and
that is all that changes.

    python examples/huggingface_trainer.py [steps]
"""

import sys
import tempfile

from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

import fastlayers
from fastlayers.harness import text_classification as recipe


class Examples:
    """What Trainer takes for a dataset: one {input: tensor} after the other."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors["labels"])

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def main(steps=84, folder=None):
    config = recipe.settle(recipe.Config())
    texts = recipe.read_texts(config)
    model, tokenizer = recipe.pretrained(config, texts)
    train, test = (
        Examples(recipe.encode(tokenizer, part, config.seq_len, len(texts.labels)))
        for part in (texts.train, texts.test)
    )

    print(fastlayers.swap_(model))
    optimizer = fastlayers.optim.FusedAdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)

    arguments = TrainingArguments(
        output_dir=folder or tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        max_grad_norm=0.0,  # FusedAdamW(max_grad_norm=...) clips without a pass of its own
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test, optimizers=(optimizer, scheduler))
    trainer.train()
    found = trainer.evaluate()
    print(f"loss on held-out texts: {found['eval_loss']:.3f}")
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
