import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import models
from golden import make
from golden.synthetic import Call, examples, write
from headscope import boundary, open_trial, watch
from headscope.answer import REPLY_BYTES, BadQuestion, answer, scalars
from headscope.blob import decode, encode, faults
from headscope.errors import HeadscopeWarning, NoSuchName, NoSuchStep
from headscope.record import Record
from headscope.trial import Trial
from runs import writer

Array = NDArray[Any]
LINES = {"ask": "lines", "step": 0, "layer": 0, "example": 0, "heads": [0], "first": 0, "count": 20, "top": 5}


def strict(text: str) -> Any:
    """JSON as a browser takes it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def asked(trial: Trial, **question: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    reply = answer(trial, question)
    assert faults(reply, "reply") == []
    tensors, header = decode(reply)
    return strict(header.metadata["facts"]), tensors


def padded(lengths: Sequence[int], longest: int, left: bool) -> Array:
    keep = np.zeros((len(lengths), longest), bool)
    for row, length in enumerate(lengths):
        keep[row, longest - length : longest] = left
        keep[row, :length] |= not left
    return keep


def run_of(path: Path, lengths: Sequence[int] = (6, 4), *, left: bool = False, **more: Any) -> Trial:
    longest = max(lengths)
    write(
        path,
        more.pop("steps", [0]),
        more.pop("calls", [Call("a", heads=4, kv_heads=2, mask=True), Call("b", causal=True)]),
        probe=examples(lengths, longest, left=left, labels=more.pop("labels", None)),
        batch=len(lengths),
        tokens=longest,
        keep=padded(lengths, longest, left),
        **more,
    )
    return open_trial(path)


def test_trial(tmp_path: Path) -> None:
    trial = run_of(tmp_path, steps=[0, 50, 100], labels=[1, -100], facts={"labels": ["negative", "positive"]})
    facts, tensors = asked(trial, ask="trial")
    assert tensors == {}
    age_s = facts["state"].pop("age_s")
    assert facts.pop("run") == trial.identity != ""
    assert 0 <= age_s < 60
    assert facts == {
        "name": str(tmp_path),
        "attempt": 0,
        "state": {"state": "ended", "step": 100, "alive": False, "message": "", "skipped": 0, "thinned": 0},
        "steps": [0, 50, 100],
        "layers": [
            {"path": "a", "call": 0, "heads": 4, "kv_heads": 2, "kept": None, "route": "sdpa"},
            {"path": "b", "call": 0, "heads": 2, "kv_heads": 2, "kept": None, "route": "sdpa"},
        ],
        "examples": [
            {
                "text": "text 0",
                "tokens": ["t1", "t10", "t11", "t12", "t13", "t2"],
                "special": [True, False, False, False, False, True],
                "label": 1,
            },
            {
                "text": "text 1",
                "tokens": ["t1", "t20", "t21", "t2"],
                "special": [True, False, False, True],
                "label": None,
            },
        ],
        "labels": ["negative", "positive"],
        "scalars": {},
    }


def test_trial_before_there_is_one(tmp_path: Path) -> None:
    facts, _ = asked(open_trial(tmp_path / "later"), ask="trial")
    assert facts["state"]["state"] == "waiting"
    assert facts["state"]["step"] is None
    empty = {name: facts[name] for name in ("steps", "layers", "examples", "labels", "scalars", "attempt")}
    assert empty == {"steps": [], "layers": [], "examples": [], "labels": None, "scalars": {}, "attempt": 0}


def test_step(tmp_path: Path) -> None:
    logits = np.array([[0.0, np.log(3)], [2, 2]], np.float32)
    outputs = {"logits": logits, "predictions": np.array([1, 0], np.int32), "loss": np.array(0.25, np.float32)}
    calls = [Call("a"), Call("b", error=0.5), Call("c", error=0.001)]
    facts, tensors = asked(run_of(tmp_path, steps=[7], calls=calls, outputs=outputs), ask="step", step=7)
    assert tensors == {}
    assert facts == {
        "step": 7,
        "predictions": [1, 0],
        "probabilities": [pytest.approx([0.25, 0.75]), [0.5, 0.5]],
        "loss": 0.25,
        "worst_check": 0.5,
        "failed": [1],
        "forwards": {"train": 7},
    }


def test_a_diverged_model_is_still_json(tmp_path: Path) -> None:
    logits = np.array([[np.nan, 1], [np.inf, 0]], np.float32)
    outputs = {"logits": logits, "predictions": np.zeros(2, np.int32), "loss": np.array(np.nan, np.float32)}
    trial = run_of(tmp_path, outputs=outputs)
    facts, _ = asked(trial, ask="step", step=0)
    assert facts["loss"] is None
    assert facts["probabilities"] == [None, None]
    assert facts["predictions"] == [0, 0]


def brute(
    trial: Trial, step: int, index: int, layer: int, heads: Sequence[int], first: int, count: int, top: int
) -> Any:
    """Weight, key and share by plain loops over the trial's own weights."""
    example = trial.examples()[index]
    full = trial.weights(step, trial.layers(step)[layer])[example.row]
    tokens = range(first, min(first + count, len(example.tokens)))
    weight, key, share = [], [], []
    for head in heads:
        for query in tokens:
            row = full[head, example.positions[query]]
            inside = sorted(((float(row[example.positions[t]]), t) for t in tokens), reverse=True)[:top]
            weight.append([w for w, _ in inside])
            key.append([t if w > 0 else -1 for w, t in inside])
            share.append(sum(w for w, _ in inside) / row.sum() if row.sum() else 0)
    shape = (len(heads), len(tokens))
    return np.array(weight).reshape(*shape, -1), np.array(key).reshape(*shape, -1), np.array(share).reshape(shape)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("first", "count", "top"), [(0, 20, 3), (0, 4, 20), (2, 5, 2), (3, 1, 1), (0, 9, 9)])
