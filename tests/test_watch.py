import contextlib
import copy
import gc
import json
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimisers

import headscope
import models
from headscope import open_trial
from headscope.boundary import Call, catching
from headscope.errors import HeadscopeError, HeadscopeWarning, NotSupported, StoreError
from headscope.record import Record
from headscope.trial import Trial
from headscope.watch import Watch, watch

torch.set_num_threads(1)

LABELS = torch.tensor([0, 1, 0])


class Tokenizer:
    """As much of a tokenizer as a probe needs: one id a word."""

    pad_token_id = 0
    all_special_ids = (0, 1, 2)

    def __call__(self, text: str, **named: Any) -> dict[str, list[int]]:
        ids = [1, *(5 + len(word) for word in text.split()), 2]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{i}" for i in ids if i not in self.all_special_ids)


def batch(seed: int = 0, size: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(5, models.VOCABULARY, (size, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(size) % 2}


def probe() -> dict[str, Any]:
    return {**models.tokens(padding="right"), "labels": LABELS}


def train(model: nn.Module, steps: int, each: Callable[[Tensor], None] = lambda loss: None, lr: float = 1e-3) -> None:
    """A plain loop."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        each(loss)


def caught(model: nn.Module, inputs: dict[str, Any]) -> list[Call]:
    model.eval()
    with torch.no_grad(), catching(model) as found:
        model(**inputs)
    return found.calls


def by_torch(call: Call) -> Tensor:
    """Weights of a call by torch alone."""
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    scores = (call.q.float() @ k.float().transpose(-1, -2)) * call.scale
    if call.mask is not None:
        scores = scores.masked_fill(~call.mask, -torch.inf)
    return torch.softmax(scores, -1)


def message(path: Path) -> str:
    return str(json.loads((path / "live.json").read_text())["message"])


def equal(path: Path, step: int, calls: list[Call], atol: float) -> None:
    run = open_trial(path)
    layers = run.layers(step)
    assert [layer.path for layer in layers] == [call.path for call in calls]
    for layer, call in zip(layers, calls, strict=True):
        found = run.weights(step, layer)
        assert np.abs(found - 1 / found.shape[-1]).max() > 0.3, "far from uniform"
        np.testing.assert_allclose(found, by_torch(call).numpy(), atol=atol)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """After every test: no thread of ours, no global hook."""
    before = dict(optimisers._global_optimizer_post_hooks)
    yield
    assert dict(optimisers._global_optimizer_post_hooks) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "headscope-writer"]


# What a plain loop leaves.


def test_a_plain_loop(tmp_path: Path) -> None:
    model = models.bert()
    first = caught(model, models.tokens(padding="right"))
    logged: list[float] = []
    with watch(model, tmp_path, probe=probe(), every=4, dtype="float32") as watched:
        assert watched.attempt == 0

        def log(loss: Tensor) -> None:
            watched.log(loss=loss, lr=0.5)
            logged.append(float(loss.detach()))

        train(model, 10, log)
    run = open_trial(tmp_path)
    assert run.steps() == [0, 4, 8, 10], "before training, every fourth, and the last"
    equal(tmp_path, 0, first, 1e-5)
    equal(tmp_path, 10, caught(model, models.tokens(padding="right")), 1e-5)
    assert np.abs(run.tensor(f"{first[0].path}.q").value(10) - run.tensor(f"{first[0].path}.q").value(0)).max() > 1e-4
    assert [run.header(step).facts("forwards", dict)["train"] for step in run.steps()] == [0, 4, 8, 10]
    steps, values = run.scalars()["loss"]
    assert steps.tolist() == list(range(1, 11))
    np.testing.assert_allclose(values, logged)
    assert set(run.scalars()) == {"loss", "lr"}
    assert run.state().state == "ended"
    assert run.state().skipped == 0
    facts = run.facts()
    assert facts["model"] == "BertForSequenceClassification"
    assert facts["torch"] == torch.__version__
    assert (facts["every"], facts["world"], facts["labels"]) == (4, 1, ["LABEL_0", "LABEL_1"])
    assert [example.label for example in run.examples()] == [0, 1, 0]
    with torch.no_grad():
        output = model.eval()(**probe())
    assert run.predictions(10) == output.logits.argmax(-1).tolist()
    np.testing.assert_allclose(np.array(run.probabilities(10)), torch.softmax(output.logits, -1).numpy(), atol=1e-5)
    assert run.loss(10) == pytest.approx(float(output.loss), abs=1e-5)


def test_all_self_checks_pass(tmp_path: Path) -> None:
    model = models.bert()
    with watch(model, tmp_path, probe=probe(), every=1):
        train(model, 3)
    run = open_trial(tmp_path)
    checks = [layer.check for step in run.steps() for layer in run.layers(step)]
    assert len(checks) == 8
    assert all(check.passed and check.error is not None and check.limit == 2e-2 for check in checks)
    assert {check.example for check in checks} == {0, 1, 2}, "another example is checked at each capture"


def test_the_last_step_is_not_captured_twice(tmp_path: Path) -> None:
    model = models.bert()
    with watch(model, tmp_path, probe=probe(), every=2):
        train(model, 4)
    run = open_trial(tmp_path)
    assert run.steps() == [0, 2, 4]
    assert [run.layers(step)[0].check.example for step in run.steps()] == [0, 1, 2], "three captures, an example each"


def test_evaluation_in_between_is_counted_apart(tmp_path: Path) -> None:
    model = models.bert()

    def evaluate(loss: Tensor) -> None:
        model.eval()
        with torch.no_grad():
            model(**batch())
        model.train()

    with watch(model, tmp_path, probe=probe(), every=2):
        train(model, 2, evaluate)
    assert open_trial(tmp_path).header(2).facts("forwards", dict) == {"train": 2, "eval": 1}


def test_a_second_watch_is_a_new_attempt(tmp_path: Path) -> None:
    for attempt in range(2):
        model = models.bert()
        with watch(model, tmp_path, probe=probe(), every=2) as watched:
            assert watched.attempt == attempt
            train(model, 2)
    assert open_trial(tmp_path).attempt == 1
    assert open_trial(tmp_path, attempt=0).steps() == [0, 2]


# Whose steps count.


def test_an_optimizer_of_another_model_does_not_count(tmp_path: Path) -> None:
    model, other = models.bert(), nn.Linear(2, 1)
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)

    def each(loss: Tensor) -> None:
        for _ in range(3):
            other(torch.ones(1, 2)).sum().backward()
            stranger.step()

    each(torch.zeros(()))
    with watch(model, tmp_path, probe=probe(), every=1):
        each(torch.zeros(()))
        train(model, 2, each)
    assert open_trial(tmp_path).steps() == [0, 1, 2]


def two_optimizers(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    parameters = list(model.parameters())
    one = torch.optim.SGD(parameters[:3], lr=1e-3)
    other = torch.optim.SGD(parameters[3:], lr=1e-3)

    def loop() -> None:
        model.train()
        for step in range(steps):
            model(**batch(step)).loss.backward()
            one.step()
            other.step()
            other.step()

    return other, loop


def test_of_two_optimizers_the_first_counts_or_the_one_given(tmp_path: Path) -> None:
    for given, steps in ((False, [0, 1, 2]), (True, [0, 1, 2, 3, 4])):
        model = models.bert()
        other, loop = two_optimizers(model, 2)
        path = tmp_path / str(given)
        with watch(model, path, probe=probe(), every=1, optimizer=other if given else None):
            loop()
        assert open_trial(path).steps() == steps


def test_a_step_of_several_optimizers_is_captured_whole(tmp_path: Path) -> None:
    model = models.bert()
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD(parameters[0::2], lr=0.3), torch.optim.SGD(parameters[1::2], lr=0.3)]
    wanted = {}
    with watch(model, tmp_path, probe=probe(), every=1):
        for step in range(1, 4):
            model.train()
            model(**batch(step)).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            model.train(mode=False)
            twin = copy.deepcopy(model)
            with torch.no_grad():
                wanted[step] = twin(**probe()).logits.numpy()
    trial = open_trial(tmp_path)
    assert trial.steps() == [0, 1, 2, 3]
    for step in (2, 3):  # At the first step it is not known yet that there is another optimizer.
        np.testing.assert_allclose(trial.tensor("logits").value(step), wanted[step], atol=1e-6)
    assert np.abs(wanted[2] - wanted[3]).max() > 1e-3


def test_steps_can_be_said_by_hand(tmp_path: Path) -> None:
    model = models.bert()
    with watch(model, tmp_path, probe=probe(), every=2) as watched:
        for step in range(5):
            model(**batch(step)).loss.backward()
            watched.step()
    assert open_trial(tmp_path).steps() == [0, 2, 4, 5]


# The probe.


def test_texts_with_labels_are_a_probe(tmp_path: Path) -> None:
    model = models.bert()
    texts = [("a bb ccc", 1), ("dddd", 0)]
    with watch(model, tmp_path, probe=texts, tokenizer=Tokenizer(), every=1):
        train(model, 1)
    first, second = open_trial(tmp_path).examples()
    assert first.tokens == ("<1>", "<6>", "<7>", "<8>", "<2>")
    assert first.special == (True, False, False, False, True)
    assert second.tokens == ("<1>", "<9>", "<2>")
    assert [first.label, second.label] == [1, 0]
    assert open_trial(tmp_path).layers(0)[0].mask is not None


def test_texts_without_labels_and_lists_of_batches(tmp_path: Path) -> None:
    for name, given, count in (("texts", ["a", "bb cc"], 2), ("batches", [batch(1, 2), batch(2, 3)], 5)):
        model = models.bert()
        with watch(model, tmp_path / name, probe=given, tokenizer=Tokenizer(), every=1):
            train(model, 1)
        run = open_trial(tmp_path / name)
        assert len(run.examples()) == count
        assert run.steps() == [0, 1]
    assert [len(run.layers(1, batch=number)) for number in (0, 1, 2)] == [2, 2, 0]
    assert run.tensor("logits").value(1, batch=1).shape == (3, 2)


def test_without_a_probe_the_first_8_examples_of_the_first_batch(tmp_path: Path) -> None:
    model = models.bert()
    inputs = batch(5, size=11)
    at_first = caught(model, {name: value[:8] for name, value in inputs.items()})
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, tmp_path, every=1, dtype="float32"):
        for _ in range(2):
            model(**inputs).loss.backward()
            optimizer.step()
    run = open_trial(tmp_path)
    assert run.steps() == [0, 1, 2]
    assert len(run.examples()) == 8
    assert run.tensor(f"{at_first[0].path}.q").value(0).shape[0] == 8
    equal(tmp_path, 0, at_first, 1e-5)


# Errors at the door.


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ({"model": "bert"}, "cannot watch a str; pass the torch.nn.Module that is trained"),
        ({"every": 0}, "every must be a whole number of optimiser steps from 1 on, not 0"),
        ({"every": 2.0}, "every must be a whole number of optimiser steps from 1 on, not 2.0"),
        ({"every": True}, "every must be a whole number of optimiser steps from 1 on, not True"),
        ({"dtype": "float64"}, "dtype must be 'float16' or 'float32', not 'float64'; a 16-bit model keeps its own"),
        ({"dtype": torch.bfloat16}, "dtype must be 'float16' or 'float32', not torch.bfloat16; a 16-bit model keeps"),
        ({"optimizer": "adam"}, "optimizer is a str, not a torch.optim.Optimizer; leave it out and call watch.step()"),
        ({"probe": ["a text"]}, "the probe has 1 texts and the tokenizer is NoneType; pass tokenizer="),
        ({"probe": 7}, "the probe is int; what can be probed is a list of texts"),
        ({"probe": []}, "the probe is an empty list; what can be probed is a list of texts"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_said_before_training(named: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(HeadscopeError, match=f"^{re.escape(text)}"):
        watch(named.pop("model", models.Plain()), tmp_path / "run", **named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["float32", torch.float32, torch.float16, "torch.float16", None])
def test_dtypes_go_by_several_names(dtype: Any, tmp_path: Path) -> None:
    assert isinstance(watch(models.Plain(), tmp_path, dtype=dtype), Watch)


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write to '.*file'"), watch(models.Plain(), tmp_path / "file"):
        raise AssertionError("training began")


def test_a_watch_is_used_once_and_within_with(tmp_path: Path) -> None:
    watched = watch(models.bert(), tmp_path, probe=probe())
    for use in (watched.step, watched.log, lambda: watched.attempt):
        with pytest.raises(HeadscopeError, match=r"the watch has not begun; use `with headscope\.watch\("):
            use()
    watched.close()
    with watched:
        train(watched._model, 1)
    with pytest.raises(HeadscopeError, match=r"this watch of .* has been used; make a new one"), watched:
        raise AssertionError("training began")


# What goes wrong.


def test_an_error_in_the_loop_is_told_and_goes_on_its_way(tmp_path: Path) -> None:
    model = models.bert()
    with pytest.raises(ValueError, match="no data"), watch(model, tmp_path, probe=probe(), every=2):
        train(model, 3)
        raise ValueError("no data\nat all")
    run = open_trial(tmp_path)
    assert (run.state().state, run.state().message) == ("failed", "ValueError at step 3: no data")
    assert run.steps() == [0, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_stopping_by_hand_is_no_failure(error: BaseException, tmp_path: Path) -> None:
    model = models.bert()
    with pytest.raises(type(error)), watch(model, tmp_path, probe=probe(), every=2):
        train(model, 1)
        raise error
    state = open_trial(tmp_path).state()
    assert (state.state, state.message) == ("stopped", f"{type(error).__name__} at step 1")


def test_leaving_by_exit_0_is_an_end(tmp_path: Path) -> None:
    model = models.bert()
    with pytest.raises(SystemExit), watch(model, tmp_path, probe=probe(), every=5):
        train(model, 1)
        raise SystemExit(0)
    assert open_trial(tmp_path).state().state == "ended"
    assert open_trial(tmp_path).steps() == [0, 1]


def heard(path: Path, do: Callable[[Path], None]) -> list[str]:
    """What was warned of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        do(path)
    assert {warning.category for warning in found} <= {HeadscopeWarning}
    return [str(warning.message) for warning in found]


class FailsInEval(models.Plain):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.training:
            raise RuntimeError("not made for eval\nreally")
        return super().forward(ids, mask)


def plain_loop(model: nn.Module, steps: int = 3, width: Any = None) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        model(batch(step)["input_ids"] if width is None else width).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_capture_that_fails_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    model = FailsInEval()
    before = model.head.weight.detach().clone()

    def do(path: Path) -> None:
        with watch(model, path, every=1) as watched:
            plain_loop(model)
            watched.log(loss=1.0)

    said = heard(tmp_path, do)
    text = "the capture failed at step 0: RuntimeError: not made for eval"
    assert said == [f"{text}; training goes on, captures are off"]
    assert not torch.equal(model.head.weight, before)
    assert model.training
    run = open_trial(tmp_path)
    assert run.steps() == []
    assert (run.state().state, run.state().message) == ("ended", text)
    assert run.scalars()["loss"][1].tolist() == [1.0]


def test_a_model_without_attention_is_told_loudly(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def do(path: Path) -> None:
        with watch(model, path, every=1):
            plain_loop(model, width=torch.ones(3, 4))

    said = heard(tmp_path, do)
    assert len(said) == 1
    assert said[0].startswith(
        "NO ATTENTION WAS CAUGHT in Sequential: Sequential called neither an attention function of transformers nor "
        "torch.nn.functional.scaled_dot_product_attention; attention written out by hand and"
    )
    assert message(tmp_path) == said[0]


def test_attention_that_is_not_captured_yet_is_named(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)

    def do(path: Path) -> None:
        with watch(model, path, every=1):
            plain_loop(model, width=torch.ones(2, 3, 8))

    said = heard(tmp_path, do)
    assert len(said) == 1
    assert re.match(
        r"NO ATTENTION WAS CAUGHT in TransformerEncoderLayer: in .*, torch's nn.MultiheadAttention", said[0]
    )


def test_nothing_watched_and_no_step_seen_are_said(tmp_path: Path) -> None:
    model = models.bert()

    def nothing(path: Path) -> None:
        with watch(model, path, probe=probe()):
            pass

    assert heard(tmp_path / "a", nothing) == [
        "nothing was watched: the forward of BertForSequenceClassification was never called within the watch"
    ]

    def no_step(path: Path) -> None:
        with watch(model, path, probe=probe()):
            model(**batch())

    said = heard(tmp_path / "b", no_step)
    assert len(said) == 1
    assert said[0].startswith("no optimiser step was seen: pass optimizer= if it does not train this model's own")
    assert message(tmp_path / "b") == said[0]


def test_what_cannot_be_logged_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    model = models.bert()

    def do(path: Path) -> None:
        with watch(model, path, probe=probe(), every=1) as watched:
            train(model, 1)
            for _ in range(2):
                watched.log(step=3)
            watched.log(loss=torch.ones(2), kept=1.0)
            numbers: dict[str, Any] = {"eval/loss": torch.tensor([0.5], requires_grad=True), "lr": 1}
            watched.log(**numbers)
            watched.log(text="nothing")  # type: ignore[arg-type]

    said = heard(tmp_path, do)
    assert said[0] == (
        "log of 'step' failed at step 1: HeadscopeError: "
        "a name is letters, digits, and _./ -, and neither step nor time"
    )
    assert len(said) == 3, "one line for each kind of mistake"
    assert said[1] == (
        "log of 'loss' failed at step 1: ValueError: only one element tensors can be converted to Python scalars"
    )
    assert set(open_trial(tmp_path).scalars()) == {"eval/loss", "kept", "lr"}
    assert open_trial(tmp_path).steps() == [0, 1], "captures go on"


def test_a_writer_that_fails_does_not_reach_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = obstore.put

    def put(where: Any, name: str, *args: Any, **named: Any) -> Any:
        if "/steps/" in name:
            raise OSError("No space left on device")
        return real(where, name, *args, **named)

    monkeypatch.setattr(obstore, "put", put)
    model = models.bert()

    def do(path: Path) -> None:
        with watch(model, path, probe=probe(), every=1):
            train(model, 3)

    assert heard(tmp_path, do) == [f"step 0 was not written to {tmp_path}: OSError: No space left on device"]
    assert open_trial(tmp_path).state().skipped == 4


def test_warnings_that_are_errors_do_not_reach_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = FailsInEval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch(model, tmp_path, every=1):
            plain_loop(model)
    assert "HeadscopeWarning: the capture failed at step 0" in capsys.readouterr().err


# In which precision.


def kept(path: Path, kind: str, step: int = 0) -> list[np.dtype[Any]]:
    return [entry.dtype for key, entry in open_trial(path).entries(step).items() if key.endswith(f".{kind}")]


def test_float16_by_default_and_float32_if_asked(tmp_path: Path) -> None:
    for dtype, numpy, limit in ((None, np.float16, 2e-2), ("float32", np.float32, 1e-4)):
        model = models.bert()
        first = caught(model, models.tokens(padding="right"))
        path = tmp_path / str(dtype)
        with watch(model, path, probe=probe(), every=1, dtype=dtype):
            train(model, 1)
        for kind in ("q", "k", "v", "output"):
            assert kept(path, kind) == [numpy, numpy]
        run = open_trial(path)
        assert {layer.check.limit for layer in run.layers(0)} == {limit}
        assert all(layer.check.passed for layer in run.layers(0))
        assert {layer.dtype for layer in run.layers(0)} == {"float32"}
        equal(path, 0, first, 2e-2 if dtype is None else 1e-5)


def test_a_16_bit_model_is_kept_as_it_is(tmp_path: Path) -> None:
    model = models.bert().bfloat16()
    first = caught(model, models.tokens(padding="right"))
    with watch(model, tmp_path, probe=probe(), every=1, dtype="float32"):
        train(model, 1)
    assert [dtype.name for dtype in kept(tmp_path, "q") + kept(tmp_path, "k")] == ["bfloat16"] * 4
    run = open_trial(tmp_path)
    assert [layer.dtype for layer in run.layers(0)] == ["bfloat16"] * 2
    found = run.tensor(f"{first[0].path}.q").value(0)
    assert np.array_equal(found, first[0].q.float().numpy())
    assert all(layer.check.passed for layer in run.layers(0))
    equal(tmp_path, 0, first, 1e-5)


def test_what_float16_cannot_hold_is_kept_as_float32(tmp_path: Path) -> None:
    model = models.bert()
    attention = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        attention.query.weight.mul_(1e5)
        attention.key.weight.div_(1e5)
        attention.query.bias.zero_()
        attention.key.bias.zero_()
    first = caught(model, models.tokens(padding="right"))
    assert float(first[0].q.abs().max()) > 65504
    with watch(model, tmp_path, probe=probe(), every=1):
        train(model, 1, lr=0.0)
    found = open_trial(tmp_path).tensor(f"{first[0].path}.q").value(0)
    assert found.dtype == np.float32
    assert np.array_equal(found, first[0].q.numpy())
    assert kept(tmp_path, "q") == [np.float32, np.float16]


def test_a_layer_that_float16_is_too_coarse_for_is_kept_in_float32_from_then_on(tmp_path: Path) -> None:
    model = models.bert()
    with torch.no_grad():
        # The same number added to every key changes no weight, and takes the digits that float16 has.
        model.bert.encoder.layer[1].attention.self.key.bias.fill_(160)
    first = caught(model, models.tokens(padding="right"))

    def do(path: Path) -> None:
        with watch(model, path, probe=probe(), every=1) as watched:
            assert watched.attempt == 0
            open_trial(path).wait(0, timeout=10)
            train(model, 1, lr=0.0)

    said = heard(tmp_path, do)
    assert len(said) == 1
    assert re.fullmatch(
        r"self-check failed at step 0 in bert\.encoder\.layer\.1\.attention\.self: rebuilt weights differ from the "
        r"kernel's output by \d\.\de[-+]\d\d \(limit 0\.02\), so they are marked and not drawn",
        said[0],
    )
    run = open_trial(tmp_path)
    assert run.steps() == [0, 1]
    assert [layer.check.passed for layer in run.layers(0)] == [True, False]
    assert [layer.check.passed for layer in run.layers(1)] == [True, True]
    assert kept(tmp_path, "q", 0) == [np.float16, np.float16]
    assert kept(tmp_path, "q", 1) == [np.float32, np.float16], "tensors of larger items lie first"
    second = run.weights(1, run.layers(1)[1])
    np.testing.assert_allclose(second, by_torch(first[1]).numpy(), atol=1e-4)


def test_a_model_that_has_diverged_is_marked(tmp_path: Path) -> None:
    model = models.bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight[0, 0] = torch.nan

    def do(path: Path) -> None:
        with watch(model, path, probe=probe(), every=5):
            train(model, 1)

    said = heard(tmp_path, do)
    run = open_trial(tmp_path)
    assert run.steps() == [0, 1]
    assert [layer.check.passed for layer in run.layers(0)] == [True, False]
    assert any(line.startswith("self-check failed at step 0 in bert.encoder.layer.1.attention.self") for line in said)


# Without a trace.


class Messy(nn.Module):
    """BERT with what a careless probe would disturb: batch statistics, random numbers in eval, a counter."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bert = models.bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen += 1
        logits = self.norm(self.bert(input_ids=input_ids, attention_mask=attention_mask).logits)
        logits = logits + 0.01 * torch.randn(2) + 0.01 * random.random() + 0.01 * np.random.rand()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained(path: Path | None, steps: int = 12) -> tuple[Messy, torch.optim.Optimizer, list[Any]]:
    model = Messy()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loop(log: Callable[[Tensor], None]) -> None:
        model.train()
        for step in range(steps):
            loss = model(**batch(step))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            log(loss)

    if path is None:
        loop(lambda loss: None)
    else:
        with watch(model, path, probe=probe(), every=2) as watched:
            loop(lambda loss: watched.log(loss=loss))
    numpy: Any = np.random.get_state()
    return model, optimizer, [torch.get_rng_state(), random.getstate(), numpy[1:3]]


def test_training_is_bit_for_bit_as_without(tmp_path: Path) -> None:
    alone, watched = trained(None), trained(tmp_path)
    run = open_trial(tmp_path)
    assert run.steps() == [0, 2, 4, 6, 8, 10, 12]
    assert all(len(run.layers(step)) == 2 for step in run.steps())
    one, other = alone[0].state_dict(), watched[0].state_dict()
    assert one.keys() == other.keys()
    assert any("running_mean" in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert float(other["seen"]) == 12
    before, after = alone[1].state_dict(), watched[1].state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for number, state in before["state"].items():
        assert all(torch.equal(state[name], after["state"][number][name]) for name in state)
    assert torch.equal(alone[2][0], watched[2][0])
    assert alone[2][1] == watched[2][1]
    assert np.array_equal(alone[2][2][0], watched[2][2][0])
    assert alone[2][2][1] == watched[2][2][1]
    assert watched[0].training
    assert all(module.training for module in watched[0].modules())
    # What the comparison is worth: dropout was on, and another seed trains another model.
    torch.manual_seed(4)
    assert not torch.equal(alone[0].bert.bert.pooler.dense.weight, Messy().bert.bert.pooler.dense.weight)


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("given", [False, True])
def test_nothing_stays_installed(given: bool, tmp_path: Path) -> None:
    model = models.bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with watch(model, tmp_path, probe=probe(), every=1, optimizer=optimizer if given else None):
        assert hooks(model) == 1
        assert [thread.name for thread in threading.enumerate()].count("headscope-writer") == 1
        model.train()
        model(**batch()).loss.backward()
        optimizer.step()
        assert hooks(model) == 1, "a capture leaves nothing behind"
    assert hooks(model) == 0
    assert not optimizer._optimizer_step_post_hooks
    assert torch.nn.functional.scaled_dot_product_attention is sdpa
    assert not [thread for thread in threading.enumerate() if thread.name == "headscope-writer"]
    size = len(list(tmp_path.rglob("*.safetensors")))
    optimizer.step()
    model(**batch())
    assert len(list(tmp_path.rglob("*.safetensors"))) == size


def test_a_closed_watch_is_let_go(tmp_path: Path) -> None:
    import weakref

    model = models.bert()
    with watch(model, tmp_path, probe=probe(), every=1) as watched:
        train(model, 1)
    gone = weakref.ref(watched)
    del watched
    gc.collect()
    assert gone() is None


def test_an_abandoned_watch_can_be_closed_by_hand(tmp_path: Path) -> None:
    model = models.bert()
    watched = headscope.watch(model, tmp_path, probe=probe(), every=1)
    watched.__enter__()
    train(model, 1)
    watched.close()
    watched.close()
    assert open_trial(tmp_path).state().state == "ended"
    assert open_trial(tmp_path).steps() == [0, 1]


# What a record holds.


def test_masks_are_written_once_and_outputs_beside(tmp_path: Path) -> None:
    model = models.bert()
    with watch(model, tmp_path, probe=probe(), every=1):
        train(model, 1)
    run: Trial = open_trial(tmp_path)
    masks = [key for key in run.entries(0) if "/mask" in key]
    assert masks == ["probe/0/mask.0"]
    assert run.entries(0)[masks[0]].shape == (3, 1, 1, 12)
    assert {layer.mask for layer in run.layers(0)} == {"mask.0"}
    assert {"logits", "predictions", "loss"} <= set(run.tensor_names())
    layer = run.layers(0)[0]
    assert run.entries(0)[layer.key("v")].shape == (1, 4, 12, 8)
    assert run.entries(0)[layer.key("output")].shape == (1, 4, len(layer.check.rows), 8)
    assert layer.check.rows == tuple(range(12))


def test_a_call_with_dropout_is_not_checked() -> None:
    from headscope.blob import Image

    q = torch.randn(2, 2, 4, 8)
    call = Call(path="a", call=0, route="sdpa", q=q, k=q, v=q, output=q, scale=1.0, dropout=0.1)
    record = Record(Image(), kept=torch.float32, exact=set(), turn=0)
    record.add(call, mode="train", batch=0)
    metadata, facts = record.finish({"step": "1"})
    assert metadata["calls"][0]["check"]["note"] == "unchecked: dropout"
    assert metadata["calls"][0]["check"]["error"] is None
    assert record.failed() == []
    assert isinstance(facts, list)
    assert "check" not in facts[0]
    with pytest.raises(KeyError):
        record.image["train/0/a.v"]


def test_a_call_that_is_wrong_fails_its_check() -> None:
    from headscope.blob import Image

    q, k, v = (torch.randn(2, 2, 4, 8) for _ in range(3))
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for scale, passes in ((8**-0.5, True), (0.5, False)):
        call = Call(path="a", call=0, route="sdpa", q=q, k=k, v=v, output=output, scale=scale)
        for keep, limit in ((torch.float32, 1e-4), (torch.float16, 2e-2)):
            exact: set[str] = set()
            record = Record(Image(), kept=keep, exact=exact, turn=1)
            record.add(call, mode="probe", batch=0)
            check = record.finish({})[0]["calls"][0]["check"]
            assert (check["example"], check["limit"]) == (1, limit)
            assert (check["error"] <= limit) == passes == (not record.failed())
            assert exact == ({"a"} if not passes and keep == torch.float16 else set())


def test_training_that_goes_on_from_a_checkpoint_keeps_its_numbers(tmp_path: Path) -> None:
    model = models.bert()
    with watch(model, tmp_path, probe=probe(), every=2, start_step=10) as watched:
        train(model, 3)
        watched.log(loss=1.0)
    trial = open_trial(tmp_path)
    assert trial.steps() == [10, 12, 13]
    assert list(trial.scalars()["loss"][0]) == [13]
    with pytest.raises(HeadscopeError, match="start_step must be a whole number from 0 on, not -1"):
        watch(model, tmp_path, start_step=-1)


def test_a_loop_that_counts_its_steps_itself(tmp_path: Path) -> None:
    model = models.bert()
    with watch(model, tmp_path, probe=probe(), every=5) as watched:
        watched.step(0)
        for number in (4, 5, 5, 10):
            train(model, 1)
            watched.step(number)
    assert open_trial(tmp_path).steps() == [0, 5, 10]


def test_a_watched_model_can_be_copied_and_saved(tmp_path: Path) -> None:
    model = models.bert().train()
    with watch(model, tmp_path / "run", probe=probe(), every=1):
        train(model, 1)
        twin = copy.deepcopy(model)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        for other in (twin, averaged, loaded):
            other(input_ids=probe()["input_ids"])
        train(twin, 1)
    assert open_trial(tmp_path / "run").steps() == [0, 1]
    assert open_trial(tmp_path / "run").header(1).facts("forwards", dict) == {"train": 1, "eval": 0}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_being_stopped_in_the_first_probe_leaves_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    model = models.bert().train()
    handle = model.register_forward_hook(lambda *_: (_ for _ in ()).throw(stop()))
    with pytest.raises(stop), watch(model, tmp_path, probe=probe()):
        pass
    handle.remove()
    assert not model._forward_pre_hooks
    state = open_trial(tmp_path).state()
    assert (state.state, state.message) == ("stopped", f"{stop.__name__} at step 0") or stop is SystemExit


def test_a_scripted_model_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))  # type: ignore[no-untyped-call]
    with pytest.raises(NotSupported, match="a scripted model runs no Python; watch the module that it was made of"):
        watch(scripted, tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


class Odd(torch.nn.Module):
    """Attention behind what forwards may do to their module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(40, 8, max_norm=0.5)
        self.qkv = torch.nn.Linear(8, 24)
        self.out = torch.nn.Linear(8, 2)
        self.own = torch.Generator().manual_seed(3)
        self.numpy = np.random.default_rng(3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.embedding(input_ids) + 0.1 * torch.rand(8, generator=self.own) + 0.1 * float(self.numpy.random())
        if not hasattr(self, "scale"):
            self.scale = self.qkv.weight.abs().mean() + 1
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        logits = self.out(x.mean(1)) * self.scale
        del self.scale
        found = {"logits": logits}
        return found if labels is None else found | {"loss": torch.nn.functional.cross_entropy(logits, labels)}


def test_what_odd_forwards_change_is_put_back(tmp_path: Path) -> None:
    def trained(watched: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = Odd()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        batch = {"input_ids": torch.randint(0, 40, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
        inside = watch(model, tmp_path / "run", probe=batch, every=1) if watched else contextlib.nullcontext()
        with inside:
            for _ in range(6):
                model(**batch)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    plain, seen = trained(False), trained(True)
    assert open_trial(tmp_path / "run").steps() == list(range(7))
    assert all(torch.equal(plain[name], seen[name]) for name in plain)


def test_attention_folded_into_the_batch_is_refused(tmp_path: Path) -> None:
    class Folded(Odd):
        def forward(self, input_ids: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
            batch, length = input_ids.shape
            parts = self.qkv(self.embedding(input_ids)).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
            q, k, v = parts.reshape(3, batch * 2, length, 4)
            x = torch.nn.functional.scaled_dot_product_attention(q, k, v).reshape(batch, 2, length, 4)
            return {"logits": self.out(x.transpose(1, 2).reshape(batch, length, 8).mean(1))}

    caught = r"NO ATTENTION WAS CAUGHT .* its batch is 8, the probe's 4; heads, windows"
    with pytest.warns(HeadscopeWarning, match="no optimiser step"), pytest.warns(HeadscopeWarning, match=caught):
        with watch(model := Folded(), tmp_path, probe={"input_ids": torch.randint(0, 40, (4, 6))}):
            model(torch.zeros(1, 2, dtype=torch.long))


def test_parameters_that_a_forward_changes_turn_captures_off(tmp_path: Path) -> None:
    class Drifting(Odd):
        def forward(self, input_ids: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                self.out.weight.mul_(1.0)
            return super().forward(input_ids, labels)

    changed = "in eval changes its parameter 'out.weight' in place; training goes on"
    with pytest.warns(HeadscopeWarning, match="no optimiser step"), pytest.warns(HeadscopeWarning, match=changed):
        with watch(model := Drifting(), tmp_path, probe={"input_ids": torch.randint(0, 40, (4, 6))}):
            model(torch.zeros(1, 2, dtype=torch.long))


def test_parameters_that_are_not_there_yet_are_waited_for(tmp_path: Path) -> None:
    class Lazy(Odd):
        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.LazyLinear(2)

    batch = {"input_ids": torch.randint(0, 40, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    model = Lazy()
    with (
        pytest.warns(HeadscopeWarning, match="step 0 is not captured: the model has parameters that its first forward"),
        watch(model, tmp_path, probe=batch, every=1) as watched,
    ):
        model(**batch)["loss"].backward()
        watched.step()
    assert open_trial(tmp_path).steps() == [1]
