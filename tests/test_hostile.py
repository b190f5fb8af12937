"""Files that are broken or meant to break us: every public call gives what it should, or an error that names the file.

`python tests/test_hostile.py 10000` (make test-hostile) runs many cases in processes of their own, with little memory
and a clock, and counts what went wrong. What counts as wrong is said in `docs/format.md`, "What a reader checks".
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from golden.synthetic import Call, examples, put, write
from headscope import open_trial
from headscope.answer import REPLY_BYTES, answer
from headscope.audit import audit
from headscope.blob import decode, encode
from headscope.cli import main as command
from headscope.errors import HeadscopeError, HeadscopeWarning, NotSupported, StoreError
from headscope.facts import Layer
from headscope.trial import Trial

Array = NDArray[Any]
Run = dict[str, bytes]
Draw = Callable[[st.SearchStrategy[Any]], Any]
Seen = dict[str, Any]
MEMORY = 3 << 30
CASE_S = 20.0


# Sound runs to begin with.

CALLS = [
    Call("layer.0", heads=4, kv_heads=2, mask=True, sinks=True, dtype=np.float16),
    Call("layer.1", causal=True, bias=True, window=4, softcap=5.0),
]
KEEP = np.array([[True] * 6, [True] * 4 + [False] * 2])
LOGITS = np.array([[0.5, 1.5], [2.0, -1.0]], np.float32)


def attempt_of(path: Path, steps: list[int], number: int) -> None:
    outputs = {"logits": LOGITS + number, "predictions": np.array([1, 0], np.int32) ^ number}
    outputs["loss"] = np.array(0.25 + number, np.float32)
    probe = examples([6, 4], 6, labels=[1, -100])
    run = write(path, [], probe=probe, close=False, facts={"model": "Made", "labels": ["no", "yes"]})
    for step in steps:
        put(
            run,
            step,
            CALLS,
            keep=KEEP,
            outputs={k: v + np.array(step, v.dtype) for k, v in outputs.items()},
            seed=number,
        )
        run.log(step, {"loss": step + number / 2, "lr": float("nan") if step == 10 else 0.5})
    run.close()


def read_all(path: Path) -> Run:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def sound_runs(folder: Path) -> dict[str, Run]:
    from runs import make

    attempt_of(folder / "one", [0, 10, 20], 0)
    attempt_of(folder / "two", [0, 10, 20], 0)
    attempt_of(folder / "two", [20, 30], 1)
    make(folder / "torch", [0, 5, 10])
    return {name: read_all(folder / name) for name in ("one", "two", "torch")}


# What everybody can ask of a run, asked.


class Asking:
    """Asks, and keeps for each question what came: a value, or the error's text."""

    def __init__(self) -> None:
        self.seen: Seen = {}
        self.failed: dict[str, str] = {}
        self.wrong: list[str] = []

    def __call__(self, label: str, ask: Callable[[], Any]) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", HeadscopeWarning)
                self.seen[label] = ask()
            return self.seen[label]
        except (HeadscopeError, TimeoutError) as problem:
            self.failed[label] = str(problem)
            if isinstance(problem, TimeoutError) != label.startswith("wait") and not isinstance(
                problem, HeadscopeError
            ):
                self.wrong.append(f"{label}: {problem!r}")
        except Exception as problem:
            self.wrong.append(f"{label}: {type(problem).__name__}: {problem}")
        return None


