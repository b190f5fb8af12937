"""The files of a run: put a step whole, read any part of it, survive a crash.

`docs/format.md` says what lies where. Access is through obstore, so that a folder, `s3://` and `gs://` behave alike;
but a folder is listed and read by hand, many times as fast and without following pipes or links to elsewhere. One put
makes a file visible as a whole; nothing that readers rely on is ever changed afterwards.
"""

from __future__ import annotations

import bisect
import json
import os
import queue
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from .blob import Array, Header, Image, Json, array_of, encode, header_length, loads, parse_header, truthful
from .errors import NoSuchName, StoreError, nearest, shorten

FORMAT = 1
ROWS = 256
_STEP = re.compile(r"a(\d{3})/steps/(\d{10})-r(\d{5})-of-(\d{5})-([0-9a-f]{8})\.safetensors", re.ASCII)
_BLOCK = re.compile(r"a(\d{3})/timeline/r(\d{5})-(\d{5})\.safetensors", re.ASCII)
_ATTEMPT = re.compile(r"a\d{3}", re.ASCII)
_STAGED = re.compile(r"#\d+$")
_OURS = re.compile(r"(headscope|live|attempt)\.json#\d+|[\w-]+\.safetensors#\d+", re.ASCII)
_STALE_S = 60.0
_LARGEST_JSON = 16 << 20
_LARGEST_WHOLE = 1 << 30
_SETTLED_S = 2.0
_TICK_S = 0.25


class Unreachable(StoreError):
    """A file or folder that cannot be read now; it may be read later."""


class StepFile(NamedTuple):
    """One rank's part of a step, as its name and the listing tell it; the size is -1 where it was not asked for."""

    name: str
    size: int
    attempt: int
    step: int
    rank: int
    world: int
    layout: str

    @classmethod
    def of(cls, name: str, size: int) -> StepFile | None:
        """The step file of that name, or None if it is something else."""
        match = _STEP.fullmatch(name)
        if match is None:
            return None
        attempt, step, rank, world, layout = match.groups()
        return cls._make((name, size, int(attempt), int(step), int(rank), int(world), layout))

    def differs(self, header: Header) -> list[str]:
        """What its metadata says of itself that its name does not."""
        found = []
        for name in ("attempt", "step", "rank", "world", "layout"):
            inside, outside = header.metadata.get(name), str(getattr(self, name))
            if inside != outside:
                found.append(f"{self.name}: its {name} is {inside!r} inside, {outside!r} by name")
        return found


def block_of(name: str) -> tuple[int, int, int] | None:
    """(attempt, rank, number) of a timeline block's name, or None if it is something else."""
    match = _BLOCK.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


_opened_in: set[int] = set()


def _open(path: str | Path, *, create: bool) -> ObjectStore:
    # obstore 0.12's threads do not live on in a forked process, where it would wait for them for ever.
    _opened_in.add(os.getpid())
    if len(_opened_in) > 1:
        raise StoreError(
            f"{str(path)!r} cannot be opened in this process: it was forked from one that had a run open already; "
            f"start it by multiprocessing's 'spawn' or 'forkserver'"
        )
    if "://" in str(path):
        return from_url(str(path))
    return LocalStore(str(Path(path).expanduser().absolute()), mkdir=create)


