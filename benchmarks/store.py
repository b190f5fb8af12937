"""What opening and reading a run costs, beside the same content in zarr and in one npz a step.

    .venv/bin/pip install --group benchmark
    .venv/bin/python benchmarks/store.py [--quick] [--folder DIR]

Every figure is the median of several rounds in this one run; machines differ and are noisy: the ratios are what counts.
"Warm": the files were read before; "fresh process": the first time in a process of its own, imports not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from headscope import open_trial
from headscope.blob import Image, Json
from headscope.writer import Writer

Array = NDArray[Any]
LAYERS, HEADS, TOKENS, DIM, BATCH = 6, 12, 64, 32, 2
LAYER, EXAMPLE, HEAD = 3, 1, 7
OPENING = """
import json, sys, time
from headscope import open_trial
start = time.perf_counter()
run = open_trial(sys.argv[1])
found = len(run.steps())
print(json.dumps([time.perf_counter() - start, found]))
"""


def say(message: str) -> None:
    """A writer that has something to say spoils the measurement."""
    raise RuntimeError(message)


def calls(layers: int, heads: int) -> list[Json]:
    """Facts of the attention calls."""
    fixed: Json = {"mode": "probe", "batch": 0, "call": 0, "route": "sdpa", "heads": heads, "kv_heads": heads}
    fixed |= {"scale": DIM**-0.5, "causal": False, "offset": 0, "window": None, "softcap": None, "mask": None}
    fixed |= {"bias": None, "sinks": False, "dropout": 0.0, "dtype": "float16", "kept": None, "named": True}
    fixed["check"] = {"example": 0, "rows": [], "error": None, "limit": None, "note": "unchecked: noise"}
    return [{**fixed, "path": f"layer.{layer}"} for layer in range(layers)]


def put(writer: Writer, step: int, tensors: dict[str, Array], facts: list[Json]) -> None:
    """One step, as `watch` puts it."""
    while not writer.ready():
        pass
    image: Image = writer.image()
    for key, tensor in tensors.items():
        np.copyto(image.slot(f"probe/0/{key}", tensor.dtype, tensor.shape), tensor)
    fixed = [{name: value for name, value in fact.items() if name != "check"} for fact in facts]
    writer.submit(step, image, lambda metadata: ({**metadata, "forwards": {"train": step}, "calls": facts}, fixed))


def tensors_of(step: int) -> dict[str, Array]:
    """Q and k of every layer; each (example, head) block begins with its step."""
    rng = np.random.default_rng(step)
    found = {}
    for layer in range(LAYERS):
        for kind in "qk":
            noise = rng.standard_normal((BATCH, HEADS, TOKENS, DIM), np.float32).astype(np.float16)
            noise[:, :, 0, 0] = step
            found[f"layer.{layer}.{kind}"] = noise
    return found


def timed(rounds: int, action: Callable[[], object]) -> float:
    """The median over rounds, in ms."""
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took)


def drop_caches() -> bool:
    """Empties the system's caches, where that is allowed."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        return False


def first_open(path: Path, steps: int) -> float:
    """Opening in a process of its own, in ms."""
    done = subprocess.run([sys.executable, "-c", OPENING, str(path)], capture_output=True, text=True, check=True)
    took_s, found = json.loads(done.stdout)
    assert found == steps
    return float(took_s) * 1e3


