"""One safetensors blob: parsed with suspicion, built in place.

Written by hand and not with the safetensors package because a reader takes single heads out of files that it never
holds whole, and a writer fills the file's bytes where they lie; neither is on offer there. The package opens every blob
(tested), which is the check that matters.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from .errors import StoreError

Array = NDArray[Any]
Json = dict[str, Any]
T = TypeVar("T")

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
_LARGEST_HEADER = 32 << 20
_MOST_AXES = 32
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]|(^|/)\.\.(/|$)|^/")
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
# The header's own checksum stands where a reader finds it without parsing a byte.
_SEAL = b'{"__metadata__":{"header":"'
_UNSEALED = b"0" * 8


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `end` of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds.

    `start` is where the data begins; `sealed`: the header carries a checksum, and it is right; `tail` is the header's
    text after the metadata, the same for all files of a layout.
    """

    name: str
    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int
    start: int = 0
    sealed: bool = False
    tail: str = field(default="", repr=False)

    @cached_property
    def sums(self) -> Json:
        """The checksum of each tensor that has one."""
        return self.facts("crc32c", dict)

    def facts(self, key: str, kind: type[T]) -> T:
        """A metadata entry that is JSON, decoded; an empty one of that kind if there is none.

        Raises:
            StoreError: it is not JSON, or of another kind.
        """
        try:
            found = loads(self.metadata[key]) if key in self.metadata else kind()
        except (ValueError, RecursionError) as problem:
            raise StoreError(f"{self.name}: metadata {key!r} is not JSON: {problem}") from None
        if not isinstance(found, kind):
            raise StoreError(f"{self.name}: metadata {key!r} is {type(found).__name__}, not {kind.__name__}")
        return found


def loads(text: str | bytes) -> Any:
    """JSON, strictly: no key twice, no NaN, no half of a surrogate pair (a question mark instead).

    Raises:
        ValueError, RecursionError: it is not.
    """
    if isinstance(text, bytes):
        text = text.decode()
    found = json.loads(text, object_pairs_hook=_no_twice, parse_constant=_no_constant)
    if _HALF_A_PAIR.search(text):
        found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    return found


def parse_header(head: bytes, size: int, name: str, like: Header | None = None) -> Header:
    """The header of a safetensors file, checked against its own checksum and the file's size.

    Args:
        head: at least the first 8 bytes and the header.
        size: of the whole file in bytes.
        name: of the file, for messages.
        like: of another file of the same layout; only the metadata is parsed then.

    Raises:
        StoreError: anything that the format does not allow; the message names file and byte.
    """
    length = header_length(head, size, name)
    raw = head[8 : 8 + length]
    sealed = raw.startswith(_SEAL)
    at = len(_SEAL)
    if sealed and raw[at : at + 8] != f"{_sum_of_header(raw):08x}".encode():
        raise StoreError(f"{name}: the header, bytes 8 to {8 + length}, does not match its checksum; it is damaged")
    try:
        text = raw.decode()
        # After `{"__metadata__":`, where the seal says that the metadata is.
        metadata, end = _DECODER.raw_decode(text, at - 11) if sealed else ({}, 0)
        if like is not None and like.sealed and sealed:
            tail, entries = like.tail, like.entries
            rest = end + len(tail)
            padded = text.startswith(tail, end) and text.count(" ", rest) == len(text) - rest
            if 8 + length != like.start or not padded:
                raise StoreError(f"{name}: its tensors are not those of {like.name}, which has the same layout id")
        else:
            tail = text[end:].rstrip(" ")
            metadata, entries = _parsed(text, 8 + length, name)
    except (ValueError, RecursionError) as problem:
        raise StoreError(
            f"{name}: the header, bytes 8 to {8 + length}, is not JSON as it should be: {problem}"
        ) from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StoreError(f"{name}: __metadata__ must hold strings only")
    at = 8 + length
    for key, entry in entries.items() if like is None else ():
        if entry.start != at:
            raise StoreError(
                f"{name}: tensor {key!r} begins at byte {entry.start}, but {at} is where the one before ends"
            )
        at = entry.end
    at = max((entry.end for entry in entries.values()), default=at)
    if at != size:
        raise StoreError(f"{name}: the file has {size} bytes, its header promises {at}; it is damaged or unfinished")
    return Header(name, entries, metadata, size, 8 + length, sealed, tail)


