"""What a run may cost: which layers, heads, examples and tokens are kept, how many bytes, how much time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from headscope import HeadscopeError, HeadscopeWarning, NoSuchName, NoSuchStep, audit, open_trial, watch
from headscope.trial import Trial

torch.set_num_threads(1)


def batch(examples: int = 6, length: int = 12, padding: str = "right") -> dict[str, Any]:
    return {**models.tokens(examples, length, padding), "labels": torch.arange(examples) % 2}


def train(model: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run(path: Path, model: Any, steps: int = 1, **options: Any) -> Trial:
    model.train()
    with watch(model, path, probe=batch(), every=1, dtype="float32", **options):
        train(model, steps)
    assert audit.audit(path).faults == []
    return open_trial(path)


def test_chosen_heads_are_those_of_the_whole(tmp_path: Path) -> None:
    for make in (models.bert, models.llama):
        torch.manual_seed(0)
        model = make()
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        whole, part = tmp_path / f"{make.__name__}-whole", tmp_path / f"{make.__name__}-part"
        for path, heads in ((whole, None), (part, [3, 1, 99])):
            with watch(model, path, probe=inputs, dtype="float32", heads=heads), torch.no_grad():
                model(**inputs)
        one, other = open_trial(whole), open_trial(part)
        layer, chosen = one.layers(0)[1], other.layers(0)[1]
        assert chosen.numbers == (3, 1) and chosen.heads == layer.heads == 4
        full = one.weights(0, layer)
        np.testing.assert_allclose(other.weights(0, chosen), full[:, [3, 1]], atol=1e-6)
        np.testing.assert_allclose(other.weights(0, chosen, row=2, heads=[1]), full[2:3, [1]], atol=1e-6)
        np.testing.assert_allclose(other.tensor(f"{chosen.name}.weights").value(0), full[:, [3, 1]], atol=1e-6)
        with pytest.raises(NoSuchName, match=r"no head 0 in .*; the run has its heads 3, 1"):
            other.weights(0, chosen, row=0, heads=[0])


def test_chosen_layers(tmp_path: Path) -> None:
    trial = run(tmp_path / "regex", models.bert(), layers=r"layer\.1\.")
    assert [layer.path for layer in trial.layers(0)] == ["bert.encoder.layer.1.attention.self"]
    path = "bert.encoder.layer.0.attention.self"
    assert [layer.path for layer in run(tmp_path / "paths", models.bert(), layers=[path]).layers(0)] == [path]
    with pytest.warns(HeadscopeWarning, match="none of 2 attention calls is kept: layers or heads name none of them"):
        run(tmp_path / "none", models.bert(), layers="nowhere")


def test_examples_and_tokens_are_cut(tmp_path: Path) -> None:
    trial = run(tmp_path, models.bert(), examples=2, tokens=5)
    assert len(trial.examples()) == 2 and all(len(e.tokens) <= 5 for e in trial.examples())
    assert trial.tensor("bert.encoder.layer.0.attention.self.q").value(0).shape[0::2] == (2, 5)


def test_left_padded_batches_keep_their_last_tokens(tmp_path: Path) -> None:
    model, left = models.gpt2(), models.tokens(3, 12, "left")
    with watch(model, tmp_path, probe=left, tokens=4):
        model(**left)
    ids = np.asarray(left["input_ids"])[:, -4:]
    assert [list(map(int, e.tokens)) for e in open_trial(tmp_path).examples()] == [
        [int(i) for i, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(ids, np.asarray(left["attention_mask"])[:, -4:], strict=True)
    ]


def test_first_batch_is_cut_too(tmp_path: Path) -> None:
    model = models.bert().train()
    with watch(model, tmp_path, examples=3, tokens=6):
        train(model, 1)
    assert len(open_trial(tmp_path).examples()) == 3
    assert max(len(e.tokens) for e in open_trial(tmp_path).examples()) <= 6


def test_bytes_are_kept_by_thinning_older_steps(tmp_path: Path) -> None:
    one = sum(file.stat().st_size for file in (run_size(tmp_path / "one")).glob("a000/steps/*")) // 2
    limit = 9 * one + one // 2
    with pytest.warns(HeadscopeWarning, match=rf"reached {limit:,} bytes: older steps are thinned from now on") as said:
        trial = run(tmp_path / "run", models.bert(), 60, max_bytes=limit)
    assert len([w for w in said if issubclass(w.category, HeadscopeWarning)]) == 1
    steps = trial.steps()
    assert len(steps) == 9 and steps[0] == 0 and steps[-2:] == [59, 60]
    gaps = np.diff(steps)
    assert (gaps[1:] <= gaps[:-1] * 2).all() and gaps[0] > 8 * gaps[-1]
    assert sum(file.stat().st_size for file in (tmp_path / "run").glob("a000/steps/*")) <= limit
    assert trial.state().thinned == 61 - 9


def run_size(path: Path) -> Path:
    run(path, models.bert(), 1)
    return path


def test_an_open_trial_notices_what_was_thinned(tmp_path: Path) -> None:
    model = models.bert().train()
    one = sum(file.stat().st_size for file in run_size(tmp_path / "one").glob("a000/steps/*")) // 2
    with (
        pytest.warns(HeadscopeWarning, match="thinned"),
        watch(model, tmp_path / "run", probe=batch(), every=1, dtype="float32", max_bytes=4 * one) as watched,
    ):
        train(model, 2)
        trial = open_trial(tmp_path / "run")
        assert trial.wait(2, timeout=20) == 2
        before = trial.steps()
        for number in range(3, 30):
            watched.step(number)
    assert before == [0, 1, 2]
    with pytest.raises(NoSuchStep, match=r"step 1 of .* was thinned; it has 0, "):
        trial.read(1, [("probe/0/logits", ())])
    assert trial.steps()[0] == 0 and 1 not in trial.steps() and trial.steps()[-1] == 29


def test_overhead_stretches_the_interval(tmp_path: Path) -> None:
    model = models.bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with (
        pytest.warns(HeadscopeWarning, match=r"captures take more than 0\.01 of the training time every 1 steps"),
        watch(model, tmp_path, probe=batch(), every=1, overhead=0.01) as watched,
    ):
        took, began = 0.0, time.perf_counter()
        while time.perf_counter() - began < 3:
            model(**batch()).loss.backward()
            before = time.perf_counter()
            optimizer.step()
            took += time.perf_counter() - before
        steps = watched._step
    captured = open_trial(tmp_path).steps()
    assert 1 < len(captured) < steps / 4


def test_without_overhead_every_step_is_captured(tmp_path: Path) -> None:
    assert run(tmp_path, models.bert(), 5).steps() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"examples": 0}, "examples must be a whole number from 1 on, not 0"),
        ({"tokens": 1.5}, r"tokens must be a whole number from 1 on, not 1\.5"),
        ({"max_bytes": -1}, "max_bytes must be a whole number from 1 on, not -1"),
        ({"overhead": 2}, "overhead must be a part of the training time, between 0 and 1, not 2"),
        ({"layers": "("}, r"layers='\(' is not a regular expression: .*; or give a list of paths"),
        ({"heads": []}, r"heads must be a list of head numbers from 0 on, not \[\]"),
        ({"heads": [-1]}, r"heads must be a list of head numbers from 0 on, not \[-1\]"),
    ],
)
def test_what_is_no_budget_is_said_at_the_door(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(HeadscopeError, match=says):
        watch(models.bert(), tmp_path, **options)


def test_bytes_are_those_of_the_whole_run(tmp_path: Path) -> None:
    run(tmp_path, models.bert(), 12)
    one = max(file.stat().st_size for file in tmp_path.glob("a000/steps/*"))
    with pytest.warns(HeadscopeWarning, match="thinned"):
        trial = run(tmp_path, models.bert(), 12, max_bytes=8 * one + one // 2)
    names = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.glob("a*/steps/*"))
    assert len(names) == 8 and names[0].startswith("a000/steps/0000000000-")
    assert len([name for name in names if name.startswith("a001")]) >= 5 and trial.steps()[-1] == 12
    old = open_trial(tmp_path, attempt=0)
    assert old.steps()[0] == 0 and old.tensor("logits").value(0).shape[0] == 6