class Files:
    """A run's files, for reading. The folder need not exist yet.

    Args:
        path: of the run.
        sized: a listing of a folder asks for the sizes of this many of the newest steps; the others' are -1.
    """

    def __init__(self, path: str | Path, *, sized: int | None = None) -> None:
        self.path = str(path)
        self._sized = sized
        self._local = None if "://" in self.path else Path(self.path).expanduser().absolute()
        self.remote = self._local is None
        self._store: ObjectStore | None = None
        self._seen: dict[str, tuple[int, list[str]]] = {}

    def _ready(self) -> ObjectStore | None:
        if self._store is None:
            if self._local is not None and not self._local.is_dir():
                return None
            self._store = _open(self.path, create=False)
        return self._store

    def names(self, after: str = "") -> list[tuple[str, int, str]]:
        """(name, size, version) of every file whose name sorts after `after`: one listing.

        In a folder only the places that the format has are looked at: a link to elsewhere, or a folder of something
        else, costs nothing.
        """
        try:
            if self._local is not None:
                return sorted(self._scan(self._local, after))
            store = self._ready()
            assert store is not None
            found = [
                (item["path"], item["size"], item["e_tag"] or str(item["last_modified"]))
                for chunk in obstore.list(store, offset=after or None, chunk_size=1000)
                for item in chunk
            ]
        except (BaseError, OSError) as problem:
            raise Unreachable(f"cannot list {self.path}: {_short(problem)}") from None
        return sorted(found)

    def _scan(self, root: Path, after: str) -> Iterator[tuple[str, int, str]]:
        try:
            with os.scandir(root) as items:
                inside = {item.name: item.is_dir() for item in items}
        except (FileNotFoundError, NotADirectoryError):
            return
        yield from self._sizes(root, "", [name for name, folder in inside.items() if not folder], after)
        attempts = sorted(name for name, folder in inside.items() if folder and _ATTEMPT.fullmatch(name))
        for attempt in [name for name in attempts if f"{name}/~" > after]:
            for folder in (f"{attempt}/", f"{attempt}/steps/", f"{attempt}/timeline/"):
                yield from self._sizes(root, folder, self._listed(root, folder), after)

    def _listed(self, root: Path, folder: str) -> list[str]:
        """The names in a folder, in order; not asked for again where it has not changed for a while."""
        try:
            changed = (root / folder).stat().st_mtime_ns
            if self._seen.get(folder, (None, []))[0] == changed:
                return self._seen[folder][1]
            now_ns = time.time_ns()
            names = sorted(os.listdir(root / folder))  # noqa: PTH208 - names only, ten times as fast as iterdir
        except (FileNotFoundError, NotADirectoryError):
            return []
        # Two files may come in one tick of the disk's clock: a folder that changed just now is looked at again.
        if now_ns - changed > _SETTLED_S * 1e9:
            self._seen[folder] = (changed, names)
        return names

    def _sizes(self, root: Path, folder: str, names: list[str], after: str) -> Iterator[tuple[str, int, str]]:
        if after.startswith(folder):
            names = names[bisect.bisect_right(names, after[len(folder) :]) :] if folder else names
        elif folder and folder < after:
            return
        asked = len(names) - self._sized if self._sized is not None and folder.endswith("/steps/") else 0
        if asked > 0:
            yield from [(folder + name, -1, "") for name in names[:asked] if "#" not in name and name.isprintable()]
            names = names[asked:]
        for name in names:
            if _STAGED.search(name) or (not folder and name <= after) or not name.isprintable():
                continue
            try:
                found = os.stat(root / (folder + name))  # noqa: PTH116 - twice as fast as Path.stat
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode):
                yield folder + name, found.st_size, f"{found.st_mtime_ns}-{found.st_ino}-{found.st_size}"

    def _whole(self, name: str) -> None:
        """Refuses what is no plain file: reading a pipe would not end."""
        if self._local is not None and not stat.S_ISREG(os.stat(f"{self._local}/{name}").st_mode):  # noqa: PTH116
            raise StoreError(f"{name} in {self.path} is not a file")

    def get(self, name: str, most: int = _LARGEST_WHOLE) -> bytes | None:
        """A whole file, or None if there is none.

        Raises:
            StoreError: it has more than `most` bytes, or cannot be read.
        """
        store = self._ready()
        if store is None:
            return None
        try:
            self._whole(name)
            found = obstore.get(store, name)
            size = found.meta["size"]
            if size > most:
                raise StoreError(f"{name} in {self.path} has {size} bytes, at most {most} are read at once")
            return bytes(found.bytes())
        except FileNotFoundError:
            return None
        except (BaseError, OSError, ValueError) as problem:
            raise Unreachable(f"cannot read {name} in {self.path}: {_short(problem)}") from None

    def run(self) -> list[tuple[str, int, str]]:
        """The listing of what must be a run.

        Raises:
            NoSuchName: it is none; the message names runs that lie in it.
        """
        names = self.names()
        if any(name == "headscope.json" for name, _, _ in names):
            return names
        if self._local is not None and not self._local.is_dir():
            there = "is a file" if self._local.exists() else "does not exist"
        else:
            inside = [name.removesuffix("/headscope.json") for name, _, _ in names if name.endswith("/headscope.json")]
            if self._local is not None:
                inside = sorted(found.parent.name for found in self._local.glob("*/headscope.json"))
            there = f"has runs in it: {shorten(inside)}" if inside else "has no headscope.json"
        raise NoSuchName(f"no run in {self.path}, which {there}; give the folder that was passed to headscope.watch")

    def size(self, name: str) -> int:
        """How many bytes a file has."""
        try:
            if self._local is not None:
                return os.stat(f"{self._local}/{name}").st_size  # noqa: PTH116
            store = self._ready()
            assert store is not None
            return int(obstore.head(store, name)["size"])
        except (BaseError, OSError) as problem:
            raise Unreachable(f"cannot read {name} in {self.path}: {_short(problem)}") from None

    def json(self, name: str) -> Json | None:
        """A small JSON file, or None if there is none."""
        raw = self.get(name, _LARGEST_JSON)
        if raw is None:
            return None
        try:
            found = loads(raw)
        except (ValueError, RecursionError) as problem:
            raise StoreError(f"{name} in {self.path} is not JSON: {problem}") from None
        if not isinstance(found, dict):
            raise StoreError(f"{name} in {self.path} is {type(found).__name__}, not an object")
        return found

    def _ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        try:
            found = self._from_disk(name, spans) if self._local is not None else self._from_store(name, spans)
        except FileNotFoundError as problem:
            gone = self._local is not None and not self._local.is_dir()
            raise Unreachable(
                f"cannot read {name}: {self.path} is gone"
                if gone
                else f"cannot read {name} in {self.path}: {_short(problem)}"
            ) from None
        except (BaseError, OSError, ValueError) as problem:
            raise Unreachable(f"cannot read {name} in {self.path}: {_short(problem)}") from None
        for piece, (start, end) in zip(found, spans, strict=True):
            if len(piece) != end - start:
                raise Unreachable(f"{name}: bytes {start} to {end} were asked for, {len(piece)} bytes came")
        return found

    def _from_store(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        store = self._ready()
        assert store is not None
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        return [bytes(piece) for piece in obstore.get_ranges(store, name, starts=starts, ends=ends)]

    def _from_disk(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """As `_from_store`, in a fifth of the time; a pipe is not waited for."""
        descriptor = os.open(f"{self._local}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("it is not a file")
            return [os.pread(descriptor, end - start, start) for start, end in spans]
        finally:
            os.close(descriptor)

    def span(self, name: str, start: int, end: int) -> bytes:
        """A file's bytes from `start` to `end`."""
        return self._ranges(name, [(start, end)])[0]

    def header(self, name: str, size: int, like: Header | None = None) -> Header:
        """The header of a file of `size` bytes: one ranged read, two if it is long; `like` as in `parse_header`."""
        first = min(size, like.start if like is not None and like.sealed else 32768)
        if first < 8:
            raise StoreError(f"{name}: {size} bytes are too few for a safetensors file; it is damaged or unfinished")
        head = self._ranges(name, [(0, first)])[0]
        length = header_length(head, size, name)
        if 8 + length > first:
            head += self._ranges(name, [(first, 8 + length)])[0]
        return parse_header(head, size, name, like)

    def read(self, name: str, header: Header, wants: Sequence[tuple[str, tuple[int, ...]]]) -> list[Array]:
        """Parts of tensors of one file, asked for together.

        Args:
            name: of the file.
            header: of the file, or of another of the same layout.
            wants: (key, leading indices) each; no indices means the whole tensor.

        Raises:
            NoSuchName: a key that the file has not.
        """
        spans, shapes = [], []
        for key, lead in wants:
            entry = header.entries.get(key)
            if entry is None:
                raise NoSuchName(f"no tensor {key!r} in {name}{nearest(key, list(header.entries))}")
            start, shape = entry.start, entry.shape
            size = entry.end - entry.start
            for index in lead:
                if not shape or not 0 <= index < shape[0]:
                    raise NoSuchName(
                        f"index {index} in {key!r} of {name}, whose axis has {shape[0] if shape else 'no entry'}"
                    )
                size //= shape[0]
                start += index * size
                shape = shape[1:]
            spans.append((start, start + size))
            shapes.append((entry.dtype, shape))
        real = [span for span in spans if span[1] > span[0]]
        pieces = iter(self._ranges(name, real) if real else [])
        found = []
        for (key, _), (start, end), (dtype, shape) in zip(wants, spans, shapes, strict=True):
            found.append(array_of(next(pieces) if end > start else b"", dtype, shape))
            truthful(found[-1], key, name)
        return found


def _short(problem: BaseException) -> str:
    """The first line of an obstore error; the rest is its debug print."""
    return str(problem).strip().split("\n", 1)[0]


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
        max_bytes: of all steps of this attempt; above it, older steps are thinned.
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
            self._store = _open(self.path, create=True)
            self._create("headscope.json", {"format": FORMAT, "created": time.time()})
            self.attempt = self._claim()
            self._sweep()
        except (BaseError, OSError) as problem:
            raise StoreError(
                f"cannot write to {str(self.path)!r}: {_short(problem)}; choose a folder that can be written"
            ) from None
        self._free: list[Image] = []
        self._queue: queue.Queue[_Job] = queue.Queue(2)
        self._lock = threading.Lock()
        self._rows: list[_Row] = []
        self._block = 0
        self._dirty = False
        self._told: set[str] = set()
        self._tired = self._left = False
        self._sizes: dict[int, tuple[str, int]] = {}
        self._thinned = 0
        self._live: Json = {"state": "training", "step": None, "attempt": self.attempt, "counter": 0, "message": ""}
        self._thread = threading.Thread(target=self._work, name="headscope-writer", daemon=True)
        try:
            self._put_live()
        except (BaseError, OSError) as problem:
            raise StoreError(
                f"cannot write to {str(self.path)!r}: {_short(problem)}; choose a folder that can be written"
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
            self._tell(f"the probe was not written to {self.path}: {_short(problem)}")

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
            message = f"{what} was not written to {self.path}: {type(problem).__name__}: {_short(problem)}"
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
        self._sizes[job.step] = (name, len(blob))

    def _thin(self) -> None:
        """Deletes steps until those left are within `max_bytes`: the older, the wider apart."""
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