def plain(value: Any) -> Any:
    """A value without what a mutation may move: as nested lists of plain things."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and value != value:
        return "nan"
    return value


def reply(trial: Trial, **question: Any) -> Any:
    blob = answer(trial, question)
    tensors, header = decode(blob)
    if question["ask"] == "lines" and len(blob) > REPLY_BYTES:
        raise AssertionError(f"a reply of {len(blob)} bytes")
    facts = json.loads(header.metadata["facts"])
    for moving in ("state", "name", "run", "attempt", "labels"):
        facts.pop(moving, None)
    return [facts, tensors]


def value_of(trial: Trial, name: str, step: int) -> Array:
    return trial.tensor(name).value(step)


def observe(path: Path, attempt: int | None = None, *, commands: bool = False) -> tuple[Asking, Trial]:
    """Everything that a run says, by question."""
    asked = Asking()
    trial = Trial(path, attempt=attempt, refresh_s=0.02)
    ask = asked
    steps = ask("listed", trial.steps) or []
    names = ask("names", trial.tensor_names) or []
    ask("modes", trial.modes)
    for step in steps:
        layers = ask(f"layers {step}", partial(trial.layers, step)) or []
        for number, layer in enumerate(layers):
            where = f"{step} {number}"
            ask(f"part {where} a", partial(trial.weights, step, layer, row=0, heads=[layer.numbers[-1]]))
            ask(f"part {where} b", partial(trial.weights, step, layer, row=1, queries=np.array([3, 0])))
        for name in names[step % 20 // 10 :: 2]:
            ask(f"value {step} {name}", partial(value_of, trial, name, step))
        for kind in ("predictions", "probabilities", "loss", "entries"):
            ask(f"{kind} {step}", partial(getattr(trial, kind), step))
        ask(f"answer {step}", partial(reply, trial, ask="step", step=step))
        lines = {
            "ask": "lines",
            "step": step,
            "layer": 1,
            "example": 1,
            "heads": [1, 0],
            "first": 1,
            "count": 3,
            "top": 2,
        }
        ask(f"part lines {step}", partial(reply, trial, **lines))
        ask(f"part look {step}", partial(reply, trial, ask="first_look", step=step))
    ask("examples", lambda: [[e.text, e.tokens, e.special, e.positions, e.label] for e in trial.examples()])
    ask("scalars", trial.scalars)
    ask("facts", trial.facts)
    ask("state", trial.state)
    ask("trial", lambda: reply(trial, ask="trial"))
    if names:
        ask("part values", lambda: trial.tensor("layer.0.q").values(trial.steps(), example=1, head=1))
    ask("wait", lambda: trial.wait(10**6, timeout=0))
    ask("steps", trial.steps)
    if attempt is None:
        found = ask("audit", lambda: audit(path).facts())
        asked.seen["faults"] = found["faults"] if found else asked.failed.get("audit")
    if commands:
        for line in (["info"], ["info", "--json"], ["check"]):
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                status = ask(f"command {line}", partial(command, [line[0], str(path), *line[1:]]))
            if status not in (0, 1, 2):
                asked.wrong.append(f"headscope {line}: exit status {status}")
            ask("command output", out.getvalue().encode)
    return asked, trial


class Truth:
    """What the sound run says."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        path = folder / "sound"
        lay(run, path)
        asked, trial = observe(path, commands=True)
        assert not asked.wrong, asked.wrong
        assert set(asked.failed) <= {"wait"}, asked.failed
        assert not trial.damaged
        assert asked.seen["faults"] == []
        self.seen = {label: plain(value) for label, value in asked.seen.items()}
        self.rows: dict[str, set[Any]] = {}
        attempts = {int(name[1:4]) for name in run if name.startswith("a0")}
        others = [observe(path, attempt)[0].seen for attempt in attempts]
        self.others = [{label: plain(value) for label, value in seen.items()} for seen in others]
        for seen in others:
            for name, (steps, values) in seen["scalars"].items():
                pairs = zip(steps.tolist(), map(str, values.tolist()), strict=True)
                self.rows.setdefault(name, set()).update(pairs)
        shutil.rmtree(path)


def lay(run: Run, path: Path) -> None:
    for name, blob in run.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(blob)


MOVING = ("part", "state", "facts", "listed", "names", "modes", "wait", "audit", "faults", "command")


def lies(asked: Asking, trial: Trial, truth: Truth, changed: list[str]) -> Iterator[str]:
    """Values that are not the sound run's, though nothing was said."""
    in_header = any(is_header_changed(name, trial, truth) for name in changed)
    looks_at_all = {label for label in asked.seen if label.startswith(("part look", "part values"))}
    for label, value in asked.seen.items():
        kind = label.split(" ", 1)[0]
        if kind in MOVING and not (kind == "part" and (in_header or not any("/steps/" in name for name in changed))):
            continue
        found, want = plain(value), truth.seen.get(label)
        if found == want:
            continue
        # These are of all steps or of the first, and that may be the one that is damaged.
        if trial.damaged and label in looks_at_all:
            continue
        # Something is known to be damaged: then less may come, or the same step of another attempt.
        if trial.damaged and (
            plain(value) in ([], {}, None)
            or less(kind, value, truth)
            or any(found == o.get(label) for o in truth.others)
        ):
            continue
        if kind == "trial" and (trial.damaged or any(name.endswith("json") for name in changed)):
            continue
        yield f"{label}: {str(value)[:300]} instead of {str(want)[:300]}; damaged: {trial.damaged}"


