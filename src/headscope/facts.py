"""What a run says of itself: attention calls and their self-checks, examples, the trainer's state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blob import Array, Entry, Header, Json
from .errors import StoreError


@dataclass(frozen=True)
class Check:
    """The self-check of one attention call: weights · v against the kernel's own output.

    `error` is relative, of the worst head; None where none could be made, and `note` says why.
    """

    example: int | None = None
    rows: tuple[int, ...] = ()
    error: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """False only if the check was made and failed."""
        return self.error is None or self.limit is None or self.error <= self.limit


@dataclass(frozen=True)
class Layer:
    """One attention call of a forward pass: all that entered its softmax but q and k themselves.

    `docs/format.md` explains the fields.
    """

    path: str
    call: int
    mode: str
    batch: int
    route: str
    heads: int
    kv_heads: int
    scale: float
    causal: bool
    offset: int
    window: int | None
    softcap: float | None
    mask: str | None
    bias: str | None
    sinks: bool
    dropout: float
    dtype: str
    kept: tuple[int, ...] | None
    named: bool
    check: Check = field(default_factory=Check)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The heads that are in the file, by their numbers in the model."""
        return tuple(range(self.heads)) if self.kept is None else self.kept

    @property
    def name(self) -> str:
        """The module path; with `@n` for the module's n-th further call."""
        return f"{self.path}@{self.call}" if self.call else self.path

    def key(self, kind: str) -> str:
        """The key of this call's tensor of that kind."""
        return f"{self.mode}/{self.batch}/{self.name}.{kind}"

    @classmethod
    def of(cls, raw: Json, source: str) -> Layer:
        """A layer from a step file's metadata, checked.

        Raises:
            StoreError: a field is missing or of the wrong kind.
        """
        try:
            check = raw["check"] if raw.get("check") else {}
            made = Check(**{**check, "rows": tuple(check.get("rows", ()))})
            kept = None if raw["kept"] is None else tuple(raw["kept"])
            given = {f.name: raw[f.name] for f in fields(cls) if f.name not in ("check", "kept")}
            layer = cls(**given, kept=kept, check=made)
        except (KeyError, TypeError, AttributeError) as problem:
            raise StoreError(
                f"{source}: an attention call is described wrongly: {problem!r} in {repr(raw)[:400]}"
            ) from None
        for name, want in _LAYER_KINDS.items():
            value = getattr(layer, name)
            if not isinstance(value, want) or (isinstance(value, bool) and bool not in want) or not _sane(value):
                raise StoreError(f"{source}: {name} of an attention call is {value!r}")
        for name, want in _CHECK_KINDS.items():
            value = getattr(made, name)
            if not isinstance(value, want) or isinstance(value, bool) or not _sane(value):
                raise StoreError(f"{source}: {name} of a self-check is {value!r}")
        layer._refuse_nonsense(source)
        return layer

    def _refuse_nonsense(self, source: str) -> None:
        """What no attention call can be."""
        rows, kept, check = self.check.rows, self.kept, self.check
        wrong = {
            "call": self.call < 0 or self.batch < 0,
            "heads": not 0 < self.kv_heads <= self.heads or self.heads % self.kv_heads != 0,
            "window": self.window is not None and self.window < 0,
            "softcap": self.softcap is not None and not self.softcap > 0,
            "kept": kept is not None
            and (
                not kept or any(type(n) is not int or not 0 <= n < self.heads for n in kept) or len({*kept}) < len(kept)
            ),
            "check": (check.error is None) != (check.limit is None)
            or (check.error is not None and not (check.error >= 0 and check.limit and check.limit > 0)),
            "rows": len(rows) > _MOST_ROWS or any(type(row) is not int or not 0 <= row < _LARGEST for row in rows),
        }
        for name in [name for name, bad in wrong.items() if bad]:
            found = (self.heads, self.kv_heads) if name == "heads" else getattr(self, name, check)
            raise StoreError(
                f"{source}: {name} of an attention call of {self.heads} heads is {found!r}, which cannot be"
            )

    def fits(self, entries: Mapping[str, Entry], source: str) -> None:
        """Refuses tensors that cannot be this call's.

        Args:
            entries: of the step's file.
            source: the file, for messages.

        Raises:
            StoreError: one is missing, or its shape or dtype is not what `docs/format.md` says.
        """
        heads, kv_heads = (self.heads, self.kv_heads) if self.kept is None else (len(self.kept),) * 2
        q, k = (self._entry(entries, self.key(kind), source, "f", 4) for kind in ("q", "k"))
        batch, _, queries, dim = q
        keys = k[2]
        if q[1] != heads or k != (batch, kv_heads, keys, dim) or not dim:
            raise StoreError(
                f"{source}: q {q} and k {k} of {self.name} are not those of {heads} heads and {kv_heads} key heads"
            )
        for name, kind in ((self.mask, "b"), (self.bias, "f")):
            if name is None:
                continue
            shape = self._entry(entries, f"{self.mode}/{self.batch}/{name}", source, kind, 4)
            whole = (batch, heads, queries, keys)
            if any(have not in (1, want) for have, want in zip(shape, whole, strict=True)):
                raise StoreError(f"{source}: {name} {shape} of {self.name} does not fit its weights {whole}")
        if self.sinks and self._entry(entries, self.key("sinks"), source, "f", 1) != (heads,):
            raise StoreError(f"{source}: the sinks of {self.name} are not one for each of {heads} heads")

    def fits_check(self, entries: Mapping[str, Entry], source: str) -> None:
        """Refuses tensors with which this call's self-check cannot be repeated; `fits` comes first.

        Raises:
            StoreError: as `fits`.
        """
        q, k = entries[self.key("q")].shape, entries[self.key("k")].shape
        v, output = (self._entry(entries, self.key(kind), source, "f", 4) for kind in ("v", "output"))
        rows, example = self.check.rows, self.check.example
        if example is None or example >= q[0] or not rows or max(rows) >= q[2]:
            raise StoreError(
                f"{source}: the self-check of {self.name} names example {example} and rows {rows} of q {q}"
            )
        if v[:3] != (1, *k[1:3]) or output != (1, q[1], len(rows), v[3]) or not v[3] or not k[2]:
            raise StoreError(f"{source}: v {v} and output {output} of {self.name} do not fit q {q} and k {k}")

    def _entry(self, entries: Mapping[str, Entry], key: str, source: str, kind: str, axes: int) -> tuple[int, ...]:
        entry = entries.get(key)
        if entry is None:
            raise StoreError(f"{source}: tensor {key!r} of {self.name} is missing")
        # ml_dtypes' bfloat16 has a kind of its own.
        found = "f" if entry.dtype.name == "bfloat16" else entry.dtype.kind
        if found != kind or len(entry.shape) != axes:
            raise StoreError(f"{source}: tensor {key!r} of {self.name} is {entry.dtype} of shape {entry.shape}")
        return entry.shape