def _parsed(text: str, base: int, name: str) -> tuple[Any, dict[str, Entry]]:
    raw = loads(text)
    if not isinstance(raw, dict):
        raise StoreError(f"{name}: the header at byte 8 is {type(raw).__name__}, not an object")
    metadata = raw.pop("__metadata__", {})
    entries = {key: _entry(key, raw[key], base, name) for key in raw}
    return metadata, dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))


def _sum_of_header(raw: bytes) -> int:
    """crc32c of a header with its own digits as zeros."""
    at = len(_SEAL)
    return int(crc32c(raw[at + 8 :], crc32c(raw[:at] + _UNSEALED)))


def header_length(head: bytes, size: int, name: str) -> int:
    """How many bytes the header has, by the first 8 of the file."""
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


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_twice, parse_constant=_no_constant)


def _entry(key: str, raw: Any, base: int, name: str) -> Entry:
    try:
        dtype = DTYPES[raw["dtype"]]
        shape = tuple(raw["shape"])
        start, end = raw["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise StoreError(
            f"{name}: tensor {key!r} is described by {repr(raw)[:200]}; want a known dtype, shape and data_offsets"
        ) from None
    if len(shape) > _MOST_AXES:
        raise StoreError(f"{name}: tensor {key!r} has {len(shape)} axes, at most {_MOST_AXES} are allowed")
    whole = all(type(n) is int and 0 <= n < 2**48 for n in (*shape, start, end))
    fits = whole and end - start == _count(shape) * dtype.itemsize and _count(n or 1 for n in shape) < 2**56
    if _UNSAFE.search(key) or not fits:
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
    header = parse_header(blob[: 8 + header_length(blob[:8], len(blob), name)], len(blob), name)
    return {key: array_of(blob[e.start : e.end], e.dtype, e.shape) for key, e in header.entries.items()}, header


def decode_sound(blob: bytes, name: str) -> tuple[dict[str, Array], Header]:
    """As `decode`, with every checksum that it carries checked.

    Raises:
        StoreError: one does not match.
    """
    found, header = decode(blob, name)
    for key, tensor in found.items():
        verify(tensor, key, header)
    return found, header


def verify(tensor: Array, key: str, header: Header) -> None:
    """Refuses a whole tensor that does not match the checksum which its file carries for it.

    Raises:
        StoreError: it does not.
    """
    if header.sums.get(key, "") not in ("", checksum(tensor)):
        raise StoreError(mismatch(key, header))
    truthful(tensor, key, header.name)


def truthful(tensor: Array, key: str, name: str) -> None:
    """Refuses truth values that are neither 0 nor 1: numpy takes any byte for one, and then computes with its bits.

    Raises:
        StoreError: there is one.
    """
    if tensor.dtype == np.bool_ and tensor.size and tensor.view(np.uint8).max() > 1:
        raise StoreError(f"{name}: tensor {key!r} is BOOL but holds bytes other than 0 and 1; it is damaged")


def mismatch(key: str, header: Header) -> str:
    """What to say of a tensor that does not match its checksum."""
    return f"{header.name}: tensor {key!r} from byte {header.entries[key].start} on does not match its checksum"


def faults(blob: bytes, name: str) -> list[str]:
    """What is wrong with a whole file: its structure, and every checksum that it carries."""
    try:
        tensors, header = decode(blob, name)
        sums = header.sums
    except StoreError as problem:
        return [str(problem)]
    missing = [f"{name}: tensor {key!r} carries no checksum" for key in tensors if key not in sums]
    wrong = [mismatch(key, header) for key in tensors if key in sums and sums[key] != checksum(tensors[key])]
    return missing + wrong


def checksum(tensor: Array) -> str:
    """crc32c of a tensor's bytes, as 8 hex digits."""
    return f"{crc32c(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data):08x}"


def checksum_of(piece: bytes, before: int = 0) -> int:
    """crc32c of a piece of bytes that comes after what has the checksum `before`."""
    return int(crc32c(piece, before))


def array_of(raw: Any, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
    """The bytes as an array, not copied."""
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
        if len(header) > _LARGEST_HEADER:
            raise StoreError(f"a header of {len(header)} bytes is longer than the {_LARGEST_HEADER} that readers take")
        at = len(_SEAL)
        header = header[:at] + f"{_sum_of_header(header):08x}".encode() + header[at + 8 :]
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
    strings = {"header": _UNSEALED.decode(), **{key: value for key, value in metadata.items() if key != "header"}}
    whole = {"__metadata__": strings, **entries}
    return json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