def is_header_changed(name: str, trial: Trial, truth: Truth) -> bool:
    new = (Path(trial.path) / name).read_bytes() if (Path(trial.path) / name).is_file() else b""
    old = truth.run.get(name, b"")
    end = 8 + struct.unpack("<Q", old[:8])[0] if len(old) > 8 else 0
    return new[:end] != old[:end] or len(new) != len(old)


def less(kind: str, value: Any, truth: Truth) -> bool:
    if kind in ("steps", "predictions", "probabilities"):
        wider = {step for seen in (truth.seen, *truth.others) for step in seen["steps"]}
        return {*value} <= ({*wider} if kind == "steps" else {None})
    if kind == "scalars":
        return all(
            {*zip(steps.tolist(), map(str, values.tolist()), strict=True)} <= truth.rows.get(name, set())
            for name, (steps, values) in value.items()
        )
    return kind == "answer" and not value[0]["predictions"]


# Mutations. "Damage" is what disks and people do; it may never give another value. "Forgery" is a file whose checksums
# were made again: it may say what it likes, but nothing may break.

STEPS = st.sampled_from(range(8))


def pick(draw: Draw, run: Run, part: str = "") -> str:
    return str(draw(st.sampled_from([name for name in run if part in name])))


def binary(draw: Draw, run: Run) -> str:
    return pick(draw, run, draw(st.sampled_from(["/steps/", "/steps/", "probe", "timeline"])))


def place(draw: Draw, blob: bytes) -> int:
    """A byte of a file: of the length, of the header, of the data, at the end."""
    head = min(8 + struct.unpack("<Q", blob[:8])[0] if len(blob) >= 8 else 0, len(blob) - 1)
    used = max(len(blob[:head].rstrip()), 9)
    region = draw(
        st.sampled_from([(0, 8), (8, 60), (8, used), (8, used), (head, len(blob)), (len(blob) - 9, len(blob))])
    )
    return min(int(draw(st.integers(region[0], max(region[0], region[1] - 1)))), len(blob) - 1)


def truncate(draw: Draw, run: Run) -> None:
    name = binary(draw, run)
    run[name] = run[name][: draw(st.one_of(st.integers(0, 40), st.just(place(draw, run[name]))))]


def extend(draw: Draw, run: Run) -> None:
    name = binary(draw, run)
    run[name] += draw(st.one_of(st.binary(min_size=1, max_size=40), st.just(bytes(4096)), st.just(run[name])))


def zero_fill(draw: Draw, run: Run) -> None:
    name = binary(draw, run)
    start = place(draw, run[name])
    end = draw(st.sampled_from([start + 1, start + 8, start + 512, len(run[name])]))
    run[name] = run[name][:start] + bytes(len(run[name][start:end])) + run[name][end:]


def flip_bits(draw: Draw, run: Run) -> None:
    name = binary(draw, run)
    blob = bytearray(run[name])
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 8]))):
        blob[place(draw, run[name])] ^= 1 << draw(st.integers(0, 7))
    run[name] = bytes(blob)


def overwrite(draw: Draw, run: Run) -> None:
    name = binary(draw, run)
    start, new = place(draw, run[name]), draw(st.binary(min_size=1, max_size=64))
    run[name] = (run[name][:start] + new + run[name][start + len(new) :])[: len(run[name])]


def mix_up(draw: Draw, run: Run) -> None:
    """One step's file under another's name, of this or another attempt; the layout in the name fits, or not."""
    one, other = pick(draw, run, "/steps/"), pick(draw, run, "/steps/")
    truth = run[one]
    if draw(st.booleans()):
        other = other[:-20] + one[-20:]
        for name in [name for name in run if name[:22] == other[:22]]:
            del run[name]
    run[other] = truth


# Forging.


