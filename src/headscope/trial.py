"""A run being read: names, steps, modes, values, and waiting for more. No torch."""

from __future__ import annotations

import bisect
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import attention
from .blob import Array, Entry, Header, Json, decode_sound, verify
from .errors import HeadscopeWarning, NoSuchName, NoSuchStep, NotSupported, StoreError, TrainerGone, nearest, shorten
from .facts import Example, Layer, State, examples_of, live_of
from .store import FORMAT, Files, StepFile, Unreachable, block_of

_POLL_S = 0.1
_HEADERS_KEPT = 512
_LAYOUTS_KEPT = 1024
_SIZED = 256
_AT_ONCE = 64
_TRIES = 3
_KEY = re.compile(r"[a-z]+/(0|[1-9]\d{0,8})/.+", re.ASCII)
_ATTEMPT = re.compile(r"a(\d{3})/attempt\.json", re.ASCII)


@dataclass
class _Attempt:
    """What is known of one attempt.

    `parts` are a step's, by rank; `order` are the complete steps; `first` is the first step that has a file at all.
    """

    number: int
    first: int = 1 << 62
    parts: dict[int, tuple[StepFile, ...]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    blocks: dict[str, str] = field(default_factory=dict)

    def add(self, part: StepFile) -> bool:
        """Takes a part in; true if its step is complete by that."""
        parts: tuple[StepFile, ...] = (part,)
        if part.step in self.parts:
            parts = tuple(sorted((part, *self.parts[part.step]), key=lambda one: one.rank))
        self.parts[part.step] = parts
        if len(parts) != part.world or [p for p in parts if p.world != part.world or p.rank >= part.world]:
            return False
        if not self.order or part.step > self.order[-1]:
            self.order.append(part.step)
        else:
            bisect.insort(self.order, part.step)
        return True

    def drop(self, step: int) -> None:
        if self.parts.pop(step, None) and step in self.order:
            self.order.remove(step)


class Trial:
    """A run, live: every question sees what has been written by then.

    Args:
        path: the run's folder, or its `s3://` or `gs://` address; need not exist yet.
        attempt: only this (re)start of training; the whole history if None.
        refresh_s: at most one listing in that time.
    """

    def __init__(self, path: str | Path, *, attempt: int | None = None, refresh_s: float = 0.0) -> None:
        self.path = str(path)
        self.damaged: dict[str, str] = {}
        self._only = attempt
        self._refresh_s = refresh_s
        self._listed = float("-inf")
        self._files = Files(path, sized=_SIZED)
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._attempts: dict[int, _Attempt] = {}
        self._versions: dict[str, str] = {}
        self._layouts: dict[str, Header] = {}
        self._modes_of: dict[str, frozenset[str]] = {}
        self._headers: dict[str, Header] = {}
        self._rows: dict[str, tuple[str, dict[str, Array]]] = {}
        self._examples: dict[int, tuple[list[Example], Json]] = {}
        self._sources: dict[int, StepFile] = {}
        self._order: list[int] = []
        self._fresh: list[StepFile] = []
        self._format = ""
        self._facts: dict[int, Json] = {}
        self._live: Json = {}
        self._live_version = ""
        self._sign = time.monotonic()
        self._missed: Counter[str] = Counter()
        self._thinned: object = 0
        self.damaged.clear()

    # Finding out what there is.

    def refresh(self) -> list[int]:
        """Looks once for what is new, and returns the new steps.

        One listing; beside it one small read for each layout that was never seen, and `live.json` if it changed.

        Raises:
            NotSupported: the run is of another format.
            StoreError: it cannot be listed.
        """
        with self._lock:
            if time.monotonic() - self._listed < self._refresh_s:
                return []
            listing = self._files.names(self._newest_name())
            created = next((version for name, _, version in listing if name == "headscope.json"), None)
            if created is None and "headscope.json" in self._versions:
                self._forget()
            if created and self._versions.get("headscope.json", created) != created:
                self._forget()
                listing = self._files.names()
            if created and self._format != created:
                self._read_format()
                self._format = created
            fresh = self._take(listing)
            if self._versions.get("live.json", "") != self._live_version:
                self._read_live()
                if self._live.get("thinned", 0) != self._thinned:
                    self._thinned = self._live.get("thinned", 0)
                    self._drop_deleted()
            self._listed = time.monotonic()
            return [step for step in fresh if step in self._sources]

    def _take(self, listing: Sequence[tuple[str, int, str]]) -> list[int]:
        """Notes what a listing shows; returns the steps that are new."""
        for name, size, version in listing:
            self._note(name, size, version)
        fresh, self._fresh = self._fresh, []
        if not fresh:
            return []
        steps = [part.step for part in fresh]
        attempts = {part.attempt for part in fresh} | (
            {self._sources[self._order[-1]].attempt} if self._order else {-1}
        )
        if len(attempts) == 1 and steps == sorted({*steps}) and steps[0] > self._order[-1]:
            # The quiet case, whose cost is that of the new steps alone: the newest attempt goes on.
            number = attempts.pop()
            self._sources |= {step: self._attempts[number].parts[step][0] for step in steps}
            self._order += steps
            return steps
        before = {*self._order}
        self._choose_sources()
        return [step for step in self._order if step not in before]

    def _drop_deleted(self) -> None:
        """Forgets the steps whose files are gone: one whole listing."""
        with self._lock:
            there = {name for name, _, _ in self._files.names()}
            for attempt in self._attempts.values():
                for step in [
                    step for step, parts in attempt.parts.items() if any(part.name not in there for part in parts)
                ]:
                    attempt.drop(step)
            self._choose_sources()

    def _newest_name(self) -> str:
        if not self._attempts:
            return ""
        newest = self._attempts[max(self._attempts)]
        return f"a{newest.number:03d}/" + (f"steps/{newest.order[-1]:010d}-~" if newest.order else "")

    def _note(self, name: str, size: int, version: str) -> None:
        if part := StepFile.of(name, size):
            attempt = self._attempts.get(part.attempt) or self._attempt(part.attempt)
            if part.step < attempt.first:
                attempt.first = part.step
            known = None
            if part.step in attempt.parts:
                known = next((one for one in attempt.parts[part.step] if one.rank == part.rank), None)
            if known is not None and known.name != name:
                self.damaged[name] = f"{name}: {known.name} is the same step and rank; one of them is not the run's"
            elif known is None and self._sound(part) and attempt.add(part):
                self._fresh.append(part)
        elif block := block_of(name):
            self._attempt(block[0]).blocks[name] = version
        elif match := _ATTEMPT.fullmatch(name):
            self._attempt(int(match[1]))
        elif name in ("headscope.json", "live.json"):
            self._versions[name] = version

    def _attempt(self, number: int) -> _Attempt:
        return self._attempts.setdefault(number, _Attempt(number))

    def _sound(self, part: StepFile) -> bool:
        """Whether the file is as large as its layout says; a layout never seen is read first."""
        if part.name in self.damaged:
            return False
        known = self._layouts.get(part.layout)
        if known is not None and part.size in (-1, known.size):
            return True
        try:
            if known is None:
                self._layout(part)
            else:
                raise StoreError(
                    f"{part.name}: the file has {part.size} bytes, its layout promises {known.size}; it is damaged"
                )
        except StoreError as problem:
            self._missed[part.name] += 1
            if isinstance(problem, Unreachable) and self._missed[part.name] < _TRIES:
                raise
            self.damaged[part.name] = str(problem)
            return False
        return True

    def _layout(self, part: StepFile) -> Header:
        """The header of a file of this part's layout."""
        header = self._layouts.get(part.layout)
        if header is None:
            header = self._header(part)
            while len(self._layouts) >= _LAYOUTS_KEPT:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[part.layout] = header
            self._modes_of[part.layout] = frozenset(key.split("/", 1)[0] for key in header.entries)
        return header

    def _choose_sources(self) -> None:
        """Which attempt each step comes from: the newest that has it or began before it, with the same examples."""
        sources: dict[int, StepFile] = {}
        until: float = float("inf")
        wanted = [self._only] if self._only is not None else sorted(self._attempts, reverse=True)
        newest: int | None = None
        for number in wanted:
            attempt = self._attempts.get(number)
            if attempt is None or not attempt.order:
                continue
            if newest is not None and not self._same_probe(newest, number):
                break
            newest = number if newest is None else newest
            sources |= {step: attempt.parts[step][0] for step in attempt.order if step < until}
            until = min(until, attempt.first)
        self._sources, self._order = sources, sorted(sources)

    def _same_probe(self, one: int, other: int) -> bool:
        return self._probe(one)[1] == self._probe(other)[1]

    def _read_format(self) -> None:
        """Refuses a run that a later Headscope has written."""
        try:
            found = (self._files.json("headscope.json") or {}).get("format", FORMAT)
        except Unreachable:
            raise
        except StoreError as problem:
            self.damaged["headscope.json"] = str(problem)
            return
        if type(found) is not int:
            self.damaged["headscope.json"] = (
                f"headscope.json in {self.path}: format is {repr(found)[:80]}, not a number"
            )
        elif found != FORMAT:
            raise NotSupported(
                f"headscope.json in {self.path}: the run is of format {found}, this Headscope reads format {FORMAT}; "
                f"install the version that wrote it"
            )

    def _read_live(self) -> None:
        version = self._versions["live.json"]
        try:
            raw = self._files.json("live.json")
            live = None if raw is None else live_of(raw)
        except Unreachable:
            raise
        except (StoreError, ValueError) as problem:
            text = str(problem)
            self.damaged["live.json"] = text if "live.json" in text else f"live.json in {self.path}: {text}"
            self._live_version = version
            return
        if live is None or (live["attempt"] or 0) < max(self._attempts, default=0):
            self._live_version = version
            return
        self.damaged.pop("live.json", None)
        self._live_version = version
        if live["counter"] != self._live.get("counter") or live["attempt"] != self._live.get("attempt"):
            self._sign = time.monotonic()
        self._live = live

    def steps(self, mode: str | None = None) -> list[int]:
        """All steps that can be read, in order; of one mode only, if given."""
        with self._lock:
            self.refresh()
            return [*self._order] if mode is None else [step for step in self._order if mode in self._modes(step)]

    def modes(self) -> list[str]:
        """The modes that the run has: probe, train, eval."""
        with self._lock:
            self.refresh()
            return sorted({mode for layout in self._used_layouts() for mode in self._modes_of[layout]})

    def _modes(self, step: int) -> frozenset[str]:
        return self._modes_of[self._sources[step].layout]

    @property
    def identity(self) -> str:
        """Changes where the folder is deleted and another run written under its name; empty before there is one."""
        with self._lock:
            return self._versions.get("headscope.json", "").strip('"')

    @property
    def attempt(self) -> int | None:
        """The newest (re)start of training that has a step; None before there is one."""
        with self._lock:
            if not self._sources:
                self.refresh()
            return max((part.attempt for part in self._sources.values()), default=None)

    def state(self) -> State:
        """How the trainer is doing."""
        with self._lock:
            self.refresh()
            step = max(self._sources, default=None)
            age_s = time.monotonic() - self._sign
            if not self._live:
                state = "waiting" if step is None else "training"
                return State(state, step, age_s, alive=step is None, message="", skipped=0)
            live = self._live
            alive = live["state"] == "training" and age_s < max(10.0, 5 * live["interval_s"])
            return State(
                live["state"], step, age_s, alive, live["message"], skipped=live["skipped"], thinned=live["thinned"]
            )

    def wait(self, step: int, timeout: float | None = None) -> int:
        """Blocks until a step not before `step` can be read, and returns the first such step.

        Args:
            step: an optimiser step.
            timeout: in seconds; without it, until the trainer is gone.

        Raises:
            TrainerGone: training ended or failed before, or gives no sign any more.
            TimeoutError: it was not there in time; trying again goes on waiting.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            state = self.state()
            with self._lock:
                have = [*self._order]
            if have and have[-1] >= step:
                return have[bisect.bisect_left(have, step)]
            if state.state != "waiting" and not state.alive:
                how = {"training": f"no sign of the trainer for {state.age_s:.0f} s"}.get(
                    state.state, f"training {state.state}"
                )
                note = f" ({state.message})" if state.message else ""
                raise TrainerGone(
                    f"step {step} of {self.path} will not come: {how}{note}; it has steps {shorten(have)}"
                )
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(
                    f"no step {step} in {self.path} after {timeout:g} s; it has steps {shorten(have)} "
                    f"and is {state.state}. Wait again, with a longer timeout."
                )
            time.sleep(_POLL_S)

    # Reading what there is.

    def _part(self, step: int) -> StepFile:
        if step not in self._sources:
            self.refresh()
        part = self._sources.get(step)
        if part is None:
            have = sorted(self._sources)
            near = f", nearest {min(have, key=lambda h: abs(h - step))}" if have else ""
            raise NoSuchStep(
                f"no step {step} in {self.path}; it has {shorten(have)}{near}. "
                f"trial.wait(step={step}) blocks until it is written."
            )
        return part

    def _header(self, part: StepFile) -> Header:
        """The header of that very file, checked; a file that is not what its name says is dropped and listed."""
        if part.name not in self._headers:
            while len(self._headers) >= _HEADERS_KEPT:
                del self._headers[next(iter(self._headers))]
            try:
                self._headers[part.name] = self._sound_header(part)
            except Unreachable:
                raise
            except StoreError as problem:
                self._drop(part, str(problem))
                raise
        return self._headers[part.name]

    def _sound_header(self, part: StepFile) -> Header:
        size = self._files.size(part.name) if part.size < 0 else part.size
        header = self._files.header(part.name, size, self._layouts.get(part.layout))
        for wrong in part.differs(header):
            raise StoreError(wrong)
        if header.metadata.get("headscope") != str(FORMAT):
            raise StoreError(f"{part.name}: its format is {header.metadata.get('headscope')!r}, want {FORMAT}")
        if part.layout not in self._layouts:
            _check_keys(header)
        return header

    def _drop(self, part: StepFile, why: str) -> None:
        """Lists a file as damaged; its step is not one of the run's any more."""
        self.damaged[part.name] = why
        attempt = self._attempts.get(part.attempt)
        if attempt is not None and part.step in attempt.order:
            attempt.drop(part.step)
            self._choose_sources()

    def header(self, step: int) -> Header:
        """The header of a step's file: keys, shapes, metadata."""
        with self._lock:
            return self._header(self._part(step))

    def entries(self, step: int) -> dict[str, Entry]:
        """Keys, dtypes and shapes of a step's tensors; nothing is read if the layout is known."""
        with self._lock:
            return self._layout(self._part(step)).entries

    def read(self, step: int, wants: Sequence[tuple[str, tuple[int, ...]]]) -> list[Array]:
        """Parts of a step's tensors by key and leading indices; bfloat16 comes as float32.

        Whole tensors are checked against their checksums, parts cannot be.

        Raises:
            NoSuchStep, NoSuchName: the run has no such step, the step no such tensor.
            StoreError: the file is damaged.
        """
        with self._lock:
            part = self._part(step)
        try:
            with self._lock:
                header = self._header(part)
            found = self._files.read(part.name, header, wants)
        except Unreachable:
            self._drop_deleted()
            self.refresh()
            if step in self._sources or not self._sources:
                raise
            raise NoSuchStep(f"step {step} of {self.path} was thinned; it has {shorten(self._order)}") from None
        for (key, lead), array in zip(wants, found, strict=True):
            if not lead:
                verify(array, key, header)
        return [array.astype(np.float32) if array.dtype.name == "bfloat16" else array for array in found]

    def _series(self, wants: Sequence[tuple[int, str, tuple[int, ...]]]) -> list[Array]:
        """One part of one tensor from each of many steps; over a network, many at a time."""
        if not self._files.remote:
            return [self.read(step, [(key, lead)])[0] for step, key, lead in wants]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda want: self.read(want[0], [want[1:]])[0], wants))

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
        names = set()
        for header in headers:
            layers = [Layer.of(raw, header.name) for raw in header.facts("calls", list)]
            for key in [*header.entries, *(layer.key("weights") for layer in layers)]:
                in_mode, _, name = key.split("/", 2)
                if mode in (None, in_mode) and (regex is None or re.search(regex, name)):
                    names.add(name)
        return sorted(names)

    def _used_layouts(self) -> dict[str, StepFile]:
        """Layouts of the run, each with a file that has it."""
        return {part.layout: part for part in self._sources.values()}

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

    # The fixed examples, and what the model says of them.

    def _probe(self, attempt: int) -> tuple[list[Example], Json]:
        if attempt not in self._examples:
            name = f"a{attempt:03d}/probe.safetensors"
            blob = self._files.get(name)
            if blob is None:
                return [], {}
            try:
                tensors, header = decode_sound(blob, name)
                self._examples[attempt] = examples_of(tensors, header), header.sums
            except StoreError as problem:
                self.damaged[name] = str(problem)
                self._examples[attempt] = [], {}
        return self._examples[attempt]

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


def _check_keys(header: Header) -> None:
    wrong = [key for key in header.entries if not _KEY.fullmatch(key)]
    if wrong:
        raise StoreError(f"{header.name}: tensor {wrong[0]!r} is not named <mode>/<batch>/<name>")