def _sane(value: Any) -> bool:
    """Whether a number is one to compute with in float32 and int64."""
    return not isinstance(value, int | float) or (math.isfinite(value) and abs(value) < _LARGEST)


_LARGEST = 2**53
_MOST_ROWS = 64
_CHECK_KINDS: dict[str, tuple[type, ...]] = {
    "example": (int, type(None)),
    "error": (float, int, type(None)),
    "limit": (float, int, type(None)),
    "note": (str,),
    "rows": (tuple,),
}
_LAYER_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("path", "mode", "route", "dtype"), (str,)),
    **dict.fromkeys(("call", "batch", "heads", "kv_heads", "offset"), (int,)),
    **dict.fromkeys(("scale", "dropout"), (float, int)),
    **dict.fromkeys(("causal", "sinks", "named"), (bool,)),
    **dict.fromkeys(("mask", "bias"), (str, type(None))),
    "window": (int, type(None)),
    "softcap": (float, int, type(None)),
}


@dataclass(frozen=True)
class Example:
    """One of the fixed examples, without its padding.

    `positions` are the indices of its tokens in the padded batch; `label` is None where there is none.
    """

    index: int
    batch: int
    row: int
    text: str
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    positions: NDArray[np.int64]
    label: int | None


@dataclass(frozen=True)
class State:
    """How the trainer is doing, by the reader's own clock.

    `state` is waiting, training, ended, stopped or failed. `age_s` is how long ago this reader last saw a sign of it.
    """

    state: str
    step: int | None
    age_s: float
    alive: bool
    message: str
    skipped: int
    thinned: int = 0


