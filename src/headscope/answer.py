"""One question in, one reply out: everything that a view may ask. `docs/protocol.md` lists it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import attention
from .blob import Array, Json, encode
from .errors import HeadscopeError, NoSuchName, StoreError
from .facts import Check, Example, Layer
from .trial import Trial

REPLY_BYTES = 1 << 20
_HEADER_ROOM = 64 << 10
_SCALAR_ROWS = 1000
_FIRST_LOOK_TOKENS = 128
_WEIGHTS_AT_ONCE = 1 << 24


_OTHER_TOKENS = (
    "{layer} attends between other tokens than the example's (a decoder's own, cross-attention, or a prefix): "
    "its weights can be read with open_trial and are not drawn yet."
)


class BadQuestion(HeadscopeError, ValueError):
    """A question that the protocol does not know."""


def answer(trial: Trial, question: Mapping[str, Any]) -> bytes:
    """The reply to one question: a safetensors blob of at most 1 MiB.

    Raises:
        BadQuestion: not a question of the protocol.
        NoSuchStep, NoSuchName: asks for what the run has not.
        StoreError: the file that holds it is damaged.
    """
    kinds = {"trial": _trial, "step": _step, "lines": _lines, "first_look": _first_look}
    kind = question.get("ask")
    if not isinstance(kind, str) or kind not in kinds:
        raise BadQuestion(f"cannot answer ask={kind!r}; known are {', '.join(kinds)}")
    facts, tensors = kinds[kind](trial, question)
    return encode(tensors, {"facts": json.dumps(facts, allow_nan=False)})


def _whole(question: Mapping[str, Any], name: str, least: int = 0) -> int:
    value = question.get(name)
    if type(value) is not int or value < least:
        raise BadQuestion(f"{name} must be a whole number from {least} on, not {value!r}")
    return value


def _trial(trial: Trial, question: Mapping[str, Any]) -> tuple[Json, dict[str, Array]]:
    layers = newest_layers(trial)
    steps = trial.steps("probe")
    facts: Json = {
        "name": trial.path,
        "run": trial.identity,
        "attempt": trial.attempt or 0,
        "state": state(trial),
        "steps": steps,
        "layers": [{k: getattr(x, k) for k in ("path", "call", "heads", "kv_heads", "kept", "route")} for x in layers],
        "examples": [
            {"text": e.text, "tokens": list(e.tokens), "special": list(e.special), "label": e.label}
            for e in trial.examples()
        ],
        "labels": trial.facts().get("labels"),
        "scalars": scalars(trial),
    }
    return facts, {}


def newest_layers(trial: Trial) -> list[Layer]:
    """The attention calls of the newest step that can be read; a damaged one is passed over and listed as damaged."""
    while steps := trial.steps("probe"):
        try:
            return trial.layers(steps[-1])
        except StoreError:
            if steps[-1] in trial.steps("probe"):
                raise
    return []


def state(trial: Trial) -> Json:
    """How the trainer is doing, as a view shows it."""
    now = trial.state()
    return {k: getattr(now, k) for k in ("state", "step", "age_s", "alive", "message", "skipped", "thinned")}


def scalars(trial: Trial, after: Mapping[str, int] | None = None) -> Json:
    """What was logged, by name after a step, thinned for a curve."""
    found = {}
    for name, (steps, values) in trial.scalars().items():
        kept = steps > (after or {}).get(name, -1)
        thin = _extremes(steps[kept], values[kept])
        if len(thin[0]):
            finite = [float(v) if np.isfinite(v) else None for v in thin[1]]
            found[name] = {"step": [int(s) for s in thin[0]], "value": finite}
    return found


def _extremes(steps: Array, values: Array) -> tuple[Array, Array]:
    """The least, the greatest and the first NaN of each of 500 intervals, in order; all, if they are at most 1,000."""
    if len(steps) <= _SCALAR_ROWS:
        return steps, values
    kept: set[int] = set()
    for interval in np.array_split(np.arange(len(steps)), _SCALAR_ROWS // 2):
        nan = np.isnan(values[interval])
        kept |= {int(index) for index in interval[nan][:1]}
        if len(number := interval[~nan]):
            kept |= {int(number[np.argmin(values[number])]), int(number[np.argmax(values[number])])}
    index = np.array(sorted(kept))
    return steps[index], values[index]


def _step(trial: Trial, question: Mapping[str, Any]) -> tuple[Json, dict[str, Array]]:
    step = _whole(question, "step")
    batches = {example.batch for example in trial.examples()} | {0}
    layers = [(index, layer.check) for b in sorted(batches) for index, layer in enumerate(trial.layers(step, batch=b))]
    checks = [check for _, check in layers]
    errors = [check.error for check in checks if check.error is not None]
    loss = trial.loss(step)
    facts: Json = {
        "step": step,
        "predictions": trial.predictions(step),
        "probabilities": [row if row and np.isfinite(row).all() else None for row in trial.probabilities(step)],
        "loss": loss if loss is not None and np.isfinite(loss) else None,
        "worst_check": max(errors, default=None),
        "failed": sorted({index for index, check in layers if not check.passed}),
        "forwards": trial.header(step).facts("forwards", dict),
    }
    return facts, {}


def _layer_of(trial: Trial, step: int, example: Example, index: int) -> Layer:
    layers = trial.layers(step, batch=example.batch)
    if not 0 <= index < len(layers):
        raise NoSuchName(f"no layer {index} at step {step} of {trial.path}; it has {len(layers)} attention layers")
    return layers[index]


def _example_of(trial: Trial, index: int) -> Example:
    examples = trial.examples()
    if not 0 <= index < len(examples):
        raise NoSuchName(f"no example {index} in {trial.path}; its probe has {len(examples)}")
    return examples[index]


def _refuse_other_tokens(trial: Trial, step: int, example: Example, layer: Layer) -> None:
    """Refuses a step whose q and k are not of the probe's examples."""
    entries = trial.entries(step)
    layer.fits(entries, trial.header(step).name)
    q, k = (entries[layer.key(kind)].shape for kind in "qk")
    last = int(example.positions.max(initial=-1))
    if last >= min(q[2], k[2]) or example.row >= q[0]:
        raise StoreError(
            f"{trial.header(step).name}: example {example.index} is row {example.row} with tokens up to {last}, "
            f"but {layer.name} has q {q} and k {k}; the probe is another"
        )


