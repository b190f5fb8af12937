"""Fine-tune a pretrained BERT for one epoch on sentiment, watched: a plain PyTorch loop and two lines of Headscope.

    python examples/sst2.py --data DIR --model NAME_OR_DIR
    headscope serve runs/sst2

DIR holds train.tsv and dev.tsv: on each line a sentence, a tab, and the label (0 negative, 1 positive).
"""

import argparse
import random
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import headscope

Example = tuple[str, int]


def read(path: Path, limit: int | None) -> list[Example]:
    """The sentences of a file with their labels."""
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(sentence, int(label)) for sentence, label in rows][:limit]


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> dict[str, torch.Tensor]:
    """A batch as the model takes it, labels included."""
    sentences, labels = zip(*examples, strict=True)
    batch = tokenizer(list(sentences), padding=True, truncation=True, max_length=64, return_tensors="pt")
    return {**batch, "labels": torch.tensor(labels)}


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], size: int) -> float:
    """The share of examples that the model gets right."""
    by_length = sorted(examples, key=lambda example: len(example[0]))
    right = 0
    model.train(mode=False)
    with torch.no_grad():
        for at in range(0, len(by_length), size):
            batch = encode(tokenizer, by_length[at : at + size])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train()
    return right / len(examples)


def parameter_groups(model: PreTrainedModel) -> list[dict[str, object]]:
    """The pretrained body at a low learning rate, the fresh classifier at a higher one."""
    fresh = [parameter for name, parameter in model.named_parameters() if name.startswith("classifier")]
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("classifier")]
    return [{"params": body, "lr": 1e-4}, {"params": fresh, "lr": 1e-3}]


def main() -> None:
    """Train, watch, and print the accuracy beside the share of the larger class."""
    parser = argparse.ArgumentParser(description="Fine-tune a pretrained BERT on sentiment, watched by Headscope.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--model", required=True, help="a model's name on the hub, or its folder")
    parser.add_argument("--out", default="runs/sst2", help="where the run is written")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="examples in a batch")
    parser.add_argument("--every", type=int, default=20, help="steps between two captures")
    parser.add_argument("--limit", type=int, help="use no more than this many sentences of each file")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    generator = random.Random(0)
    train, dev = (read(arguments.data / name, arguments.limit) for name in ("train.tsv", "dev.tsv"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=2)
    model.config.id2label = {0: "negative", 1: "positive"}

    steps = arguments.epochs * -(-len(train) // arguments.batch)
    optimizer = torch.optim.AdamW(parameter_groups(model), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.1
    )
    started = time.monotonic()
    model.train()
    with headscope.watch(model, arguments.out, probe=dev[:16], tokenizer=tokenizer, every=arguments.every) as watch:
        for _ in range(arguments.epochs):
            generator.shuffle(train)
            for at in range(0, len(train), arguments.batch):
                loss = model(**encode(tokenizer, train[at : at + arguments.batch])).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                watch.log(loss=loss.item(), lr=schedule.get_last_lr()[0])
                schedule.step()
            dev_accuracy = accuracy(model, tokenizer, dev, arguments.batch)
            watch.log(accuracy=dev_accuracy)
    majority = max(Counter(label for _, label in dev).values()) / len(dev)
    print(f"dev accuracy {dev_accuracy:.4f}, majority class {majority:.4f} ({len(dev)} sentences)")
    print(f"{steps} steps in {time.monotonic() - started:.0f} s; to see them: headscope serve {arguments.out}")


if __name__ == "__main__":
    main()
