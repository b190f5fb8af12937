"""What a run says of itself: attention calls and their self-checks, examples, the trainer's state."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from .blob import Array, Header, Json
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
            check = (
                Check(**{**raw["check"], "rows": tuple(raw["check"].get("rows", ()))}) if raw.get("check") else Check()
            )
            kept = None if raw["kept"] is None else tuple(raw["kept"])
            given = {f.name: raw[f.name] for f in fields(cls) if f.name not in ("check", "kept")}
            layer = cls(**given, kept=kept, check=check)
        except (KeyError, TypeError, AttributeError) as problem:
            raise StoreError(f"{source}: an attention call is described wrongly: {problem!r} in {raw!r}") from None
        for name, want in _LAYER_KINDS.items():
            value = getattr(layer, name)
            if not isinstance(value, want) or (isinstance(value, bool) and bool not in want):
                raise StoreError(f"{source}: {name} of an attention call is {value!r}")
        if kept is not None and (not kept or any(type(n) is not int or not 0 <= n < layer.heads for n in kept)):
            raise StoreError(f"{source}: an attention call of {layer.heads} heads is said to keep {kept!r}")
        return layer


_LAYER_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("path", "mode", "route", "dtype"), (str,)),
    **dict.fromkeys(("call", "batch", "heads", "kv_heads", "offset"), (int,)),
    **dict.fromkeys(("scale", "dropout"), (float, int)),
    **dict.fromkeys(("causal", "sinks"), (bool,)),
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


def examples_of(tensors: dict[str, Array], header: Header) -> list[Example]:
    """The examples of a probe file."""
    texts, tokens = header.facts("texts", list), header.facts("tokens", list)
    special = set(header.facts("special", list))
    found: list[Example] = []
    for batch, rows in enumerate(tokens):
        mask, ids, labels = (tensors.get(f"{batch}/{kind}") for kind in ("mask", "ids", "labels"))
        for row, strings in enumerate(rows):
            at = np.arange(len(strings)) if mask is None else np.flatnonzero(mask[row])
            label = int(labels[row]) if labels is not None and labels.ndim == 1 else None
            found.append(
                Example(
                    len(found),
                    batch,
                    row,
                    str(texts[batch][row]),
                    tuple(str(strings[i]) for i in at),
                    tuple(ids is not None and int(ids[row, i]) in special for i in at),
                    at.astype(np.int64),
                    None if label == -100 else label,
                )
            )
    return found
