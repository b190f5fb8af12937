"""A process that trains a tiny BERT under watch, a capture at every step, until a file tells it to stop."""

import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import headscope

VOCABULARY = 40


def main(out: str, stop: str, pause_s: float) -> None:
    """Trains until `stop` exists; at most 400 steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    with headscope.watch(model, out, every=1) as watch:
        for _ in range(400):
            ids = torch.randint(5, VOCABULARY, (8, 12), generator=generator)
            mask = torch.ones_like(ids)
            mask[1::2, 9:] = 0
            loss = model(input_ids=ids, attention_mask=mask, labels=(ids[:, 1] > 20).long()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.log(loss=loss)
            if Path(stop).exists():
                return
            time.sleep(pause_s)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