def parts_of(blob: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def sealed(text: bytes, data: bytes, *, size: int | None = None) -> bytes:
    """A file of that header, with the header's checksum made again."""
    start = b'{"__metadata__":{"header":"'
    text = text.ljust((size or 0) - len(data) - 8)
    if text.startswith(start):
        at = len(start)
        text = text[:at] + b"0" * 8 + text[at + 8 :]
        text = text[:at] + f"{crc32c(text):08x}".encode() + text[at + 8 :]
    return struct.pack("<Q", len(text)) + text + data


def resealed(raw: Any, data: bytes, *, like: bytes = b"") -> bytes:
    return sealed(json.dumps(raw, separators=(",", ":")).encode(), data, size=len(like))


WILD = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**53, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320]),
    st.sampled_from(
        [None, True, False, "", "x", "mask.0", "mask.9", "../mask.0", "\ud800", "\x1b[31m", [], {}, [0], [[]]]
    ),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.recursive(st.integers(-3, 9), lambda inner: st.lists(inner, max_size=3), max_leaves=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
SIZES = st.sampled_from(
    [0, 1, 2, 3, 4, 6, 8, 12, 24, 48, 96, -1, 2**31, 2**40, 2**47, 2**63, 10**30, 1.0, True, None, "4"]
)


def lying_header(draw: Draw, run: Run) -> None:
    """Offsets, dtypes, shapes and names that are not the file's, under a checksum that is right."""
    name = binary(draw, run)
    raw, data = parts_of(run[name])
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(set(raw) - {"__metadata__"})))
        entry = raw[key]
        what = draw(st.sampled_from(["dtype", "shape", "axis", "swap", "offsets", "name", "gone", "wild", "factor"]))
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            continue
        if what == "dtype":
            entry["dtype"] = draw(
                st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I32", "BOOL", "U8", "F8", None, 4])
            )
        elif what == "shape":
            entry["shape"] = draw(st.lists(SIZES, max_size=6))
        elif what == "axis" and entry["shape"]:
            entry["shape"][draw(st.integers(0, len(entry["shape"]) - 1))] = draw(SIZES)
        elif what == "factor":
            entry["shape"] = draw(st.permutations(entry["shape"] + draw(st.sampled_from([[1], [], [1, 1]]))))
        elif what == "swap":
            other = draw(st.sampled_from(sorted(set(raw) - {"__metadata__"})))
            raw[key], raw[other] = raw[other], raw[key]
        elif what == "offsets":
            entry["data_offsets"] = draw(st.lists(SIZES, min_size=1, max_size=3))
        elif what == "name":
            new = draw(
                st.sampled_from(["/etc/passwd", "../../a.q", "probe/0/../x", "a", "probe/-1/a.q", "probe/00/a.q", "\0"])
            )
            raw[new] = raw.pop(key)
        elif what == "gone":
            del raw[key]
        else:
            raw[key] = draw(WILD)
        if set(raw) == {"__metadata__"}:
            break
    run[name] = resealed(raw, data, like=run[name])