STATES = ("training", "ended", "stopped", "failed")


def live_of(raw: Json) -> Json:
    """What `live.json` says, checked; what it does not say is as before the first step.

    Raises:
        ValueError: a field is of the wrong kind.
    """
    found: Json = {"state": "training", "step": None, "attempt": None, "counter": 0, "interval_s": 2.0}
    found |= {"message": "", "skipped": 0, "thinned": 0}
    found |= {name: raw[name] for name in found if name in raw}
    for name in ("step", "attempt", "counter", "skipped", "thinned", "interval_s"):
        value = found[name]
        whole = type(value) is int or (name == "interval_s" and type(value) is float)
        if not (whole and _sane(value) and value >= 0) and not (value is None and name in ("step", "attempt")):
            raise ValueError(f"{name} is {repr(value)[:80]}")
    if found["state"] not in STATES or not isinstance(found["message"], str):
        raise ValueError(f"state is {repr(found['state'])[:80]}, message {repr(found['message'])[:80]}")
    return found


def examples_of(tensors: dict[str, Array], header: Header) -> list[Example]:
    """The examples of a probe file.

    Raises:
        StoreError: strings and tensors do not fit each other.
    """
    texts, tokens = header.facts("texts", list), header.facts("tokens", list)
    special = {number for number in header.facts("special", list) if type(number) is int}
    if len(texts) != len(tokens):
        raise StoreError(f"{header.name}: it has texts of {len(texts)} batches and tokens of {len(tokens)}")
    found: list[Example] = []
    for batch, (rows, lines) in enumerate(zip(tokens, texts, strict=True)):
        mask, ids, labels = (tensors.get(f"{batch}/{kind}") for kind in ("mask", "ids", "labels"))
        _refuse_misfits(header.name, batch, rows, lines, {"mask": mask, "ids": ids, "labels": labels})
        for row, strings in enumerate(rows):
            at = np.arange(len(strings)) if mask is None else np.flatnonzero(mask[row])
            label = int(labels[row]) if labels is not None and labels.ndim == 1 else None
            marks = (False,) * len(at) if ids is None else tuple(int(number) in special for number in ids[row, at])
            found.append(
                Example(
                    len(found),
                    batch,
                    row,
                    lines[row],
                    tuple(strings[i] for i in at),
                    marks,
                    at.astype(np.int64),
                    None if label == -100 else label,
                )
            )
    return found


def _refuse_misfits(name: str, batch: int, rows: Any, lines: Any, tensors: Mapping[str, Array | None]) -> None:
    strings = isinstance(rows, list) and all(
        isinstance(row, list) and all(isinstance(token, str) for token in row) for row in rows
    )
    if not strings or not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise StoreError(f"{name}: the tokens and texts of batch {batch} are not lists of strings")
    if len(lines) != len(rows):
        raise StoreError(f"{name}: batch {batch} has {len(lines)} texts and {len(rows)} rows of tokens")
    for kind, want in (("mask", "b"), ("ids", "i"), ("labels", "i")):
        tensor = tensors[kind]
        if tensor is None:
            continue
        width = len(rows[0]) if rows else 0
        axes: tuple[int, ...] = (len(rows),) if kind == "labels" else (len(rows), width)
        ragged = kind != "labels" and any(len(row) != width for row in rows)
        # Labels may have more axes: one for each token, or each class.
        shape = tensor.shape[:1] if kind == "labels" else tensor.shape
        if tensor.dtype.kind != want or shape != axes or ragged:
            raise StoreError(f"{name}: {kind} of batch {batch} is {tensor.dtype} of shape {tensor.shape}, want {axes}")
