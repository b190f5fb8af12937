"""A run being read: tensors, weights, examples, what was logged. No torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import attention
from .blob import Array, Json, decode_sound
from .errors import HeadscopeWarning, NoSuchName, StoreError, nearest, shorten
from .facts import Example, Layer
from .history import History
from .store import Unreachable


class Trial(History):
    """A run, live: every question sees what has been written by then.

    Args:
        path: the run's folder, or its `s3://` or `gs://` address; need not exist yet.
        attempt: only this (re)start of training; the whole history if None.
        refresh_s: at most one listing in that time.
    """

    def layers(self, step: int, mode: str = "probe", batch: int = 0) -> list[Layer]:
        """The attention calls of a forward pass, in the order in which they ran."""
        header = self.header(step)
        layers = [Layer.of(raw, header.name) for raw in header.facts("calls", list)]
        return [layer for layer in layers if (layer.mode, layer.batch) == (mode, batch)]

    def tensor_names(self, regex: str | None = None, *, step: int | None = None, mode: str | None = None) -> list[str]:
        """Names of all tensors, rebuilt `.weights` included.

        Args:
            regex: only names in which it is found.
            step: only what this step has; what any step has, if None.
            mode: only of this mode.
        """
        with self._lock:
            self.refresh()
            used = [self._part(step)] if step is not None else [*self._used_layouts().values()]
            headers = [self._layout(part) for part in used]
        try:
            pattern = re.compile(regex or "")
        except re.error as problem:
            raise NoSuchName(
                f"{regex!r} is not a regular expression: {problem}; re.escape makes one of a name"
            ) from None
        names = set()
        for header in headers:
            layers = [Layer.of(raw, header.name) for raw in header.facts("calls", list)]
            for key in [*header.entries, *(layer.key("weights") for layer in layers)]:
                in_mode, _, name = key.split("/", 2)
                if mode in (None, in_mode) and pattern.search(name):
                    names.add(name)
        return sorted(names)

    def tensor(self, name: str) -> Tensor:
        """One tensor over all steps.

        Raises:
            NoSuchName: no step has it.
        """
        names = self.tensor_names()
        if name not in names:
            raise NoSuchName(
                f"no tensor {name!r} in {self.path}{nearest(name, names)}; it has {shorten(names)}. "
                f"trial.tensor_names(regex=...) lists them."
            )
        return Tensor(self, name)

    def weights(
        self,
        step: int,
        layer: Layer,
        *,
        row: int | None = None,
        heads: Sequence[int] | None = None,
        queries: NDArray[np.int64] | None = None,
    ) -> Array:
        """Attention weights of one call, rebuilt from q and k, before dropout.

        Shapes:
            returns: (batch, heads, queries, keys) float32; batch is 1 if a row is chosen
        Args:
            layer: as `layers` gives it for this step.
            row: only this example of the batch.
            heads: only these, in this order, by their numbers in the model.
            queries: only these, in this order.
        """
        lead = () if row is None else (row,)
        entries = self.entries(step)
        layer.fits(entries, self._part(step).name)
        axes = entries[layer.key("q")].shape
        if queries is not None and len(queries) and not 0 <= queries.min() <= queries.max() < axes[2]:
            raise NoSuchName(
                f"no query {queries.max()} in {layer.name} at step {step} of {self.path}; it has {axes[2]} tokens"
            )
        wrong = [head for head in heads or () if head not in layer.numbers]
        if wrong:
            raise NoSuchName(f"no head {wrong[0]} in {layer.name}; the run has its heads {shorten(layer.numbers)}")
        places = None if heads is None else [layer.numbers.index(head) for head in heads]
        if row is not None and places is not None:
            return self._weights_of(step, layer, row, places, queries)
        q, k = self.read(step, [(layer.key("q"), lead), (layer.key("k"), lead)])
        if row is not None:
            q, k = q[None], k[None]
        found = attention.weights(q, k, rows=queries, **self._terms(step, layer, row))
        return found if places is None else found[:, places]

    def _weights_of(
        self, step: int, layer: Layer, row: int, places: Sequence[int], queries: NDArray[np.int64] | None
    ) -> Array:
        """Only the chosen heads' bytes are read; `places` are those of the heads in the file."""
        # Of chosen heads the keys are stored one by one; otherwise heads share them in groups.
        groups = 1 if layer.kept is not None else layer.heads // layer.kv_heads
        wants = [(layer.key("q"), (row, place)) for place in places]
        wants += [(layer.key("k"), (row, place // groups)) for place in places]
        pieces = self.read(step, wants)
        q, k = np.stack(pieces[: len(places)])[None], np.stack(pieces[len(places) :])[None]
        terms = self._terms(step, layer, row)
        for name in ("mask", "bias"):
            if terms[name] is not None and terms[name].shape[1] != 1:
                terms[name] = terms[name][:, list(places)]
        if terms["sinks"] is not None:
            terms["sinks"] = terms["sinks"][list(places)]
        return attention.weights(q, k, rows=queries, **terms)

    def _terms(self, step: int, layer: Layer, row: int | None) -> dict[str, Any]:
        """All that entered the softmax beside q and k, as `attention.weights` takes it."""
        prefix = f"{layer.mode}/{layer.batch}/"
        keys = {"mask": layer.mask and prefix + layer.mask, "bias": layer.bias and prefix + layer.bias}
        keys["sinks"] = layer.key("sinks") if layer.sinks else None
        wanted = {name: key for name, key in keys.items() if key}
        entries = self.entries(step)
        # Of one example only its own part of a mask or bias is read.
        own = {n: row is not None and n != "sinks" and entries[key].shape[0] != 1 for n, key in wanted.items()}
        leads: list[tuple[int, ...]] = [(row,) if row is not None and own[name] else () for name in wanted]
        pieces = self.read(step, list(zip(wanted.values(), leads, strict=True)))
        found = {n: piece[None] if own[n] else piece for n, piece in zip(wanted, pieces, strict=True)}
        terms: dict[str, Any] = dict.fromkeys(("mask", "bias", "sinks")) | found
        for name in ("scale", "causal", "offset", "window", "softcap"):
            terms[name] = getattr(layer, name)
        terms["rounding"] = attention.rounding_of(layer.route, layer.dtype)
        return terms

    def examples(self) -> list[Example]:
        """The fixed examples, in the order of the probe; empty before the first step."""
        with self._lock:
            attempt = self.attempt
            return [] if attempt is None else self._probe(attempt)[0]

    def facts(self) -> Json:
        """What is trained, with what: `attempt.json` of the newest attempt."""
        with self._lock:
            attempt = self.attempt
            if attempt is None:
                return {}
            if attempt not in self._facts:
                name = f"a{attempt:03d}/attempt.json"
                try:
                    self._facts[attempt] = self._files.json(name) or {}
                    labels = self._facts[attempt].get("labels") or []
                    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                        raise StoreError(
                            f"{name} in {self.path}: labels are {repr(labels)[:80]}, not a list of strings"
                        )
                except Unreachable:
                    raise
                except StoreError as problem:
                    self.damaged[name], self._facts[attempt] = str(problem), {}
            return self._facts[attempt]

    def predictions(self, step: int) -> list[int | None]:
        """The class that each example gets; None where the output is not one class per example."""
        return [None if found is None else int(found) for found in self._per_example(step, "predictions", 1, "iu")]

    def probabilities(self, step: int) -> list[list[float] | None]:
        """The softmax of each example's logits; None where they are not kept or not one row per example."""
        found = self._per_example(step, "logits", 2, "fV")
        return [None if row is None or not row.size else [float(p) for p in _softmax(row)] for row in found]

    def _per_example(self, step: int, kind: str, axes: int, dtypes: str) -> list[Array | None]:
        entries = self.entries(step)
        examples = self.examples()
        keys = {example.batch: f"probe/{example.batch}/{kind}" for example in examples}
        usable = [batch for batch, key in keys.items() if key in entries and len(entries[key].shape) == axes]
        for batch in usable:
            entry, rows = entries[keys[batch]], sum(example.batch == batch for example in examples)
            if entry.dtype.kind not in dtypes or entry.shape[0] != rows:
                raise StoreError(
                    f"{self._part(step).name}: tensor {keys[batch]!r} is {entry.dtype} of shape {entry.shape}; "
                    f"the probe has {rows} examples in that batch"
                )
        found = dict(zip(usable, self.read(step, [(keys[batch], ()) for batch in usable]), strict=True))
        return [found[e.batch][e.row] if e.batch in found else None for e in examples]

    def loss(self, step: int) -> float | None:
        """The model's own loss on the probe, mean over its batches; None without labels."""
        entries = self.entries(step)
        keys = [key for key in entries if re.fullmatch(r"probe/\d+/loss", key)]
        wrong = [key for key in keys if entries[key].shape or entries[key].dtype.kind not in "fV"]
        if wrong:
            raise StoreError(f"{self._part(step).name}: tensor {wrong[0]!r} is not one number")
        return float(np.mean(self.read(step, [(key, ()) for key in keys]))) if keys else None

    def scalars(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """What was logged: for each name its steps and values, in order."""
        with self._lock:
            self.refresh()
            found: dict[str, tuple[list[Array], list[Array]]] = {}
            until: float = float("inf")
            for number in sorted(self._attempts, reverse=True) if self._only is None else [self._only]:
                rows = self._timeline(number)
                for name, (steps, values) in rows.items():
                    keep = steps < until
                    parts = found.setdefault(name, ([], []))
                    parts[0].insert(0, steps[keep])
                    parts[1].insert(0, values[keep])
                own = [steps[0] for steps, _ in rows.values() if len(steps)]
                own += [self._attempts[number].first] if number in self._attempts else []
                until = min([until, *own])
            return {n: (np.concatenate(s), np.concatenate(v)) for n, (s, v) in found.items() if sum(map(len, s))}

    def _timeline(self, number: int) -> dict[str, tuple[Array, Array]]:
        attempt = self._attempts.get(number)
        found: dict[str, tuple[list[Array], list[Array]]] = {}
        for name, version in sorted(attempt.blocks.items()) if attempt else []:
            columns = self._block(name, version)
            for column in [name for name in columns if name not in ("step", "time") and not name.endswith(":nan")]:
                logged = ~np.isnan(columns[column]) | columns.get(f"{column}:nan", np.False_)
                steps, values = found.setdefault(column, ([], []))
                steps.append(columns["step"][logged])
                values.append(columns[column][logged])
        return {name: (np.concatenate(s), np.concatenate(v)) for name, (s, v) in sorted(found.items())}

    def _block(self, name: str, version: str) -> dict[str, Array]:
        if name not in self._rows or self._rows[name][0] != version:
            blob = self._files.get(name)
            if blob is None:
                return {}
            try:
                columns = decode_sound(blob, name)[0]
                _check_columns(columns, name)
                self.damaged.pop(name, None)
            except StoreError as problem:
                self.damaged[name], columns = str(problem), {}
            self._rows[name] = (version, columns)
        return self._rows[name][1]


def _check_columns(columns: dict[str, Array], name: str) -> None:
    rows = columns["step"].shape if "step" in columns else None
    for column, values in columns.items():
        want = {"step": "<i8"}.get(column, "|b1" if column.endswith(":nan") else "<f8")
        if values.ndim != 1 or values.shape != rows or values.dtype.str != want:
            raise StoreError(f"{name}: column {column!r} is {values.dtype} of shape {values.shape}, its steps {rows}")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a run, over all its steps."""

    trial: Trial
    name: str

    @cached_property
    def _kind(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    def steps(self, mode: str | None = None) -> list[int]:
        """The steps that have it; in one mode only, if given."""
        return [step for step in self.trial.steps() if self._batches(step, mode)]

    def _batches(self, step: int, mode: str | None) -> list[tuple[str, int]]:
        """(mode, batch) under which a step has it."""
        source = self.name.removesuffix(".weights") + ".q" if self._kind == "weights" else self.name
        found = []
        for key in self.trial.entries(step):
            in_mode, batch, name = key.split("/", 2)
            if name == source and mode in (None, in_mode):
                found.append((in_mode, int(batch)))
        return sorted(found, key=lambda have: (have[0] != "probe", have))

    def value(self, step: int, *, mode: str | None = None, batch: int = 0) -> Array:
        """The tensor at a step; axes as in `docs/format.md`.

        Weights are rebuilt from q and k as (batch, heads, queries, keys) float32; bfloat16 comes as float32.

        Args:
            step: an optimiser step.
            mode: probe, train or eval; probe first, if None.
            batch: which forward pass of the step.

        Raises:
            NoSuchStep: the run has no such step (yet).
            NoSuchName: the step has no such tensor in that mode and batch.
        """
        have = self._batches(step, mode)
        found = [in_mode for in_mode, number in have if number == batch]
        if not found:
            raise self._missing(step, mode, batch)
        if self._kind != "weights":
            return self.trial.read(step, [(f"{found[0]}/{batch}/{self.name}", ())])[0]
        layers = self.trial.layers(step, found[0], batch)
        layer = next((layer for layer in layers if layer.name == self.name.removesuffix(".weights")), None)
        if layer is None:
            raise NoSuchName(f"no attention call of {self.name!r} at step {step} of {self.trial.path}, only its q")
        if not layer.check.passed:
            warnings.warn(
                f"{self.name} at step {step} failed its self-check ({layer.check.error:.1e} > {layer.check.limit:g}): "
                f"these weights are not what the kernel computed",
                HeadscopeWarning,
                stacklevel=2,
            )
        return self.trial.weights(step, layer)

    def values(
        self,
        steps: Sequence[int] | None = None,
        *,
        example: int | None = None,
        head: int | None = None,
        mode: str | None = None,
        batch: int = 0,
    ) -> Array:
        """A stored tensor over steps, stacked; of one example and head only their bytes are read.

        Shapes:
            returns: (steps, *axes of `value`), without the axes of which one entry is chosen
        Args:
            steps: in this order; all that have it, if None.
            example: only this row of the batch.
            head: only this place on the heads axis; with an example.
            mode, batch: as in `value`.

        Raises:
            NoSuchStep, NoSuchName: as in `value`; weights are rebuilt and not stored, see `Trial.weights`.
            ValueError: the shape changes between the steps, or a head is chosen without an example.
        """
        if head is not None and example is None:
            raise ValueError(f"a head of {self.name} is chosen without an example; give example= too")
        if self._kind == "weights":
            raise NoSuchName(f"{self.name} is rebuilt, not stored: take values() of its q and k, or trial.weights(...)")
        steps = self.steps(mode) if steps is None else steps
        lead = tuple(index for index in (example, head) if index is not None)
        found = self.trial._series([(step, self._place(step, mode, batch), lead) for step in steps])
        if len({array.shape for array in found}) > 1:
            raise ValueError(f"{self.name} changes its shape between these steps; take value(step) one by one")
        return np.stack(found) if found else np.zeros(0, np.float32)

    def _place(self, step: int, mode: str | None, batch: int) -> str:
        """The key under which a step has it."""
        for in_mode in ("probe", "eval", "train") if mode is None else (mode,):
            key = f"{in_mode}/{batch}/{self.name}"
            if key in self.trial.entries(step):
                return key
        raise self._missing(step, mode, batch)

    def _missing(self, step: int, mode: str | None, batch: int) -> NoSuchName:
        return NoSuchName(
            f"no {self.name!r} of mode {mode!r}, batch {batch}, at step {step} of {self.trial.path}; "
            f"that step has it as {shorten(f'mode {m!r} batch {b}' for m, b in self._batches(step, None))}"
        )


def open_trial(path: str | Path, *, attempt: int | None = None) -> Trial:
    """A run to read, finished or still training; it sees new steps as they come.

    Args:
        path: the folder (or `s3://`, `gs://` address) given to `watch`; need not exist yet.
        attempt: only this (re)start of training; the whole history if None.
    """
    return Trial(path, attempt=attempt)


@np.errstate(invalid="ignore")
def _softmax(row: Array) -> Array:
    shifted = np.exp(row.astype(np.float64) - row.max())
    return np.asarray(shifted / shifted.sum())