def test_lines_are_the_trials_weights(left: bool, index: int, first: int, count: int, top: int, tmp_path: Path) -> None:
    trial = run_of(tmp_path, (9, 5), left=left, steps=[3])
    heads = [2, 0, 3]
    question = {"ask": "lines", "step": 3, "layer": 0, "example": index, "heads": heads}
    facts, tensors = asked(trial, **question, first=first, count=count, top=top)
    weight, key, share = brute(trial, 3, index, 0, heads, first, count, top)
    shown = min(count, (9, 5)[index] - first)
    assert (facts["shown_first"], facts["shown_count"], facts["top"]) == (first, shown, min(top, shown))
    assert {name: t.dtype for name, t in tensors.items()} == {
        "weight": np.float32,
        "key": np.int32,
        "share": np.float32,
    }
    assert tensors["weight"].shape == tensors["key"].shape == (3, shown, min(top, shown))
    np.testing.assert_allclose(tensors["weight"], weight, atol=1e-7)
    assert np.array_equal(tensors["key"], key)
    np.testing.assert_allclose(tensors["share"], share, atol=1e-6)
    assert (np.diff(tensors["weight"], axis=-1) <= 0).all()
    if top >= shown == len(trial.examples()[index].tokens):
        np.testing.assert_allclose(tensors["share"], 1, atol=1e-6)


def test_lines_facts_and_causal_keys(tmp_path: Path) -> None:
    facts, tensors = asked(run_of(tmp_path), **{**LINES, "layer": 1, "heads": [1], "top": 6})
    check = facts.pop("check")
    assert check["passed"]
    assert check["error"] < 1e-5
    assert (check["limit"], check["note"]) == (0.02, "")
    shown = {"top": 6, "shown_first": 0, "shown_count": 6}
    assert facts == {**shown, "mask": "causal", "withheld": "", "route": "sdpa", "dtype": "float32", "scale": 0.5}
    assert np.array_equal((tensors["key"] == -1).sum(-1)[0], 5 - np.arange(6))


def test_a_window_beyond_the_last_token_shows_the_last(tmp_path: Path) -> None:
    facts, tensors = asked(run_of(tmp_path), **{**LINES, "example": 1, "first": 99})
    assert (facts["shown_first"], facts["shown_count"]) == (3, 1)
    assert tensors["key"].tolist() == [[[3]]]


