"""Writes the golden replies that Python and TypeScript both are tested against: `python tests/golden/make.py`.

All that could differ from machine to machine is taken out: the folder's name, ages, and the last digits of floats.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.synthetic import Call, examples, put, write
from headscope import open_trial
from headscope.answer import answer
from headscope.blob import Json, decode, encode

HERE = Path(__file__).parent
CALLS = [
    Call("bert.layer.0.self", heads=3, kv_heads=3, mask=True),
    Call("bert.layer.1.self", heads=4, kv_heads=2, dtype=np.float16, causal=True, mask=True, sinks=True),
    Call("bert.layer.2.self", heads=2, kv_heads=2, mask=True, error=0.5),
]
KEEP = np.array([[True] * 6, [False] * 2 + [True] * 4])
LINES = {"ask": "lines", "step": 10, "example": 0, "first": 0, "count": 6, "top": 3}
QUESTIONS: dict[str, Json] = {
    "trial": {"ask": "trial"},
    "step": {"ask": "step", "step": 10},
    "lines": {**LINES, "layer": 0, "heads": [0, 1, 2]},
    "lines_window": {**LINES, "layer": 1, "example": 1, "heads": [3, 1], "first": 1, "count": 2, "top": 9},
    "lines_withheld": {**LINES, "layer": 2, "heads": [0, 1]},
    "first_look": {"ask": "first_look", "step": 10},
}


def run(path: Path) -> None:
    """A small finished run: three layers (the last fails its check), two examples, the second padded on the left."""
    probe = examples([6, 4], 6, labels=[1, -100])
    writer = write(path, [], probe=probe, close=False, facts={"model": "Golden", "labels": ["negative", "positive"]})
    for step in (0, 10):
        logits = np.array([[0.5, 1 + step / 10], [1, -1]], np.float32)
        outputs = {"logits": logits, "predictions": logits.argmax(1).astype(np.int32)}
        outputs["loss"] = np.array(0.5 - step / 40, np.float32)
        put(writer, step, CALLS, keep=KEEP, outputs=outputs)
    for step in range(1, 11):
        writer.log(step, {"loss": 1 / step} | ({"lr": 0.001} if step % 5 == 0 else {}))
    writer.close("ended", "ünïcode: done")


def fixed(reply: bytes) -> bytes:
    """The reply without what differs from run to run."""
    tensors, header = decode(reply)
    facts = json.loads(header.metadata["facts"])
    if "state" in facts:
        facts["name"], facts["run"], facts["state"]["age_s"] = "runs/golden", "golden", 0.5
    for key, tensor in tensors.items():
        if tensor.dtype == np.float32:
            tensors[key] = np.round(tensor * 65536) / np.float32(65536)
    return encode(tensors, {"facts": json.dumps(_rounded(facts))})


def _rounded(facts: Any) -> Any:
    if isinstance(facts, float):
        # A self-check's error is rounding noise, and no two machines have the same.
        return float(f"{facts:.4g}") if facts == 0 or abs(facts) > 1e-5 else 1e-6
    if isinstance(facts, list):
        return [_rounded(value) for value in facts]
    if isinstance(facts, dict):
        return {name: _rounded(value) for name, value in facts.items()}
    return facts


def files() -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every golden file."""
    yield "questions.json", (json.dumps(QUESTIONS, indent=1) + "\n").encode()
    with tempfile.TemporaryDirectory() as folder:
        yield "waiting.safetensors", fixed(answer(open_trial(Path(folder) / "none"), {"ask": "trial"}))
        run(Path(folder) / "run")
        trial = open_trial(Path(folder) / "run")
        for name, question in QUESTIONS.items():
            yield f"{name}.safetensors", fixed(answer(trial, question))


if __name__ == "__main__":
    for name, blob in files():
        (HERE / name).write_bytes(blob)
        print(f"{name}: {len(blob)} bytes")