def huge_header(draw: Draw, run: Run) -> None:
    """Long and deep headers, keys twice, and what is no JSON."""
    name = binary(draw, run)
    raw, data = parts_of(run[name])
    text = json.dumps(raw, separators=(",", ":")).encode()
    many = draw(st.sampled_from([10, 1000, 30_000]))
    kind = draw(
        st.sampled_from(["deep", "deep inside", "entries", "metadata", "twice", "long", "digits", "text", "axes"])
    )
    if kind == "deep":
        text = text[:-1] + b',"a":' + b"[" * many + b"]" * many + b"}"
    elif kind == "deep inside":
        raw["__metadata__"][draw(st.sampled_from(["calls", "crc32c", "forwards", "tokens"]))] = "[" * many + "]" * many
        text = json.dumps(raw, separators=(",", ":")).encode()
    elif kind == "entries":
        empty = b'"probe/0/x%d.q":{"dtype":"F32","shape":[0],"data_offsets":[%d,%d]}'
        text = text[:-1] + b"".join(b"," + empty % (i, len(data), len(data)) for i in range(many // 10)) + b"}"
    elif kind == "metadata":
        raw["__metadata__"] |= {f"x{i}": "y" * 50 for i in range(many // 10)}
        text = json.dumps(raw, separators=(",", ":")).encode()
    elif kind == "twice":
        key = json.dumps(draw(st.sampled_from(sorted(raw))))
        text = text[:-1] + f",{key}:{json.dumps(raw[json.loads(key)])}}}".encode()
    elif kind == "long":
        text = text.ljust(many * 10)
    elif kind == "digits":
        text = text.replace(b"[0,", b"[" + b"9" * many + b",", 1)
    elif kind == "axes":
        shape = b'"shape":[' + b"1," * many + b"1]"
        key = b'"probe/0/x.q":{"dtype":"F32",' + shape + b',"data_offsets":[%d,%d]}' % (len(data), len(data) + 4)
        text, data = text[:-1] + b"," + key + b"}", data + bytes(4)
    else:
        text = text[: len(text) // 2] + draw(st.binary(min_size=1, max_size=20)) + text[len(text) // 2 :]
    run[name] = sealed(text, data)


def forged_calls(draw: Draw, run: Run) -> None:
    """Attention calls that cannot be."""
    name = pick(draw, run, "/steps/")
    raw, data = parts_of(run[name])
    calls = json.loads(raw["__metadata__"]["calls"])
    for _ in range(draw(st.integers(1, 3))):
        call = draw(st.sampled_from(calls))
        target = call["check"] if draw(st.booleans()) and isinstance(call["check"], dict) else call
        field = draw(st.sampled_from(sorted(target)))
        if draw(st.integers(0, 9)) == 0:
            del target[field]
        elif field == "rows":
            target[field] = draw(
                st.one_of(WILD, st.lists(st.sampled_from([0, 1, 5, 6, 99, -1, 2**40, 0.5]), max_size=80))
            )
        else:
            target[field] = draw(st.one_of(WILD, st.integers(-2, 9)))
    if draw(st.integers(0, 9)) == 0:
        calls = draw(st.sampled_from([[], {}, [1], [[]], calls * 50, None, "x", [None]]))
    raw["__metadata__"]["calls"] = json.dumps(calls)
    if draw(st.integers(0, 9)) == 0:
        key = draw(st.sampled_from(["crc32c", "forwards", "headscope", "time", "layout", "world"]))
        raw["__metadata__"][key] = json.dumps(draw(WILD))
    run[name] = resealed(raw, data, like=run[name])


def other_tensors(draw: Draw, run: Run) -> None:
    """Tensors of shapes and dtypes that do not fit the calls, all else in order."""
    name = pick(draw, run, "/steps/")
    tensors, header = decode(run[name])
    dtypes = [np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_, np.uint8]
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(tensors)))
        old = tensors[key].shape
        shape = draw(st.one_of(st.lists(st.integers(0, 7), max_size=5), st.permutations(old)))
        if draw(st.booleans()) and old:
            shape = [*old]
            shape[draw(st.integers(0, len(old) - 1))] = draw(st.sampled_from([0, 1, 3, 4, 5, 8, 200]))
        values = np.asarray(draw(st.sampled_from([0, 1, -1, np.nan, np.inf, 7e4, -1e30, 3])))
        with np.errstate(all="ignore"):
            tensors[key] = np.full(shape, values).astype(draw(st.sampled_from([tensors[key].dtype.type, *dtypes])))
    metadata = {key: text for key, text in header.metadata.items() if key not in ("header", "crc32c")}
    run[name] = encode(tensors, metadata)


def forged_probe(draw: Draw, run: Run) -> None:
    """Examples that are not those of the steps, or none at all."""
    name = pick(draw, run, "probe")
    tensors, header = decode(run[name])
    facts: dict[str, Any] = {key: json.loads(header.metadata[key]) for key in ("tokens", "texts", "special")}
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(["tensor", "tokens", "texts", "special", "gone", "rows", "many"]))
        key = draw(st.sampled_from(sorted(tensors))) if tensors else ""
        if what == "tensor" and key:
            shape = draw(st.lists(st.integers(0, 9), max_size=3))
            dtype = draw(st.sampled_from([np.int64, np.bool_, np.float64, np.float32, np.int8]))
            number = draw(st.sampled_from([0, 1, -1, 100, np.nan, 2**62]))
            with np.errstate(all="ignore"):
                tensors[key] = np.full(shape, number).astype(dtype)
        elif what == "gone" and key:
            del tensors[key]
        elif what == "rows" and key:
            tensors[key] = (
                np.repeat(tensors[key], draw(st.integers(0, 5)), axis=0) if tensors[key].ndim else tensors[key]
            )
        elif what == "many":
            longer = draw(st.sampled_from([7, 64, 5000]))
            facts["tokens"] = [[["t"] * longer] * 2]
            tensors = {"0/mask": np.ones((2, longer), bool)} if draw(st.booleans()) else {}
        elif what in facts:
            facts[what] = draw(
                st.one_of(WILD, st.lists(st.lists(st.lists(st.text(max_size=2), max_size=3), max_size=3)))
            )
    run[name] = encode(tensors, {key: json.dumps(value) for key, value in facts.items()})


def forged_timeline(draw: Draw, run: Run) -> None:
    """Columns of other lengths, kinds and names."""
    name = pick(draw, run, "timeline")
    columns = decode(run[name])[0]
    for _ in range(draw(st.integers(1, 3))):
        column = draw(st.sampled_from([*sorted(columns), "new", "new:nan", "loss:nan", ":nan", "\u202e", "a/b"]))
        dtype = draw(st.sampled_from([np.int64, np.float64, np.bool_, np.float16, np.int8]))
        shape = draw(st.one_of(st.just((3,)), st.lists(st.sampled_from([0, 1, 2, 3, 400]), max_size=2)))
        if draw(st.integers(0, 5)) == 0:
            columns.pop(column, None)
        else:
            number = draw(st.sampled_from([0, 1, -1, np.nan, np.inf, 2**62, -(2**62)]))
            with np.errstate(all="ignore"):
                columns[column] = np.full(shape, number).astype(dtype)
    run[name] = encode(columns, {"headscope": "1"})


def forged_json(draw: Draw, run: Run) -> None:
    """live.json, attempt.json and headscope.json of any kind."""
    name = pick(draw, run, ".json")
    raw = json.loads(run[name])
    for _ in range(draw(st.integers(1, 3))):
        keys = ["state", "step", "counter", "interval_s", "thinned", "skipped", "message", "labels", "model", "format"]
        raw[draw(st.sampled_from([*sorted(raw), *keys]))] = draw(WILD)
    run[name] = json.dumps(raw).encode()
    if draw(st.integers(0, 3)) == 0:
        other = [
            b"",
            b"[]",
            b"{",
            b"\xff\xfe",
            b"[" * 50_000,
            b'{"a":1,"a":2}',
            b"9" * 6000,
            b"null",
            b"NaN",
            b"\0" * 100,
        ]
        run[name] = draw(st.sampled_from(other))
    if draw(st.integers(0, 3)) == 0:
        run[name] = run[name][: draw(st.integers(0, len(run[name])))]


def same_layout(draw: Draw, run: Run) -> None:
    """A later step whose tensors lie otherwise, under the layout id of the others."""
    name = [name for name in run if "/steps/" in name and "0000000000" not in name][draw(st.integers(0, 1))]
    raw, data = parts_of(run[name])
    pairs = [(one, other) for one in raw for other in raw if one < other and "__metadata__" not in (one, other)]
    fits = [p for p in pairs if len({json.dumps([raw[k]["shape"], raw[k]["dtype"]]) for k in p}) == 1]
    one, other = draw(st.sampled_from(fits))
    raw[one]["data_offsets"], raw[other]["data_offsets"] = raw[other]["data_offsets"], raw[one]["data_offsets"]
    if draw(st.booleans()):
        sums = json.loads(raw["__metadata__"]["crc32c"])
        sums[one], sums[other] = sums[other], sums[one]
        raw["__metadata__"]["crc32c"] = json.dumps(sums)
    run[name] = resealed(raw, data, like=run[name])


def odd_names(draw: Draw, run: Run) -> None:
    """Files that are no files of a run, or of a step that has one already."""
    step = pick(draw, run, "/steps/")
    names = [
        step.replace(
            "r00000-of-00001", draw(st.sampled_from(["r00005-of-00001", "r00000-of-00002", "r00001-of-00002"]))
        ),
        step[:-20] + "deadbeef.safetensors",
        step.replace("a000", "a999"),
        step.replace("0000000000", "9999999999"),
        step + "#3",
        *(
            "a000/steps/x",
            "a000/steps/.safetensors",
            "a000/timeline/r00000-99999.safetensors",
            "a00/attempt.json",
            "x y.json",
        ),
        *(
            "a000/steps/\u0660000000000-r00000-of-00001-5f0c22d1.safetensors",
            "a000/deep/er/x.safetensors",
            "a777/attempt.json",
        ),
    ]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4)):
        if name not in run:
            run[name] = draw(st.sampled_from([b"", b"x", bytes(5000), run[step]]))


