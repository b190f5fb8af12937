"""The files of a run as they come: which steps there are, and from which (re)start of training each one is."""

from __future__ import annotations

import bisect
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .blob import Array, Entry, Header, Json, decode_sound, verify
from .errors import NoSuchStep, NotSupported, StoreError, TrainerGone, shorten
from .facts import Example, State, examples_of, live_of
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


class History:
    """A run's steps, live; what `Trial` stands on.

    Attributes:
        damaged: name of a file to what is wrong with it.
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

    def _part(self, step: int) -> StepFile:
        if step not in self._sources:
            self.refresh()
        part = self._sources.get(step)
        if part is None:
            broken = [why for name, why in self.damaged.items() if f"/steps/{step:010d}-" in name]
            if broken:
                raise StoreError(broken[0])
            have = self._order
            near = f", nearest {min(have, key=lambda h: abs(h - step))}" if have else ""
            to_come = self._live.get("state") == "training" and step > max(have, default=-1)
            raise NoSuchStep(
                f"no step {step} in {self.path}; it has {shorten(have)}{near}."
                + (f" trial.wait(step={step}) blocks until it is written." if to_come else "")
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

    def _used_layouts(self) -> dict[str, StepFile]:
        """Layouts of the run, each with a file that has it."""
        return {part.layout: part for part in self._sources.values()}

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


def _check_keys(header: Header) -> None:
    wrong = [key for key in header.entries if not _KEY.fullmatch(key)]
    if wrong:
        raise StoreError(f"{header.name}: tensor {wrong[0]!r} is not named <mode>/<batch>/<name>")