def test_a_query_that_attends_to_nothing_has_no_share(tmp_path: Path) -> None:
    write(tmp_path, [0], [Call("a", mask=True)], keep=np.array([[True] * 6, [False] * 6]))
    _, tensors = asked(open_trial(tmp_path), **{**LINES, "example": 1})
    assert not tensors["share"].any()
    assert not tensors["weight"].any()
    assert (tensors["key"] == -1).all()


def test_an_example_without_tokens_has_no_lines(tmp_path: Path) -> None:
    facts, tensors = asked(run_of(tmp_path, (6, 0)), **{**LINES, "example": 1})
    assert (facts["shown_first"], facts["shown_count"]) == (0, 0)
    assert all(tensor.size == 0 for tensor in tensors.values())


def test_what_failed_its_check_is_withheld(tmp_path: Path) -> None:
    trial = run_of(tmp_path, calls=[Call("a", error=0.5)])
    facts, tensors = asked(trial, **{**LINES, "heads": [1, 0]})
    assert facts["check"] == {"error": 0.5, "limit": 0.02, "note": "", "passed": False}
    assert facts["top"] == 0
    assert tensors["weight"].shape == tensors["key"].shape == (2, 6, 0)
    assert not tensors["share"].any()


@pytest.mark.parametrize(("tokens", "heads"), [(512, 12), (4096, 2)])
def test_a_reply_of_lines_is_at_most_1_mib(tokens: int, heads: int, tmp_path: Path) -> None:
    call = Call("a", heads=heads, kv_heads=1, dim=2, dtype=np.float16)
    trial = run_of(tmp_path, (tokens,), calls=[call])
    question = {**LINES, "heads": list(range(heads)), "count": tokens, "top": tokens}
    reply = answer(trial, question)
    assert REPLY_BYTES == 1024 * 1024
    assert 0.8 * REPLY_BYTES < len(reply) <= REPLY_BYTES
    tensors, header = decode(reply)
    facts = strict(header.metadata["facts"])
    assert facts["shown_count"] == tokens
    assert tensors["weight"].shape == (heads, tokens, facts["top"])
    assert facts["top"] == (983040 // (heads * tokens) - 4) // 8
    full = trial.weights(0, trial.layers(0)[0], row=0, heads=[heads - 1])[0, 0, -1]
    np.testing.assert_allclose(tensors["weight"][-1, -1], np.sort(full)[::-1][: facts["top"]], atol=1e-7)


def test_with_many_heads_fewer_tokens_are_shown(tmp_path: Path) -> None:
    call = Call("a", heads=256, kv_heads=1, dim=2, dtype=np.float16)
    trial = run_of(tmp_path, (400,), calls=[call])
    reply = answer(trial, {**LINES, "heads": list(range(256)), "count": 400, "top": 400})
    assert len(reply) <= REPLY_BYTES
    facts = strict(decode(reply)[1].metadata["facts"])
    assert (facts["shown_count"], facts["top"]) == (983040 // (256 * 12), 1)


def test_first_look_finds_what_changed_most(tmp_path: Path) -> None:
    trial = run_of(tmp_path, (6, 4), steps=[0, 10])
    facts, tensors = asked(trial, ask="first_look", step=10)
    assert tensors == {}
    changes: dict[tuple[int, int, int], float] = {}
    for layer, (now, then) in enumerate(zip(trial.layers(10), trial.layers(0), strict=True)):
        change = np.abs(trial.weights(10, now) - trial.weights(0, then))
        for example in trial.examples():
            at = example.positions
            for head in range(now.heads):
                changes[layer, head, example.index] = change[example.row, head][np.ix_(at, at)].mean()
    best = max(changes, key=lambda where: changes[where])
    assert (facts["layer"], facts["head"], facts["example"]) == best
    assert facts["change"] == pytest.approx(changes[best], rel=1e-5)
    facts, _ = asked(trial, ask="first_look", step=0)
    assert facts == {"layer": 0, "head": 0, "example": 0, "change": 0.0}


def test_first_look_passes_over_an_example_without_tokens(tmp_path: Path) -> None:
    facts, _ = asked(run_of(tmp_path, (6, 0), steps=[0, 10]), ask="first_look", step=10)
    assert facts["example"] == 0
    assert facts["change"] > 0


def test_first_look_passes_over_what_failed_its_check(tmp_path: Path) -> None:
    trial = run_of(tmp_path, steps=[0, 10], calls=[Call("a", error=0.9), Call("b")])
    assert asked(trial, ask="first_look", step=10)[0]["layer"] == 1


NOT_WHOLE = "must be a whole number from"
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "cannot answer ask=None; known are trial, step, lines, first_look"),
    ({"ask": "weights"}, "cannot answer ask='weights'; known are trial, step, lines, first_look"),
    ({"ask": ["trial"]}, "cannot answer ask=['trial']; known are"),
    ({"ask": "step"}, f"step {NOT_WHOLE} 0 on, not None"),
    ({"ask": "step", "step": "0"}, f"step {NOT_WHOLE} 0 on, not '0'"),
    ({"ask": "step", "step": 0.0}, f"step {NOT_WHOLE} 0 on, not 0.0"),
    ({"ask": "step", "step": True}, f"step {NOT_WHOLE} 0 on, not True"),
    ({"ask": "step", "step": -1}, f"step {NOT_WHOLE} 0 on, not -1"),
    ({"ask": "first_look"}, f"step {NOT_WHOLE} 0 on, not None"),
    ({**LINES, "count": 0}, f"count {NOT_WHOLE} 1 on, not 0"),
    ({**LINES, "top": 0}, f"top {NOT_WHOLE} 1 on, not 0"),
    ({**LINES, "first": -1}, f"first {NOT_WHOLE} 0 on, not -1"),
    ({**LINES, "example": None}, f"example {NOT_WHOLE} 0 on, not None"),
    ({**LINES, "layer": "a"}, f"layer {NOT_WHOLE} 0 on, not 'a'"),
    ({**LINES, "heads": 0}, "heads must be a list of head numbers, not 0"),
    ({**LINES, "heads": []}, "heads must be a list of head numbers, not []"),
    ({**LINES, "heads": [0, True]}, "heads must be a list of head numbers, not [0, True]"),
    ({**LINES, "heads": [0] * 5}, "heads lists 5 heads, a has 4"),
]


