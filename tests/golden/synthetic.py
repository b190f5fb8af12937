"""Runs made of numbers alone, written with the Writer, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from headscope import attention
from headscope.blob import Image, Json, encode
from headscope.writer import Writer

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Call:
    """An attention call to make up."""

    path: str = "layer.0"
    heads: int = 2
    kv_heads: int = 2
    dim: int = 4
    dtype: Any = np.float32
    scale: float = 0.5
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: bool = False
    bias: bool = False
    sinks: bool = False
    call: int = 0
    error: float | None = None

    @property
    def name(self) -> str:
        return f"{self.path}@{self.call}" if self.call else self.path


def examples(lengths: Sequence[int], longest: int, *, left: bool = False, labels: Sequence[int] | None = None) -> bytes:
    """probe.safetensors of one batch; ids count from 10, special are 1 and 2, padding is 0."""
    ids = np.zeros((len(lengths), longest), np.int64)
    mask = np.zeros(ids.shape, bool)
    for row, length in enumerate(lengths):
        part = slice(longest - length, longest) if left else slice(0, length)
        mask[row, part] = True
        ids[row, part] = [1, *range(10 * (row + 1), 10 * (row + 1) + length - 2), 2][:length]
    tensors: dict[str, Array] = {"0/ids": ids, "0/mask": mask}
    if labels is not None:
        tensors["0/labels"] = np.array(labels, np.int64)
    facts: dict[str, Any] = {
        "tokens": [[[f"t{i}" for i in row] for row in ids.tolist()]],
        "texts": [[f"text {row}" for row in range(len(lengths))]],
        "special": [0, 1, 2],
    }
    return encode(tensors, {name: json.dumps(value) for name, value in facts.items()})


def fill(
    image: Image,
    step: int,
    calls: Sequence[Call],
    *,
    batch: int = 2,
    tokens: int = 6,
    mode: str = "probe",
    keep: Array | None = None,
    seed: int = 0,
) -> list[Json]:
    """Fills an image with made-up calls and gives their facts; `keep` (batch, tokens) is the padding mask."""
    rng = np.random.default_rng([seed, step])
    facts = []
    if keep is not None:
        np.copyto(image.slot(f"{mode}/0/mask.0", np.dtype(bool), (batch, 1, 1, tokens)), keep[:, None, None])
    for call in calls:
        prefix = f"{mode}/0/{call.name}"
        tensors: dict[str, Array] = {}
        for kind, heads in (("q", call.heads), ("k", call.kv_heads), ("v", call.kv_heads)):
            shape = (1 if kind == "v" else batch, heads, tokens, call.dim)
            slot = image.slot(f"{prefix}.{kind}", np.dtype(call.dtype), shape)
            np.copyto(slot, (2 * rng.standard_normal(shape)).astype(call.dtype))
            tensors[kind] = slot
        if call.mask and keep is not None:
            tensors["mask"] = image["probe/0/mask.0"]
        if call.bias:
            tensors["bias"] = image.slot("probe/0/bias.0", np.dtype(np.float32), (1, call.heads, tokens, tokens))
            np.copyto(tensors["bias"], rng.standard_normal(tensors["bias"].shape).astype(np.float32))
        if call.sinks:
            tensors["sinks"] = image.slot(f"{prefix}.sinks", np.dtype(np.float32), (call.heads,))
            np.copyto(tensors["sinks"], np.linspace(-1, 1, call.heads, dtype=np.float32))
        rows = attention.rows_to_check(tokens)
        fact: Json = {"mode": mode, "batch": 0, "path": call.path, "call": call.call, "route": "sdpa", "offset": 0}
        fact |= {name: getattr(call, name) for name in ("heads", "kv_heads", "scale", "causal", "window", "softcap")}
        fact |= {"mask": "mask.0" if "mask" in tensors else None, "bias": "bias.0" if call.bias else None}
        fact |= {"sinks": call.sinks, "dropout": 0.0, "named": True, "kept": None, "dtype": np.dtype(call.dtype).name}
        fact["check"] = {"example": 0, "rows": rows.tolist(), "note": ""}
        output = image.slot(f"{prefix}.output", np.dtype(np.float32), (1, call.heads, len(rows), call.dim))
        terms: dict[str, Any] = {
            name: call_term for name in ("mask", "bias") if (call_term := tensors.get(name)) is not None
        }
        plain = ("scale", "softcap", "causal", "offset", "window")
        attended = attention.weights(
            tensors["q"][:1].astype(np.float32),
            tensors["k"][:1].astype(np.float32),
            sinks=tensors.get("sinks"),
            rows=rows,
            **{name: term[:1] for name, term in terms.items()} | {name: fact[name] for name in plain},
        )
        np.copyto(output, attended @ tensors["v"].astype(np.float32).repeat(call.heads // call.kv_heads, axis=1))
        error = attention.self_check(fact, {**tensors, "output": output}) if call.error is None else call.error
        fact["check"] |= {"error": error, "limit": attention.LIMIT_16_BITS}
        facts.append(fact)
    return facts


def put(writer: Writer, step: int, calls: Sequence[Call] = (Call(),), **shape: Any) -> None:
    """Submits one step; `outputs` (kind to array) go beside the calls."""
    outputs: dict[str, Array] = shape.pop("outputs", {})
    assert writer.ready()
    image = writer.image()
    facts = fill(image, step, calls, **shape)
    for kind, array in outputs.items():
        np.copyto(image.slot(f"probe/0/{kind}", array.dtype, array.shape), array)
    fixed = [{name: value for name, value in fact.items() if name != "check"} for fact in facts]
    writer.submit(step, image, lambda metadata: ({**metadata, "forwards": {"train": step}, "calls": facts}, fixed))


def write(
    path: str | Path,
    steps: Sequence[int] = (0, 10, 20),
    calls: Sequence[Call] = (Call(),),
    *,
    probe: bytes | None = None,
    close: bool = True,
    facts: Json | None = None,
    **shape: Any,
) -> Writer:
    """One attempt with these steps; nothing may go wrong."""
    said: list[str] = []
    writer = Writer(path, facts or {"model": "made up", "labels": None}, said.append)
    writer.put_probe(examples([6, 4], 6) if probe is None else probe)
    for step in steps:
        put(writer, step, calls, **shape)
    if close:
        writer.close()
        assert not said
    return writer
