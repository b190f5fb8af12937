"""Small runs for tests, written by the real writer without a model: the numbers are seeded noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headscope.blob import encode
from headscope.boundary import Call
from headscope.record import Keeping, Record
from headscope.writer import Writer

TOKENS = ["[CLS]", "a", "dull", "##ish", "film", "[SEP]", "[PAD]", "[PAD]"]


def writer(path: Path, **facts: Any) -> Writer:
    """A writer whose problems are errors."""

    def say(message: str) -> None:
        raise AssertionError(message)

    return Writer(path, {"model": "Noise", "labels": ["negative", "positive"], **facts}, say)


def put_probe(run: Writer, *, examples: int = 2, tokens: int = 8) -> None:
    """Examples that all read alike; the last two tokens are padding."""
    names = (TOKENS if tokens == 8 else [f"t{i}" for i in range(tokens)])[:tokens]
    mask = np.ones((examples, tokens), bool)
    mask[:, tokens - 2 :] = False
    tensors = {"0/ids": np.tile(np.arange(tokens), (examples, 1)), "0/mask": mask}
    tensors["0/labels"] = np.arange(examples) % 2
    facts = {"tokens": [[names] * examples], "texts": [["a dullish film"] * examples], "special": [0, 5]}
    run.put_probe(encode(tensors, {name: json.dumps(value) for name, value in facts.items()}))


def put_step(
    run: Writer,
    step: int,
    *,
    layers: int = 2,
    heads: int = 4,
    tokens: int = 8,
    break_layer: int = -1,
    keeping: Keeping | None = None,
) -> None:
    """A step whose outputs are what attention gives for its q, k, v; but for one layer, if asked."""
    generator = torch.Generator().manual_seed(step)
    record = Record(run.image(), kept=torch.float32, exact=set(), turn=0, keeping=keeping)
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    mask[..., tokens - 2 :] = False
    for layer in range(layers):
        q, k, v = (torch.randn(2, heads, tokens, 8, generator=generator) * 2 for _ in range(3))
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if layer == break_layer:
            output = output + 1
        call = Call(f"layer.{layer}", 0, "sdpa", q, k, v, output, scale=8**-0.5, mask=mask)
        record.add(call, mode="probe", batch=0)
    logits = np.array([[1.0, step / 10], [0.0, 1.0]], np.float32)
    record.add_output(mode="probe", batch=0, logits=logits, predictions=logits.argmax(-1).astype(np.int32), loss=0.5)
    assert run.ready()
    run.submit(step, record.image, lambda metadata: record.finish({**metadata, "forwards": {"train": step}}))


def make(path: Path, steps: list[int], **options: Any) -> Path:
    """A run that has ended."""
    run = writer(path)
    put_probe(run, tokens=options.get("tokens", 8))
    for step in steps:
        put_step(run, step, **options)
        run.log(step, {"loss": 1 / (1 + step)})
    run.close()
    return path