@pytest.mark.parametrize(("question", "text"), BAD, ids=[text for _, text in BAD])
def test_a_bad_question_is_told_what_is_wrong(question: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(BadQuestion, match=f"^{re.escape(text)}"):
        answer(run_of(tmp_path), question)


def test_what_the_run_has_not_is_named(tmp_path: Path) -> None:
    trial = run_of(tmp_path)
    for ask in ({"ask": "step", "step": 5}, {"ask": "first_look", "step": 5}, {**LINES, "step": 5}):
        with pytest.raises(NoSuchStep, match=r"^no step 5 in .*; it has 0, nearest 0\.$"):
            answer(trial, ask)
    with pytest.raises(NoSuchName, match=r"^no layer 2 at step 0 of .*; it has 2 attention layers$"):
        answer(trial, {**LINES, "layer": 2})
    with pytest.raises(NoSuchName, match=r"^no example 2 in .*; its probe has 2$"):
        answer(trial, {**LINES, "example": 2})
    for head in (4, -1):
        with pytest.raises(NoSuchName, match=rf"^no head {head} in a; the run has its heads 0, 1, 2, 3$"):
            answer(trial, {**LINES, "heads": [0, head]})
    with pytest.raises(NoSuchName, match=r"^no examples in .* yet; the first step brings them$"):
        answer(open_trial(tmp_path / "later"), {"ask": "first_look", "step": 0})


def logged(path: Path, values: Sequence[float], name: str = "loss") -> Trial:
    writer = write(path, [0], close=False)
    for step, value in enumerate(values):
        writer.log(step, {name: value})
    writer.close()
    return open_trial(path)


def test_few_scalars_come_whole(tmp_path: Path) -> None:
    trial = logged(tmp_path, [0.5, float("inf"), float("nan"), 0.25])
    facts, _ = asked(trial, ask="trial")
    assert facts["scalars"] == {"loss": {"step": [0, 1, 2, 3], "value": [0.5, None, None, 0.25]}}
    assert scalars(trial, after={"loss": 2}) == {"loss": {"step": [3], "value": [0.25]}}
    assert scalars(trial, after={"loss": 3, "lr": 0}) == {}


def test_many_scalars_are_thinned_to_their_extremes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(4000)
    values[[1234, 3210]] = 50, -50
    found = scalars(logged(tmp_path, values.tolist()))["loss"]
    assert 500 < len(found["step"]) <= 1000
    assert found["step"] == sorted(set(found["step"]))
    assert found["value"] == [values[step] for step in found["step"]]
    shown = set(found["step"])
    for start in range(0, 4000, 8):
        part = values[start : start + 8]
        assert {start + int(part.argmin()), start + int(part.argmax())} <= shown


def test_thinning_keeps_extremes_beside_nan(tmp_path: Path) -> None:
    values = np.zeros(4000)
    values[[803, 805]] = 9, -9
    values[801] = np.nan
    found = scalars(logged(tmp_path, values.tolist()))["loss"]
    shown = dict(zip(found["step"], found["value"], strict=True))
    assert (shown.get(803), shown.get(805)) == (9, -9)
    assert shown[801] is None
    values[:] = np.nan
    found = scalars(logged(tmp_path, values.tolist()))["loss"]
    assert set(found["value"]) == {None}
    assert len(found["step"]) == 500


# What the front end is tested with.


def test_the_golden_replies_are_made_as_they_stand() -> None:
    made = dict(make.files())
    assert made.keys() == {path.name for path in make.HERE.iterdir() if path.suffix in (".json", ".safetensors")}
    for name, blob in made.items():
        assert blob == (make.HERE / name).read_bytes(), f"{name} differs; python tests/golden/make.py writes it anew"


def test_golden_replies_show_every_case() -> None:
    facts = {
        path.stem: strict(decode(path.read_bytes())[1].metadata["facts"]) for path in make.HERE.glob("*.safetensors")
    }
    assert facts["waiting"]["state"]["state"] == "waiting"
    assert facts["lines"]["check"]["passed"]
    assert facts["lines_withheld"]["check"]["passed"] is False
    assert facts["lines_window"]["shown_first"] == 1
    assert facts["trial"]["examples"][1]["label"] is None
    assert {question["ask"] for question in make.QUESTIONS.values()} == {"trial", "step", "lines", "first_look"}
    assert sum(path.stat().st_size for path in make.HERE.glob("*.safetensors")) < 64 * 1024


def test_a_layer_between_other_tokens_is_not_drawn_under_the_examples_names(tmp_path: Path) -> None:
    model = models.t5()
    inputs = {"input_ids": torch.randint(3, 20, (2, 6)), "decoder_input_ids": torch.randint(3, 20, (2, 6))}
    with pytest.warns(HeadscopeWarning, match="no optimiser step"), watch(model, tmp_path, probe=inputs):
        model(**inputs)
    trial = open_trial(tmp_path)
    for index, layer in enumerate(trial.layers(0)):
        facts, tensors = asked(trial, **{**LINES, "step": 0, "layer": index, "heads": [0]})
        assert layer.named == ("decoder" not in layer.path)
        assert bool(facts["withheld"]) == (not layer.named)
        assert tensors["weight"].size == 0 if facts["withheld"] else tensors["weight"].size > 0
    assert "attends between other tokens than the example's" in facts["withheld"]
    assert asked(trial, ask="first_look", step=0)[0]["layer"] == 0


def test_a_self_check_that_failed_in_a_later_batch_is_told(tmp_path: Path) -> None:
    run = writer(tmp_path)
    names = [["a", "b", "c"]]
    run.put_probe(encode({}, {"tokens": json.dumps([names, names]), "texts": json.dumps([["x"], ["y"]])}))
    record = Record(run.image(), kept=torch.float32, exact=set(), turn=0)
    for batch, wrong in enumerate((0, 1)):
        q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v) + wrong
        record.add(boundary.Call("a", 0, "sdpa", q, k, v, output, scale=0.5), mode="probe", batch=batch)
    run.submit(0, record.image, record.finish)
    run.close()
    facts, _ = asked(open_trial(tmp_path), ask="step", step=0)
    assert facts["failed"] == [0] and facts["worst_check"] > 0.1
