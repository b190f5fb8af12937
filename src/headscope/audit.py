"""Whether a run's files are what they should be: every file, every checksum, every self-check made again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import attention
from .blob import Array, Header, Json, checksum_of, mismatch
from .errors import StoreError
from .facts import Layer
from .store import Files, StepFile, block_of

_PIECE = 64 << 20
_PROBE = re.compile(r"a\d{3}/probe\.safetensors", re.ASCII)


@dataclass
class Audit:
    """What was found.

    Attributes:
        checked: attention calls whose self-check was repeated.
        unchecked: those that have none, such as calls under dropout.
        worst: the largest self-check error met.
        faults: one line each, naming the file.
    """

    run: str
    files: int = 0
    size_bytes: int = 0
    tensors: int = 0
    checked: int = 0
    unchecked: int = 0
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)

    def facts(self) -> Json:
        """As JSON values."""
        return asdict(self)


def audit(path: str | Path, progress: Callable[[int, int], object] = lambda done, total: None) -> Audit:
    """Reads every file of a run and checks all that can be checked.

    Args:
        path: the run.
        progress: told after each file how many of how many are done.

    Raises:
        NoSuchName: there is no run at that path.
    """
    files = Files(path)
    names = files.run()
    found = Audit(str(path))
    for done, (name, size, _) in enumerate(names, 1):
        try:
            _check_file(files, name, size, found)
        except StoreError as problem:
            found.faults.append(str(problem))
        progress(done, len(names))
    return found


def _check_file(files: Files, name: str, size: int, found: Audit) -> None:
    found.files += 1
    found.size_bytes += size
    if name.endswith(".json"):
        files.json(name)
    if not name.endswith(".safetensors"):
        return
    part = StepFile.of(name, size)
    if part is None and block_of(name) is None and not _PROBE.fullmatch(name):
        raise StoreError(f"{name}: no file of a run has this name")
    header = files.header(name, size)
    if not header.sealed:
        found.faults.append(f"{name}: the header carries no checksum")
    broken = list(_broken(files, header))
    found.faults += broken
    if broken:
        return
    found.tensors += len(header.entries)
    if part is not None:
        found.faults += part.differs(header)
        found.faults += _unproven(files, header, found)


def _broken(files: Files, header: Header) -> Iterator[str]:
    """Every tensor against its checksum, a piece at a time: a file may be larger than memory."""
    for key, entry in header.entries.items():
        if key not in header.sums:
            yield f"{header.name}: tensor {key!r} carries no checksum"
            continue
        total = 0
        for start in range(entry.start, entry.end, _PIECE):
            total = checksum_of(files.span(header.name, start, min(start + _PIECE, entry.end)), total)
        if header.sums[key] != f"{total:08x}":
            yield mismatch(key, header)


def _unproven(files: Files, header: Header, found: Audit) -> Iterator[str]:
    """Makes the self-check of every call again, from the file alone."""
    for raw in header.facts("calls", list):
        layer = Layer.of(raw, header.name)
        layer.fits(header.entries, header.name)
        if layer.check.error is None:
            found.unchecked += 1
            if not layer.check.note:
                yield f"{header.name}: {layer.name} has no self-check and does not say why"
            continue
        layer.fits_check(header.entries, header.name)
        # Of the one example that is checked alone, counted as the first.
        call = {**raw, "check": {**raw["check"], "example": 0}}
        error = attention.self_check(call, _parts(files, header, layer))
        found.checked += 1
        found.worst = max(found.worst, error)
        limit = layer.check.limit or 0.0
        if not error <= limit:
            yield f"{header.name}: {layer.name} fails its self-check: {error:.1e}, limit {limit:g}"
        elif abs(error - (said := layer.check.error)) > 0.1 * limit:
            yield f"{header.name}: self-check of {layer.name} gives {error:.1e}, its record says {said:.1e}"


def _parts(files: Files, header: Header, layer: Layer) -> dict[str, Array]:
    """What the self-check of a call needs, of the checked example alone."""
    keys = {kind: layer.key(kind) for kind in ("q", "k", "v", "output")}
    prefix = f"{layer.mode}/{layer.batch}/"
    keys |= {kind: prefix + name for kind, name in (("mask", layer.mask), ("bias", layer.bias)) if name}
    example = layer.check.example or 0
    wants = {kind: (key, (0 if header.entries[key].shape[0] == 1 else example,)) for kind, key in keys.items()}
    found = dict(zip(wants, files.read(header.name, header, list(wants.values())), strict=True))
    parts = {kind: part[None] for kind, part in found.items()}
    if layer.sinks:
        parts["sinks"] = files.read(header.name, header, [(layer.key("sinks"), ())])[0]
    return parts
