"""Whether a run's files are what they should be: every file, every checksum, every self-check made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import attention
from .blob import Array, Header, Json, decode, faults
from .errors import NoSuchName, StoreError
from .facts import Layer
from .store import Files, StepFile


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
    names = files.names()
    if not any(name == "headscope.json" for name, _, _ in names):
        raise NoSuchName(
            f"no run in {path}: there is no headscope.json; give the folder that was passed to headscope.watch"
        )
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
    blob = files.get(name)
    if blob is None:
        return
    broken = faults(blob, name)
    found.faults += broken
    if broken:
        return
    tensors, header = decode(blob, name)
    found.tensors += len(tensors)
    part = StepFile.of(name, size)
    if part is not None:
        found.faults += _misnamed(part, header)
        found.faults += _unproven(tensors, header, found)


def _misnamed(part: StepFile, header: Header) -> Iterator[str]:
    for name in ("attempt", "step", "rank", "world", "layout"):
        inside, outside = header.metadata.get(name), str(getattr(part, name))
        if inside != outside:
            yield f"{part.name}: its {name} is {inside!r} inside, {outside!r} by name"


def _unproven(tensors: dict[str, Array], header: Header, found: Audit) -> Iterator[str]:
    """Makes the self-check of every call again, from the file alone."""
    for raw in header.facts("calls", list):
        layer = Layer.of(raw, header.name)
        if layer.check.error is None:
            found.unchecked += 1
            if not layer.check.note:
                yield f"{header.name}: {layer.name} has no self-check and does not say why"
            continue
        error = attention.self_check(raw, _parts(tensors, layer))
        found.checked += 1
        found.worst = max(found.worst, error)
        limit = layer.check.limit or 0.0
        if not error <= limit:
            yield f"{header.name}: {layer.name} fails its self-check: {error:.1e}, limit {limit:g}"
        elif abs(error - (said := layer.check.error)) > 0.1 * limit:
            yield f"{header.name}: self-check of {layer.name} gives {error:.1e}, its record says {said:.1e}"


def _parts(tensors: dict[str, Array], layer: Layer) -> dict[str, Array]:
    keys = {kind: layer.key(kind) for kind in ("q", "k", "v", "output")}
    prefix = f"{layer.mode}/{layer.batch}/"
    keys |= {kind: prefix + name for kind, name in (("mask", layer.mask), ("bias", layer.bias)) if name}
    if layer.sinks:
        keys["sinks"] = layer.key("sinks")
    missing = [key for key in keys.values() if key not in tensors]
    if missing:
        raise StoreError(f"tensor {missing[0]!r} of {layer.name} is missing")
    return {kind: tensors[key] for kind, key in keys.items()}
