"""The files of a run: what they are called, and reading any part of them.

`docs/format.md` says what lies where. Access is through obstore, so that a folder, `s3://` and `gs://` behave alike;
but a folder is listed and read by hand, many times as fast and without following pipes or links to elsewhere. One put
makes a file visible as a whole; nothing that readers rely on is ever changed afterwards.
"""

from __future__ import annotations

import bisect
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from .blob import Array, Header, Json, array_of, header_length, loads, parse_header, truthful
from .errors import NoSuchName, StoreError, nearest, shorten

FORMAT = 1
_STEP = re.compile(r"a(\d{3})/steps/(\d{10})-r(\d{5})-of-(\d{5})-([0-9a-f]{8})\.safetensors", re.ASCII)
_BLOCK = re.compile(r"a(\d{3})/timeline/r(\d{5})-(\d{5})\.safetensors", re.ASCII)
_ATTEMPT = re.compile(r"a\d{3}", re.ASCII)
_STAGED = re.compile(r"#\d+$")
_LARGEST_JSON = 16 << 20
_LARGEST_WHOLE = 1 << 30
_SETTLED_S = 2.0
_opened_in: set[int] = set()


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


def open_store(path: str | Path, *, create: bool) -> ObjectStore:
    """The object store at a folder or address."""
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
            self._store = open_store(self.path, create=False)
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
            raise Unreachable(f"cannot list {self.path}: {first_line(problem)}") from None
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
            raise Unreachable(f"cannot read {name} in {self.path}: {first_line(problem)}") from None

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
            raise Unreachable(f"cannot read {name} in {self.path}: {first_line(problem)}") from None

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
                else f"cannot read {name} in {self.path}: {first_line(problem)}"
            ) from None
        except (BaseError, OSError, ValueError) as problem:
            raise Unreachable(f"cannot read {name} in {self.path}: {first_line(problem)}") from None
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


def first_line(problem: BaseException) -> str:
    """The first line of an obstore error; the rest is its debug print."""
    return str(problem).strip().split("\n", 1)[0]
