"""Writing one attempt of a run, from a thread of its own: put a step whole, survive what stores do."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from .blob import Array, Image, Json, encode
from .errors import StoreError
from .store import FORMAT, StepFile, first_line, open_store

ROWS = 256
_OURS = re.compile(r"(headscope|live|attempt)\.json#\d+|[\w-]+\.safetensors#\d+", re.ASCII)
_STALE_S = 60.0
_TICK_S = 0.25


@dataclass
class _Row:
    step: int
    time: float
    values: dict[str, float]


@dataclass
class _Job:
    step: int
    image: Image
    finish: Callable[[Json], tuple[Json, object]]


_END = _Job(-1, Image(), lambda metadata: (metadata, None))


@dataclass
class Writer:
    """Writes one attempt of a run from a background thread.

    What the caller waits for is the filling of an `image`. `submit` queues it; the thread checks, seals and puts it.
    When two are waiting already, `ready` waits up to `patience_s` once, then says no until there is room again: that
    capture is left out and counted.

    Args:
        path: folder or `s3://`, `gs://` address of the run; made if missing.
        facts: of the attempt, for `attempt.json`.
        say: told once of each kind of problem, in one line.
        closing_s: how long `close` waits for what is not written yet.
        max_bytes: of all steps of the run, those of older attempts too; above it, older steps are thinned.
    """

    path: str | Path
    facts: Json
    say: Callable[[str], None]
    interval_s: float = 2.0
    patience_s: float = 5.0
    closing_s: float = 60.0
    max_bytes: int | None = None
    attempt: int = field(init=False)
    skipped: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        try:
            self._store = open_store(self.path, create=True)
            self._create("headscope.json", {"format": FORMAT, "created": time.time()})
            self.attempt = self._claim()
            self._sweep()
            self._sizes, self._before = self._older() if self.max_bytes is not None else ({}, 0)
        except (BaseError, OSError) as problem:
            raise StoreError(
                f"cannot write to {str(self.path)!r}: {first_line(problem)}; choose a folder that can be written"
            ) from None
        self._free: list[Image] = []
        self._queue: queue.Queue[_Job] = queue.Queue(2)
        self._lock = threading.Lock()
        self._rows: list[_Row] = []
        self._block = 0
        self._dirty = False
        self._told: set[str] = set()
        self._tired = self._left = False
        self._thinned = 0
        self._live: Json = {"state": "training", "step": None, "attempt": self.attempt, "counter": 0, "message": ""}
        self._thread = threading.Thread(target=self._work, name="headscope-writer", daemon=True)
        try:
            self._put_live()
        except (BaseError, OSError) as problem:
            raise StoreError(
                f"cannot write to {str(self.path)!r}: {first_line(problem)}; choose a folder that can be written"
            ) from None
        self._thread.start()

    def _create(self, name: str, facts: Json) -> bool:
        try:
            obstore.put(self._store, name, json.dumps(facts, indent=1).encode(), mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def _claim(self) -> int:
        folders = obstore.list_with_delimiter(self._store)["common_prefixes"]
        taken = [int(match[1]) for folder in folders if (match := re.fullmatch(r"a(\d{3})/?", folder))]
        attempt = max(taken, default=-1) + 1
        while attempt < 1000:
            if self._create(f"a{attempt:03d}/attempt.json", self.facts):
                return attempt
            attempt += 1
        raise StoreError(f"{str(self.path)!r} has 1,000 attempts; choose another folder")

    def _sweep(self) -> None:
        """Deletes what puts of killed trainers left half written; what is younger may be another writer's."""
        if "://" in str(self.path):
            return
        root = Path(self.path).expanduser().absolute()
        folders = [
            folder for n in range(self.attempt) for folder in (f"a{n:03d}", f"a{n:03d}/steps", f"a{n:03d}/timeline")
        ]
        for folder in ("", *folders):
            with suppress(OSError):
                for file in (root / folder).iterdir():
                    if _OURS.fullmatch(file.name) and time.time() - file.lstat().st_mtime > _STALE_S:
                        file.unlink()

    def put_probe(self, blob: bytes) -> None:
        """Puts the fixed examples, now: they must be there before the first step is."""
        try:
            self._put(f"a{self.attempt:03d}/probe.safetensors", blob)
        except (BaseError, OSError) as problem:
            self._tell(f"the probe was not written to {self.path}: {first_line(problem)}")

    def ready(self) -> bool:
        """Whether there is room for one more step; see the class for how long it waits."""
        give_up = time.monotonic() + (0 if self._tired else self.patience_s)
        while self._queue.full():
            if time.monotonic() >= give_up:
                self._tired = True
                self.skip(f"writing to {self.path} is slower than training: captures are left out until it catches up")
                return False
            time.sleep(0.005)
        self._tired = False
        return True

    def skip(self, message: str) -> None:
        """Counts a capture that was not made or not written."""
        self.skipped += 1
        self._tell(message)

    def image(self) -> Image:
        """A file image to fill."""
        with self._lock:
            image = self._free.pop() if self._free else Image()
        image.again()
        return image

    def submit(self, step: int, image: Image, finish: Callable[[Json], tuple[Json, object]]) -> None:
        """Queues a filled image.

        Args:
            step: the optimiser step it belongs to.
            image: filled; not to be touched afterwards.
            finish: called on the writer's thread with the metadata so far; returns the whole metadata (JSON values) and
                the facts that are part of the layout.
        """
        self._queue.put(_Job(step, image, finish))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers to the time line; the same step's go into one row."""
        with self._lock:
            if self._rows and self._rows[-1].step == step:
                self._rows[-1].values.update(values)
            else:
                self._rows.append(_Row(step, time.time(), dict(values)))
            self._dirty = True

    @property
    def running(self) -> bool:
        """Whether it still writes."""
        return self._thread.is_alive()

    def note(self, message: str) -> None:
        """Shows a line to whoever looks at the run."""
        with self._lock:
            self._live["message"] = message

    def close(self, state: str = "ended", message: str = "") -> None:
        """Writes what is waiting, and how training ended; a message that was noted stays if none is given."""
        if not self.running:
            return
        until = time.monotonic() + self.closing_s
        with suppress(queue.Full):
            self._queue.put(_END, timeout=self.closing_s)
        self._thread.join(max(0.0, until - time.monotonic()))
        with self._lock:
            self._live |= {"state": state, "message": message or self._live["message"]}
        if self.running:
            self._left = True
            waiting = self._queue.qsize() + 1
            self._tell(f"{self.path} did not answer for {self.closing_s:g} s: {waiting} captures or so are not written")
            return
        self._end()

    def _end(self) -> None:
        self._guarded("the end", self._flush)
        self._guarded("live.json", self._put_last)

    def _put(self, name: str, blob: bytes | memoryview) -> None:
        obstore.put(self._store, name, blob, use_multipart=False)

    def _tell(self, message: str, kind: str = "") -> None:
        kind = kind or message.split(":")[0]
        if kind not in self._told:
            self._told.add(kind)
            self.say(message)

    def _guarded(self, what: str, action: Callable[[], None], kind: str = "") -> bool:
        try:
            action()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as problem:  # A panic within obstore is no Exception.
            message = f"{what} was not written to {self.path}: {type(problem).__name__}: {first_line(problem)}"
            # One line for a disk that is full, whatever it was too full for.
            disk = re.search(r"\(os error \d+\)", message)
            self._tell(message, disk[0] if disk else f"{kind or what} {type(problem).__name__}")
            return False
        return True

    def _work(self) -> None:
        live = flushed = time.monotonic()
        while True:
            try:
                job = self._queue.get(timeout=_TICK_S)
            except queue.Empty:
                job = None
            if job is _END or (job is None and self._left):
                if self._left:
                    self._end()
                return
            if job is not None:
                self._write(job)
            now = time.monotonic()
            if self._dirty and (job is not None or now - flushed >= 2 * _TICK_S):
                self._guarded("the time line", self._flush)
                flushed = now
            if job is not None or now - live >= self.interval_s:
                self._guarded("live.json", self._put_live)
                live = now

    def _write(self, job: _Job) -> None:
        if not self._guarded(f"step {job.step}", lambda: self._put_step(job), "step"):
            self.skipped += 1
        self._guarded("thinning", self._thin, "thinning")
        with self._lock:
            self._free.append(job.image)

    def _put_step(self, job: _Job) -> None:
        metadata: Json = {"headscope": str(FORMAT), "attempt": self.attempt, "step": job.step, "rank": 0, "world": 1}
        metadata |= {"time": time.time(), "crc32c": job.image.checksums(), "layout": "0" * 8}
        metadata, facts = job.finish(metadata)
        strings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        strings["layout"] = layout = job.image.layout(strings, facts)
        name = f"a{self.attempt:03d}/steps/{job.step:010d}-r00000-of-00001-{layout}.safetensors"
        blob = job.image.seal(strings)
        self._put(name, blob)
        self._live["step"] = job.step
        self._sizes[self._before + job.step] = (name, len(blob))

    def _older(self) -> tuple[dict[int, tuple[str, int]], int]:
        """The steps of older attempts, counted on from attempt to attempt, and where this one's begin."""
        parts = [StepFile.of(i["path"], i["size"]) for chunk in obstore.list(self._store) for i in chunk]
        found = sorted((part for part in parts if part is not None), key=lambda part: (part.attempt, part.step))
        sizes: dict[int, tuple[str, int]] = {}
        base, attempt = 0, -1
        for part in found:
            if part.attempt != attempt:
                base, attempt = max(sizes, default=-1) + 1, part.attempt
            sizes[base + part.step] = (part.name, part.size)
        return sizes, max(sizes, default=-1) + 1

    def _thin(self) -> None:
        """Deletes steps of the run until those left are within `max_bytes`: the older, the wider apart."""
        steps = sorted(self._sizes)
        while (
            self.max_bytes is not None and len(steps) > 2 and sum(s for _, s in self._sizes.values()) > self.max_bytes
        ):
            gaps = {
                steps[i]: (steps[i + 1] - steps[i - 1]) / (1 + steps[-1] - steps[i]) for i in range(1, len(steps) - 1)
            }
            least = min(gaps, key=gaps.__getitem__)
            obstore.delete(self._store, self._sizes[least][0])
            del self._sizes[least]
            steps.remove(least)
            self._thinned += 1
            self._tell(
                f"captures of this run reached {self.max_bytes:,} bytes: older steps are thinned from now on", "thin"
            )

    def _put_last(self) -> None:
        """The last word, unless a later attempt has taken it."""
        with suppress(FileNotFoundError, ValueError):
            newest = json.loads(bytes(obstore.get(self._store, "live.json").bytes()))
            if newest["attempt"] > self.attempt:
                return
        self._put_live()

    def _put_live(self) -> None:
        with self._lock:
            self._live |= {"counter": self._live["counter"] + 1, "interval_s": self.interval_s, "skipped": self.skipped}
            self._live["thinned"] = self._thinned
            blob = json.dumps(self._live).encode()
        self._put("live.json", blob)

    def _flush(self) -> None:
        """Puts the open block, and before it any block that is full."""
        while self._dirty:
            with self._lock:
                rows, more = self._rows[:ROWS], len(self._rows) > ROWS
                blob = _columns(rows)
                self._dirty = more
            try:
                self._put(f"a{self.attempt:03d}/timeline/r00000-{self._block:05d}.safetensors", blob)
            except BaseException:
                self._dirty = True
                raise
            if more:
                with self._lock:
                    self._rows = self._rows[ROWS:]
                    self._block += 1


def _columns(rows: Sequence[_Row]) -> bytes:
    columns: dict[str, Array] = {
        "step": np.array([row.step for row in rows], np.int64),
        "time": np.array([row.time for row in rows], np.float64),
    }
    for name in sorted({name for row in rows for name in row.values}):
        columns[name] = np.array([row.values.get(name, np.nan) for row in rows], np.float64)
        logged = np.array([name in row.values for row in rows])
        if (np.isnan(columns[name]) & logged).any():
            columns[f"{name}:nan"] = np.isnan(columns[name]) & logged
    return encode(columns, {"headscope": str(FORMAT)})
