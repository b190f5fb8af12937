"""The files of a run: put a step whole, read any part of it, survive a crash.

`docs/format.md` says what lies where. All access is through obstore, so that a folder, `s3://` and `gs://` behave
alike. One put makes a file visible as a whole; nothing that readers rely on is ever changed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import queue
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import obstore
from crc32c import crc32c
from numpy.typing import NDArray
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from .errors import NoSuchName, StoreError, nearest

Array = NDArray[Any]
Json = dict[str, Any]
T = TypeVar("T")

FORMAT = 1
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PAGE = 4096
_SLACK = 512
_LARGEST_HEADER = 100_000_000
_STEP = re.compile(r"a(\d{3})/steps/(\d{10})-r(\d{5})-of-(\d{5})-([0-9a-f]{8})\.safetensors")
_BLOCK = re.compile(r"a(\d{3})/timeline/r(\d{5})-(\d{5})\.safetensors")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]|(^|/)\.\.(/|$)|^/")
ROWS = 256
_TICK_S = 0.25


class Unreachable(StoreError):
    """A file or folder that cannot be read now; it may be read later."""


@dataclass(frozen=True)
class StepFile:
    """One rank's part of a step, as its name and the listing tell it."""

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
        attempt, step, rank, world = (int(match[i]) for i in range(1, 5))
        return cls(name, size, attempt, step, rank, world, match[5])


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `end` of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds."""

    name: str
    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int

    def facts(self, key: str, kind: type[T]) -> T:
        """A metadata entry that is JSON, decoded; an empty one of that kind if there is none.

        Raises:
            StoreError: it is not JSON, or of another kind.
        """
        try:
            found = json.loads(self.metadata[key]) if key in self.metadata else kind()
        except (ValueError, RecursionError) as problem:
            raise StoreError(f"{self.name}: metadata {key!r} is not JSON: {problem}") from None
        if not isinstance(found, kind):
            raise StoreError(f"{self.name}: metadata {key!r} is {type(found).__name__}, not {kind.__name__}")
        return found


def block_of(name: str) -> tuple[int, int, int] | None:
    """(attempt, rank, number) of a timeline block's name, or None if it is something else."""
    match = _BLOCK.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