DAMAGE = {f.__name__: f for f in (truncate, extend, zero_fill, flip_bits, overwrite, mix_up, same_layout)}
FORGERY = {
    f.__name__: f
    for f in (
        lying_header,
        huge_header,
        forged_calls,
        other_tensors,
        forged_probe,
        forged_timeline,
        forged_json,
        odd_names,
    )
}
KINDS: dict[str, Callable[[Draw, Run], None]] = {**DAMAGE, **FORGERY}


def questions(draw: Draw) -> dict[str, Any]:
    """Questions that make sense, more or less."""
    asked: dict[str, Any] = {"ask": draw(st.sampled_from(["lines", "lines", "step", "first_look", "trial", None, []]))}
    asked |= {"step": 0, "layer": 0, "example": 0, "heads": [0], "first": 0, "count": 6, "top": 3}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(asked)))
        asked[name] = draw(st.one_of(WILD, st.sampled_from([0, 1, 10, 20, [1, 0], [3] * 2, list(range(50))])))
    return asked


# Judging.


def judge(kind: str, draw: Draw, truths: dict[str, Truth], folder: Path) -> tuple[list[str], list[str]]:
    """(what broke, what was wrong without a word) of one hostile run."""
    truth = truths[draw(st.sampled_from(sorted(truths)))]
    run = {**truth.run}
    KINDS[kind](draw, run)
    changed = [name for name in {*run, *truth.run} if run.get(name) != truth.run.get(name)]
    commands = draw(st.integers(0, 4)) == 0
    question = questions(draw)
    path = folder / "run"
    lay(run, path)
    try:
        asked, trial = observe(path, commands=commands)
        broke = [*asked.wrong]
        check = Asking()
        check("answer", lambda: answer(trial, question))
        broke += [f"{question}: {line}" for line in check.wrong]
        broke += [
            f"{label} does not say where: {text}" for label, text in asked.failed.items() if not named(text, path)
        ]
        silent = list(lies(asked, trial, truth, changed)) if kind in DAMAGE else []
        if kind in DAMAGE and changed and not asked.seen["faults"]:
            silent.append(f"headscope check finds nothing in {changed}")
        return broke, silent
    finally:
        shutil.rmtree(path)