def long_run(folder: Path, steps: int, rounds: int) -> list[tuple[str, float]]:
    """What a run of many small steps costs to open and to follow."""
    path = folder / "long"
    facts = calls(2, 2)
    small = {f"layer.{layer}.{kind}": np.zeros((1, 2, 4, DIM), np.float16) for layer in range(2) for kind in "qk"}
    writer = Writer(path, {"model": "noise"}, say, interval_s=1e9)
    for step in range(steps):
        put(writer, 10 * step, small, facts)
    until = time.monotonic() + 600
    while len(open_trial(path).steps()) < steps and time.monotonic() < until:
        time.sleep(0.2)
    rows = []
    if drop_caches():
        rows.append(("open, caches dropped", first_open(path, steps)))
    rows.append(("open, fresh process", statistics.median(first_open(path, steps) for _ in range(max(3, rounds // 3)))))
    rows.append(("open, warm", timed(rounds, lambda: open_trial(path).steps())))
    time.sleep(2.5)  # A folder that changed a moment ago is listed again at every refresh.
    trial = open_trial(path)
    trial.steps()
    rows.append(("refresh, nothing new", timed(10 * rounds, trial.refresh)))
    took = []
    for step in range(steps, steps + rounds):
        put(writer, 10 * step, small, facts)
        time.sleep(0.05)
        start = time.perf_counter()
        new = trial.refresh()
        took.append(1e3 * (time.perf_counter() - start))
        assert new == [10 * step]
    rows.append(("refresh that finds a step", statistics.median(took)))
    writer.close()
    return rows


def headscope_write(path: Path, steps: int) -> Callable[[int, dict[str, Array]], None]:
    """Writes by the writer's own thread; the last step waits for all."""
    writer = Writer(path, {"model": "noise"}, say)
    facts = calls(LAYERS, HEADS)

    def step_of(step: int, tensors: dict[str, Array]) -> None:
        put(writer, step, tensors, facts)
        if step == steps - 1:
            writer.close()

    return step_of


def headscope_read(path: Path, steps: int) -> Array:
    """Q and k of one head, (2, steps, tokens, dim); the others alike."""
    trial = open_trial(path)
    chosen = list(range(steps))
    q, k = (trial.tensor(f"layer.{LAYER}.{kind}").values(chosen, example=EXAMPLE, head=HEAD) for kind in "qk")
    return np.stack([q, k])


def npz_write(path: Path, steps: int) -> Callable[[int, dict[str, Array]], None]:
    """One npz a step, not compressed."""
    path.mkdir()
    return lambda step, tensors: np.savez(path / f"{step:010d}.npz", **tensors)  # type: ignore[arg-type]


def npz_read(path: Path, steps: int) -> Array:
    """A member of an npz is read whole."""
    found = []
    for file in sorted(path.iterdir()):
        with np.load(file) as held:
            found.append([held[f"layer.{LAYER}.{kind}"][EXAMPLE, HEAD] for kind in "qk"])
    return np.array(found).swapaxes(0, 1)


def zarr_write(path: Path, steps: int) -> Callable[[int, dict[str, Array]], None]:
    """One array a tensor, one shard a step, one chunk a head, as raw as it gets."""
    import zarr

    root = zarr.create_group(str(path))
    shape = (steps, BATCH, HEADS, TOKENS, DIM)
    terms: Any = {"shape": shape, "chunks": (1, 1, 1, TOKENS, DIM), "shards": (1, *shape[1:]), "dtype": "float16"}
    arrays: dict[str, Any] = {
        name: root.create_array(name, compressors=None, filters=None, **terms) for name in tensors_of(0)
    }

    def step_of(step: int, tensors: dict[str, Array]) -> None:
        for name, tensor in tensors.items():
            arrays[name][step] = tensor

    return step_of


def zarr_read(path: Path, steps: int) -> Array:
    """All steps by one indexing."""
    import zarr

    root: Any = zarr.open_group(str(path), mode="r")
    return np.stack([root[f"layer.{LAYER}.{kind}"][:, EXAMPLE, HEAD] for kind in "qk"])


WAYS: dict[str, tuple[Callable[[Path, int], Callable[[int, dict[str, Array]], None]], Callable[[Path, int], Array]]] = {
    "headscope": (headscope_write, headscope_read),
    "npz a step": (npz_write, npz_read),
    "zarr-python": (zarr_write, zarr_read),
}


def beside(folder: Path, steps: int, rounds: int) -> dict[str, tuple[float, float, float, int, int]]:
    """(write ms a step, read warm ms, read in a fresh trial ms, bytes, files) of each way."""
    writes = {name: way[0](folder / name, steps) for name, way in WAYS.items()}
    spent = dict.fromkeys(WAYS, 0.0)
    for step in range(steps):
        tensors = tensors_of(step)
        for name, write in writes.items():
            start = time.perf_counter()
            write(step, tensors)
            spent[name] += 1e3 * (time.perf_counter() - start)
    want = np.stack(
        [np.stack([tensors_of(s)[f"layer.{LAYER}.{k}"][EXAMPLE, HEAD] for s in range(0, steps, 50)]) for k in "qk"]
    )
    found = {}
    for name, (_, read) in WAYS.items():
        cold = float("nan")
        if drop_caches():
            cold = timed(1, lambda read=read, name=name: read(folder / name, steps))  # type: ignore[misc]
        got = read(folder / name, steps)
        assert np.array_equal(got[:, ::50], want), name
        warm = timed(rounds, lambda read=read, name=name: read(folder / name, steps))  # type: ignore[misc]
        files = [file for file in (folder / name).rglob("*") if file.is_file()]
        found[name] = (spent[name] / steps, warm, cold, sum(f.stat().st_size for f in files), len(files))
    return found


def checksums(rounds: int) -> tuple[float, float]:
    """(reading a whole tensor of 37.8 MB, its checksum), ms."""
    from headscope.blob import checksum

    data = np.random.default_rng(0).bytes(37_748_736)
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        read = timed(rounds, lambda: Path(file.name).read_bytes())
    return read, timed(rounds, lambda: checksum(np.frombuffer(data, np.uint8)))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description="What opening and reading a run costs.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--folder", default=None, help="where to write; a temporary folder, if not given")
    args = parser.parse_args()
    tenth = 10 if args.quick else 1
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    console = Console(width=110)
    try:
        steps = 10_000 // tenth
        table = Table("a run of " + f"{steps:,} small steps", "ms", title_justify="left")
        for name, took in long_run(folder, steps, 9):
            table.add_row(name, f"{took:.2f}")
        console.print(table)
        steps = 500 // tenth
        found = beside(folder, steps, 7)
        ours = found["headscope"]
        table = Table(
            "same content", "write ms a step", f"one head (q, k), {steps} steps, warm ms", "cold ms", "MB", "files"
        )
        for name, (write, warm, cold, size, files) in found.items():
            table.add_row(
                name,
                f"{write:.2f} ({write / ours[0]:.1f}x)",
                f"{warm:.0f} ({warm / ours[1]:.1f}x)",
                "not allowed here" if cold != cold else f"{cold:.0f} ({cold / ours[2]:.1f}x)",
                f"{size / 1e6:.0f}",
                str(files),
            )
        console.print(table)
        read, summed = checksums(9)
        console.print(
            f"a whole tensor of 37.7 MB: read {read:.1f} ms, its crc32c {summed:.1f} ms more ({summed / read:.2f}x)"
        )
    finally:
        shutil.rmtree(folder)
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    machine = f"{os.cpu_count()} CPUs (load {os.getloadavg()[0]:.1f}), {platform.system()} {platform.machine()}"
    content = f"{LAYERS} layers, {HEADS} heads, {TOKENS} tokens, dim {DIM}, {BATCH} examples, float16"
    console.print(f"{content}; {machine}, {versions}")


if __name__ == "__main__":
    main()