def parse_header(head: bytes, size: int, name: str) -> Header:
    """The header of a safetensors file, checked against the file's size.

    Args:
        head: at least the first 8 bytes and the header.
        size: of the whole file in bytes.
        name: of the file, for messages.

    Raises:
        StoreError: anything that the format does not allow; the message names file and byte.
    """
    length = _header_length(head, size, name)
    try:
        raw = json.loads(head[8 : 8 + length], object_pairs_hook=_no_twice)
    except (ValueError, RecursionError) as problem:
        raise StoreError(
            f"{name}: the header, bytes 8 to {8 + length}, is not JSON as it should be: {problem}"
        ) from None
    if not isinstance(raw, dict):
        raise StoreError(f"{name}: the header at byte 8 is {type(raw).__name__}, not an object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StoreError(f"{name}: __metadata__ must hold strings only")
    entries = {key: _entry(key, raw[key], 8 + length, name) for key in raw}
    at = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise StoreError(
                f"{name}: tensor {key!r} begins at byte {entry.start}, but {at} is where the one before ends"
            )
        at = entry.end
    if at != size:
        raise StoreError(f"{name}: the file has {size} bytes, its header promises {at}; it is damaged or unfinished")
    return Header(name, entries, metadata, size)


def _header_length(head: bytes, size: int, name: str) -> int:
    if len(head) < 8:
        raise StoreError(f"{name}: {size} bytes are too few for a safetensors file; it is damaged or unfinished")
    length: int = struct.unpack("<Q", head[:8])[0]
    if length > min(size - 8, _LARGEST_HEADER):
        raise StoreError(f"{name}: byte 0 promises a header of {length} bytes, the file has {size}; it is damaged")
    return length


def _no_twice(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _entry(key: str, raw: Any, base: int, name: str) -> Entry:
    try:
        dtype = DTYPES[raw["dtype"]]
        shape = tuple(raw["shape"])
        start, end = raw["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise StoreError(
            f"{name}: tensor {key!r} is described by {raw!r}; want a known dtype, shape and data_offsets"
        ) from None
    whole = all(type(n) is int and 0 <= n < 2**48 for n in (*shape, start, end))
    if _UNSAFE.search(key) or not whole or end - start != _count(shape) * dtype.itemsize:
        raise StoreError(f"{name}: tensor {key!r} of shape {shape} does not fit its bytes {start} to {end}")
    return Entry(dtype, shape, base + start, base + end)


def _count(shape: Iterable[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def encode(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """One safetensors blob of these tensors and strings, with checksums."""
    image = Image()
    for key, tensor in tensors.items():
        np.copyto(image.slot(key, tensor.dtype, tensor.shape), tensor)
    return bytes(image.seal({**metadata, "crc32c": json.dumps(image.checksums())}))


def decode(blob: bytes, name: str = "blob") -> tuple[dict[str, Array], Header]:
    """The tensors of a safetensors blob and its header."""
    header = parse_header(blob[: 8 + _header_length(blob[:8], len(blob), name)], len(blob), name)
    return {key: _array(blob[e.start : e.end], e.dtype, e.shape) for key, e in header.entries.items()}, header


def faults(blob: bytes, name: str) -> list[str]:
    """What is wrong with a whole file: its structure, and every checksum that it carries."""
    try:
        tensors, header = decode(blob, name)
        sums = header.facts("crc32c", dict)
    except StoreError as problem:
        return [str(problem)]
    missing = [f"{name}: tensor {key!r} carries no checksum" for key in tensors if key not in sums]
    wrong = [
        f"{name}: tensor {key!r} from byte {header.entries[key].start} on does not match its checksum"
        for key, tensor in tensors.items()
        if key in sums and sums[key] != checksum(tensor)
    ]
    return missing + wrong


def checksum(tensor: Array) -> str:
    """crc32c of a tensor's bytes, as 8 hex digits."""
    return f"{crc32c(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data):08x}"


def _array(raw: Any, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
    return np.frombuffer(raw, dtype).reshape(tuple(shape))


class Image:
    """A safetensors file in one buffer, filled in place.

    The first time round its layout is not known: slots are arrays of their own, and `seal` copies them together. Used
    again (`again`) with the same slots, they are views into the file, and sealing copies nothing.
    """

    def __init__(self) -> None:
        self._slots: dict[str, Array] = {}
        self._views: dict[str, Array] = {}
        self._buffer = bytearray()
        self._header_size = 0

    def slot(self, key: str, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        """An array to fill; its bytes become the tensor of that key."""
        if key in self._slots:
            raise StoreError(f"tensor {key!r} stands twice in one file")
        if dtype not in _CODES:
            raise StoreError(f"tensor {key!r} has dtype {dtype}, the format knows {', '.join(DTYPES)}")
        view = self._views.get(key)
        if view is None or view.dtype != dtype or view.shape != tuple(shape):
            view = np.empty(tuple(shape), dtype)
        self._slots[key] = view
        return view

    def __getitem__(self, key: str) -> Array:
        return self._slots[key]

    def again(self) -> None:
        """Empties the image for the next file."""
        self._slots = {}

    def checksums(self) -> dict[str, str]:
        """crc32c of every tensor's bytes, as 8 hex digits."""
        return {key: checksum(array) for key, array in self._slots.items()}

    def layout(self, metadata: Mapping[str, str], facts: object) -> str:
        """8 hex digits that stand for the header's length, the tensors' places and `facts`."""
        entries, _ = self._entries()
        size = max(self._header_size, self._needed(metadata, entries))
        text = json.dumps([size, entries, facts], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def seal(self, metadata: Mapping[str, str]) -> memoryview:
        """The file's bytes; valid until the image is used again."""
        entries, size = self._entries()
        needed = self._needed(metadata, entries)
        same = self._slots.keys() == self._views.keys() and all(self._views[k] is s for k, s in self._slots.items())
        if not same or needed > self._header_size:
            self._header_size = max(needed, self._header_size)
            self._rebuild(entries, size)
        header = _header_bytes(metadata, entries).ljust(self._header_size - 8)
        self._buffer[: self._header_size] = struct.pack("<Q", len(header)) + header
        return memoryview(self._buffer)

    def _entries(self) -> tuple[Json, int]:
        entries: Json = {}
        at = 0
        for key in sorted(self._slots, key=lambda key: (-self._slots[key].dtype.itemsize, key)):
            array = self._slots[key]
            entries[key] = {
                "dtype": _CODES[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [at, at + array.nbytes],
            }
            at += array.nbytes
        return entries, at

    @staticmethod
    def _needed(metadata: Mapping[str, str], entries: Json) -> int:
        size = 8 + len(_header_bytes(metadata, entries)) + _SLACK
        return -(-size // _PAGE) * _PAGE

    def _rebuild(self, entries: Json, size: int) -> None:
        self._buffer = bytearray(self._header_size + size)
        self._views = {}
        for key, entry in entries.items():
            old = self._slots[key]
            start = self._header_size + entry["data_offsets"][0]
            view = np.frombuffer(self._buffer, old.dtype, old.size, start).reshape(old.shape)
            np.copyto(view, old)
            self._views[key] = self._slots[key] = view


def _header_bytes(metadata: Mapping[str, str], entries: Json) -> bytes:
    whole = {"__metadata__": dict(metadata), **entries}
    return json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()


def _open(path: str | Path, *, create: bool) -> ObjectStore:
    if "://" in str(path):
        return from_url(str(path))
    return LocalStore(str(Path(path).expanduser().absolute()), mkdir=create)


class Files:
    """A run's files, for reading. The folder need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._store: ObjectStore | None = None

    def _ready(self) -> ObjectStore | None:
        if self._store is None:
            if "://" not in self.path and not Path(self.path).expanduser().is_dir():
                return None
            self._store = _open(self.path, create=False)
        return self._store

    def names(self, after: str = "") -> list[tuple[str, int, str]]:
        """(name, size, version) of every file whose name sorts after `after`: one listing."""
        store = self._ready()
        if store is None:
            return []
        try:
            found = [
                (item["path"], item["size"], item["e_tag"] or str(item["last_modified"]))
                for chunk in obstore.list(store, offset=after or None, chunk_size=1000)
                for item in chunk
            ]
        except (BaseError, OSError) as problem:
            raise Unreachable(f"cannot list {self.path}: {_short(problem)}") from None
        return sorted(found)

    def get(self, name: str) -> bytes | None:
        """A whole file, or None if there is none."""
        store = self._ready()
        if store is None:
            return None
        try:
            return bytes(obstore.get(store, name).bytes())
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as problem:
            raise Unreachable(f"cannot read {name} in {self.path}: {_short(problem)}") from None

    def json(self, name: str) -> Json | None:
        """A small JSON file, or None if there is none."""
        raw = self.get(name)
        if raw is None:
            return None
        try:
            found = json.loads(raw)
        except ValueError as problem:
            raise StoreError(f"{name} in {self.path} is not JSON: {problem}") from None
        if not isinstance(found, dict):
            raise StoreError(f"{name} in {self.path} is {type(found).__name__}, not an object")
        return found

    def _ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        store = self._ready()
        if store is None:
            raise Unreachable(f"cannot read {name}: {self.path} is gone")
        try:
            starts, ends = [start for start, _ in spans], [end for _, end in spans]
            found = obstore.get_ranges(store, name, starts=starts, ends=ends)
        except (BaseError, OSError) as problem:
            raise Unreachable(f"cannot read {name} in {self.path}: {_short(problem)}") from None
        pieces = [bytes(piece) for piece in found]
        for piece, (start, end) in zip(pieces, spans, strict=True):
            if len(piece) != end - start:
                raise Unreachable(f"{name}: bytes {start} to {end} were asked for, {len(piece)} bytes came")
        return pieces

    def header(self, name: str, size: int) -> Header:
        """The header of a file of `size` bytes: one ranged read, two if it is long."""
        first = min(size, 32768)
        if first < 8:
            raise StoreError(f"{name}: {size} bytes are too few for a safetensors file; it is damaged or unfinished")
        head = self._ranges(name, [(0, first)])[0]
        length = _header_length(head, size, name)
        if 8 + length > first:
            head += self._ranges(name, [(first, 8 + length)])[0]
        return parse_header(head, size, name)

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
                if not 0 <= index < shape[0]:
                    raise NoSuchName(f"index {index} in {key!r} of {name}, whose axis has {shape[0]}")
                size //= shape[0]
                start += index * size
                shape = shape[1:]
            spans.append((start, start + size))
            shapes.append((entry.dtype, shape))
        real = [span for span in spans if span[1] > span[0]]
        pieces = iter(self._ranges(name, real) if real else [])
        return [
            _array(next(pieces) if end > start else b"", dtype, shape)
            for (start, end), (dtype, shape) in zip(spans, shapes, strict=True)
        ]


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
    """

    path: str | Path
    facts: Json
    say: Callable[[str], None]
    interval_s: float = 2.0
    patience_s: float = 5.0
    attempt: int = field(init=False)
    skipped: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        try:
            self._store = _open(self.path, create=True)
            self._create("headscope.json", {"format": FORMAT, "created": time.time()})
            self.attempt = self._claim()
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
        self._tired = False
        self._live: Json = {"state": "training", "step": None, "attempt": self.attempt, "counter": 0, "message": ""}
        self._thread = threading.Thread(target=self._work, name="headscope-writer", daemon=True)
        self._put_live()
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
        self._queue.put(_END)
        self._thread.join()
        with self._lock:
            self._live |= {"state": state, "message": message or self._live["message"]}
        self._guarded("the end", self._flush)
        self._guarded("live.json", self._put_live)

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
        except Exception as problem:
            message = f"{what} was not written to {self.path}: {type(problem).__name__}: {_short(problem)}"
            self._tell(message, f"{kind or what} {type(problem).__name__}")
            return False
        return True

    def _work(self) -> None:
        live = flushed = time.monotonic()
        while True:
            try:
                job = self._queue.get(timeout=_TICK_S)
            except queue.Empty:
                job = None
            if job is _END:
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
        with self._lock:
            self._free.append(job.image)

    def _put_step(self, job: _Job) -> None:
        metadata: Json = {"headscope": str(FORMAT), "attempt": self.attempt, "step": job.step, "rank": 0, "world": 1}
        metadata |= {"time": time.time(), "crc32c": job.image.checksums(), "layout": "0" * 8}
        metadata, facts = job.finish(metadata)
        strings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        strings["layout"] = layout = job.image.layout(strings, facts)
        name = f"a{self.attempt:03d}/steps/{job.step:010d}-r00000-of-00001-{layout}.safetensors"
        self._put(name, job.image.seal(strings))
        self._live["step"] = job.step

    def _put_live(self) -> None:
        with self._lock:
            self._live |= {"counter": self._live["counter"] + 1, "interval_s": self.interval_s, "skipped": self.skipped}
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