def named(text: str, path: Path) -> bool:
    """Whether an error says which file, run or question it is about."""
    return any(
        word in text for word in (str(path), ".safetensors", ".json", "layer.", "no such", "must be", "cannot answer")
    )


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    folder = tmp_path_factory.mktemp("hostile")
    return {name: Truth(run, folder) for name, run in sound_runs(folder).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files(kind: str, truths: dict[str, Truth], tmp_path: Path) -> None:
    @seed(0)
    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        broke, silent = judge(kind, data.draw, truths, tmp_path)
        assert not broke
        assert not silent

    check()


def test_a_hundred_thousand_odd_files(tmp_path: Path) -> None:
    """Time and memory stay in proportion to their number, and small."""
    write(tmp_path, [0, 10])
    steps = tmp_path / "a000" / "steps"
    for number in range(50_000):
        os.close(os.open(steps / f"{number}.tmp", os.O_CREAT | os.O_WRONLY))
        os.close(
            os.open(steps / f"{20 + number:010d}-r00000-of-00001-{number:08x}.safetensors", os.O_CREAT | os.O_WRONLY)
        )
    tracemalloc.start()
    start = time.monotonic()
    run = open_trial(tmp_path)
    assert run.steps() == [0, 10]
    assert run.tensor("layer.0.weights").value(10).shape == (2, 2, 6, 6)
    took_s, most = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shutil.rmtree(tmp_path)
    assert took_s < 60
    assert most < 200 << 20
    assert len(run.damaged) == 50_000
    assert len(run.state().message) == 0


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, [0, 10])
    (tmp_path / "a000" / "steps" / "loop").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to("/")
    (tmp_path / "a001").mkdir()
    os.mkfifo(tmp_path / "a001" / "attempt.json")
    os.mkfifo(tmp_path / "a000" / "steps" / "0000000020-r00000-of-00001-5f0c22d1.safetensors")
    (tmp_path / "a000" / "probe.safetensors").unlink()
    os.mkfifo(tmp_path / "a000" / "probe.safetensors")
    run = open_trial(tmp_path)
    assert run.steps() == [0, 10]
    with pytest.raises(StoreError, match=r"a000/probe\.safetensors in .* is not a file"):
        run.examples()
    assert audit(tmp_path).faults == []


def test_a_file_that_seems_huge_is_not_read(tmp_path: Path) -> None:
    """Sparse files: 1 TB each, and no byte on the disk."""
    write(tmp_path, [0, 10])
    for name in ("live.json", "a000/attempt.json", "a000/probe.safetensors"):
        os.truncate(tmp_path / name, 1 << 40)
    run = open_trial(tmp_path)
    assert run.steps() == [0, 10]
    assert run.facts() == {}
    with pytest.raises(StoreError, match=r"a000/probe\.safetensors in .* has 1099511627776 bytes, at most 1073741824"):
        run.examples()
    assert [name for name in run.damaged] == ["live.json", "a000/attempt.json"]
    assert len(audit(tmp_path).faults) == 3


def test_a_run_of_a_later_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [0])
    (tmp_path / "headscope.json").write_text('{"format": 2, "created": 1}')
    for _ in range(2):
        with pytest.raises(NotSupported, match=r"headscope\.json in .*: the run is of format 2, this Headscope reads"):
            open_trial(tmp_path).steps()
    assert command(["info", str(tmp_path)]) == 2