def check_facts(check: Check) -> Json:
    """A self-check as views and commands show it."""
    return {"error": check.error, "limit": check.limit, "note": check.note, "passed": check.passed}


def _lines(trial: Trial, question: Mapping[str, Any]) -> tuple[Json, dict[str, Array]]:
    step, first, count = _whole(question, "step"), _whole(question, "first"), _whole(question, "count", 1)
    top, heads = _whole(question, "top", 1), question.get("heads")
    example = _example_of(trial, _whole(question, "example"))
    layer = _layer_of(trial, step, example, _whole(question, "layer"))
    if not isinstance(heads, list) or not heads or not all(type(head) is int for head in heads):
        raise BadQuestion(f"heads must be a list of head numbers, not {heads!r}")
    if len(heads) > layer.heads:
        raise BadQuestion(f"heads lists {len(heads)} heads, {layer.name} has {layer.heads}")
    withheld = "" if layer.named else _OTHER_TOKENS.format(layer=layer.name)
    if not withheld:
        _refuse_other_tokens(trial, step, example, layer)
    first = min(first, max(len(example.positions) - 1, 0))
    positions = example.positions[first : first + count]
    tokens = min(len(positions), (REPLY_BYTES - _HEADER_ROOM) // (len(heads) * 12))
    positions = positions[:tokens]
    top = max(1, min(top, len(positions), ((REPLY_BYTES - _HEADER_ROOM) // (len(heads) * max(tokens, 1)) - 4) // 8))
    facts: Json = {
        "top": top,
        "shown_first": first,
        "shown_count": len(positions),
        "mask": "causal" if layer.causal else "given" if layer.mask else "none",
        "withheld": withheld,
        "check": check_facts(layer.check),
        "route": layer.route,
        "dtype": layer.dtype,
        "scale": layer.scale,
    }
    if withheld or not layer.check.passed:
        facts["top"] = 0
        shape = (len(heads), len(positions), 0)
        empty = {"weight": np.zeros(shape, np.float32), "key": np.zeros(shape, np.int32)}
        return facts, {**empty, "share": np.zeros(shape[:2], np.float32)}
    keys = trial.entries(step)[layer.key("k")].shape[2]
    some = max(1, min(len(positions), _WEIGHTS_AT_ONCE // max(1, keys)))
    each = max(1, _WEIGHTS_AT_ONCE // max(1, some * keys))
    columns = []
    for start in range(0, len(heads), each):
        part = heads[start : start + each]
        rows = []
        for begin in range(0, max(len(positions), 1), some):
            queries = positions[begin : begin + some]
            found = trial.weights(step, layer, row=example.row, heads=part, queries=queries)[0]
            rows.append((*attention.heaviest(found[:, :, positions], top), found.sum(axis=-1)))
        columns.append([np.concatenate(pieces, axis=1) for pieces in zip(*rows, strict=True)])
    key, weight, mass = (np.concatenate(pieces) for pieces in zip(*columns, strict=True))
    share = np.divide(weight.sum(axis=-1), mass, out=np.zeros_like(mass), where=mass > 0)
    # Keys are counted in the example's own tokens: the window begins at `first`.
    key = np.where(key >= 0, key + first, -1).astype(np.int32)
    return facts, {"weight": weight, "key": key, "share": share.astype(np.float32)}


def _first_look(trial: Trial, question: Mapping[str, Any]) -> tuple[Json, dict[str, Array]]:
    step = _whole(question, "step")
    examples, steps = trial.examples(), trial.steps("probe")
    if not examples or not steps:
        raise NoSuchName(f"no examples in {trial.path} yet; the first step brings them")
    best: Json = {"layer": 0, "head": 0, "example": 0, "change": 0.0}
    start = steps[0]
    for index, (now, then) in enumerate(zip(trial.layers(step), trial.layers(start), strict=False)):
        sound = all(layer.named and layer.check.passed for layer in (now, then))
        if not sound or now.numbers != then.numbers:
            continue
        for example in examples[:8]:
            if example.batch != now.batch or not len(example.positions):
                continue
            at = example.positions[:_FIRST_LOOK_TOKENS]
            both = ((step, now), (start, then))
            for at_step, call in both:
                _refuse_other_tokens(trial, at_step, example, call)
            pair = [trial.weights(s, x, row=example.row, queries=at)[0][:, :, at] for s, x in both]
            # A head that is not a number any more cannot be compared, and hides no other.
            change = np.nan_to_num(np.abs(pair[0] - pair[1]).mean(axis=(1, 2)))
            head = int(change.argmax())
            if change[head] > best["change"]:
                best = {
                    "layer": index,
                    "head": now.numbers[head],
                    "example": example.index,
                    "change": float(change[head]),
                }
    return best, {}