def test_a_step_of_another_attempt_is_never_shown(tmp_path: Path) -> None:
    write(tmp_path, [0, 10, 20], seed=1)
    write(tmp_path, [0, 10], seed=2)
    stray = next((tmp_path / "a000" / "steps").glob("0000000020*"))
    shutil.copy(stray, tmp_path / "a001" / "steps" / stray.name)
    run = open_trial(tmp_path)
    assert run.steps() == [0, 10, 20]
    with pytest.raises(StoreError, match=r"a001/steps/0000000020.*: its attempt is '0' inside, '1' by name"):
        run.tensor("layer.0.q").value(20)
    assert run.steps() == [0, 10]
    assert list(run.damaged) == [f"a001/steps/{stray.name}"]


def test_calls_are_refused_with_a_word() -> None:
    raw = {"path": "a", "call": 0, "mode": "probe", "batch": 0, "route": "sdpa", "heads": 4, "kv_heads": 2}
    raw |= {"scale": 1, "causal": False, "offset": 0, "window": None, "softcap": None, "mask": None, "bias": None}
    raw |= {"sinks": False, "dropout": 0.0, "dtype": "float32", "kept": None, "named": True}
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"kv_heads": 3}, r"heads of an attention call of 4 heads is \(4, 3\), which cannot be"),
        ({"kv_heads": 0}, r"heads of an attention call of 4 heads is \(4, 0\), which cannot be"),
        ({"scale": float("nan")}, "scale of an attention call is nan"),
        ({"softcap": 0}, "softcap of an attention call of 4 heads is 0, which cannot be"),
        ({"kept": [1, 1]}, r"kept of an attention call of 4 heads is \(1, 1\), which cannot be"),
        ({"check": {"error": 1e-3}}, "check of an attention call of 4 heads is Check"),
        ({"check": {"rows": [0] * 100}}, "rows of an attention call of 4 heads is Check"),
    ]
    for more, message in wrongs:
        with pytest.raises(StoreError, match=f"^f: {message}"):
            Layer.of({**raw, **more}, "f")


# Many, counted, in processes of their own.


def worker(kind: str, cases: int, start: int, folder: Path) -> None:
    """Runs cases of one kind and prints what came of each; a case that hangs ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    runs = {name.name: read_all(name) for name in sorted((folder / "sound").iterdir())}
    mine = Path(tempfile.mkdtemp(dir=folder))
    truths = {name: Truth(run, mine) for name, run in runs.items()}

    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def each(data: st.DataObject) -> None:
        faulthandler.dump_traceback_later(CASE_S, exit=True)
        try:
            broke, silent = judge(kind, data.draw, truths, mine)
        except Exception:
            traceback.print_exc()
            os._exit(3)
        faulthandler.cancel_dump_traceback_later()
        for word, lines in (("crash", broke), ("silent", silent)):
            if lines:
                print(word, lines[0].replace("\n", " ")[:600], file=sys.stderr, flush=True)
        print("crash" if broke else "silent" if silent else "fine", flush=True)

    each()


def count(cases: int, kinds: list[str]) -> Counter[str]:
    """Runs that many cases, evenly over the kinds, and prints one line of what came of them."""
    folder = Path(tempfile.mkdtemp())
    total: Counter[str] = Counter()
    by_kind = []
    (folder / "sound").mkdir()
    sound_runs(folder / "sound")
    for number, kind in enumerate(kinds):
        wanted = cases // len(kinds) + (number < cases % len(kinds))
        found: Counter[str] = Counter()
        rounds = 0
        # A process that died counts once, and another goes on with other cases.
        while found.total() < wanted and rounds < 1000:
            arguments = [kind, str(wanted - found.total()), str(rounds), str(folder)]
            done = subprocess.run(
                [sys.executable, "-W", "error", __file__, "worker", *arguments], stdout=subprocess.PIPE, text=True
            )
            rounds += 1
            found.update(done.stdout.split())
            if done.returncode == 3:
                raise SystemExit("the test itself failed")
            if done.returncode:
                found["hang" if done.returncode == 1 else "crash"] += 1
        total += found
        by_kind.append(f"{kind} {found.total()}:{found['crash']}/{found['hang']}/{found['silent']}")
        print(f"  {by_kind[-1]}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    print(
        f"{total.total()} hostile files: {total['crash']} crashes, {total['hang']} hangs, {total['silent']} silent "
        f"wrong values; by kind, cases:crashes/hangs/silent: {', '.join(by_kind)}"
    )
    return total


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        result = count(int(sys.argv[1]), sys.argv[2:] or [*KINDS])
        sys.exit(result["crash"] + result["hang"] + result["silent"] > 0)
