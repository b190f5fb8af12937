"""Checkpoints that a real Trainer saved, looked at afterwards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import headscope
import models
from headscope import cli, open_trial
from headscope.errors import HeadscopeError, NotSupported, StoreError
from headscope.replay import read_examples
from test_huggingface import Rows, tokenizer, trainer

torch.set_num_threads(1)

TEXTS = [("w7 w8 w9", 1), ("w10 w11", 0)]
QUERY = "bert.encoder.layer.0.attention.self"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer's folder with checkpoints at 2, 4, ..., 10, and the run that a callback wrote beside it."""
    path = tmp_path_factory.mktemp("trained")
    callback = headscope.HeadscopeCallback(path / "run", TEXTS, every=2)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(path, callback, max_steps=10, learning_rate=1e-2, dev=Rows(4, seed=1), **saving).train()
    return path


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path / "out"


def test_it_gives_what_a_watch_gave(trained: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    done = headscope.replay(
        trained / "out", tmp_path / "run", probe=TEXTS, progress=lambda number, total: seen.append((number, total))
    )
    assert (done.steps, done.skipped) == ([2, 4, 6, 8, 10], {})
    assert seen == [(number, 5) for number in range(6)]
    live, later = open_trial(trained / "run"), open_trial(tmp_path / "run")
    assert later.steps() == live.steps()[1:] == done.steps
    assert (later.state().state, later.state().message, later.state().skipped) == ("ended", "", 0)
    assert later.facts()["model"] == "BertForSequenceClassification"
    assert [(e.tokens, e.label) for e in later.examples()] == [(e.tokens, e.label) for e in live.examples()]
    for step in later.steps():
        for one, other in zip(live.layers(step), later.layers(step), strict=True):
            assert one.path == other.path
            np.testing.assert_array_equal(live.weights(step, one), later.weights(step, other))
            assert other.check.passed
        assert live.predictions(step) == later.predictions(step)
        assert live.loss(step) == later.loss(step)
    assert np.abs(later.tensor(f"{QUERY}.weights").value(2) - later.tensor(f"{QUERY}.weights").value(10)).max() > 0.01
    for name in ("loss", "learning_rate", "grad_norm"):
        steps, values = later.scalars()[name]
        assert steps.tolist() == [2, 4, 6, 8, 10]
        np.testing.assert_array_equal(values, live.scalars()[name][1])


def test_nothing_is_said_and_nothing_stays(trained: Path, tmp_path: Path) -> None:
    import threading

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        headscope.replay([trained / "out" / "checkpoint-4"], tmp_path / "run", probe=TEXTS)
    assert open_trial(tmp_path / "run").steps() == [4]
    assert not [thread for thread in threading.enumerate() if thread.name == "headscope-writer"]


def test_folders_in_any_order_are_replayed_by_step(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "out" / "checkpoint-2", tmp_path / "renamed")
    given: list[Path | str] = [
        trained / "out" / "checkpoint-10",
        str(tmp_path / "renamed"),
        trained / "out" / "checkpoint-4",
    ]
    done = headscope.replay(given, tmp_path / "run", probe=TEXTS, dtype="float32")
    assert done.steps == open_trial(tmp_path / "run").steps() == [2, 4, 10]
    assert open_trial(tmp_path / "run").layers(2)[0].check.limit == 1e-4
    assert open_trial(tmp_path / "run").scalars()["loss"][0].tolist() == [2, 4, 6, 8, 10]


def test_broken_checkpoints_are_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    parts = {step: folder / f"checkpoint-{step}" for step in (2, 4, 6, 8)}
    weights = parts[2] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (parts[4] / "config.json").unlink()
    (parts[6] / "trainer_state.json").write_text('{"global_step": 6, "log_hist')
    (parts[8] / "model.safetensors").unlink()
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-11")
    done = headscope.replay([folder, tmp_path / "none"], tmp_path / "run", probe=TEXTS)
    assert done.steps == open_trial(tmp_path / "run").steps() == [10]
    said = {Path(name).name: reason for name, reason in done.skipped.items()}
    assert said.keys() == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8", "checkpoint-11", "none"}
    assert "SafetensorError" in said["checkpoint-2"]
    assert said["checkpoint-4"] == "it has no config.json"
    assert said["checkpoint-6"].startswith(
        "its trainer_state.json cannot be read: JSONDecodeError: Unterminated string"
    )
    assert said["checkpoint-8"].startswith("OSError: Error no file named")
    assert said["checkpoint-11"] == "its step 10 is not after 10, which came before it; give each step once, in order"
    assert said["none"] == "there is no such folder"


def test_weights_that_are_not_all_there_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for step, change in ((2, "missing"), (4, "more")):
        file = folder / f"checkpoint-{step}" / "model.safetensors"
        state = load_file(file)
        if change == "missing":
            del state[f"{QUERY}.query.weight"]
        else:
            state[f"{QUERY}.query.lora_A"] = torch.ones(2)
        save_file(state, file, {"format": "pt"})
    done = headscope.replay(folder, tmp_path / "run", probe=TEXTS)
    assert done.steps == [6, 8, 10]
    assert list(done.skipped.values()) == [
        f"it does not fit BertForSequenceClassification: missing keys {QUERY}.query.weight",
        f"it does not fit BertForSequenceClassification: unexpected keys {QUERY}.query.lora_A",
    ]


def test_a_folder_without_a_step_and_an_adapter(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "out" / "checkpoint-2", tmp_path / "final")
    (tmp_path / "final" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "adapter_config.json").write_text("{}")
    text = (
        "its step is not known: it has no trainer_state.json, and is not called checkpoint-<step>), "
        f"{tmp_path}/checkpoint-3: it has an adapter (PEFT) and no whole model; merge it, and give (step, state dict)"
    )
    with pytest.raises(HeadscopeError) as problem:
        headscope.replay([tmp_path / "final", tmp_path / "checkpoint-3"], tmp_path / "run", probe=TEXTS)
    said = str(problem.value)
    assert said.startswith(f"nothing to replay for {tmp_path}/run: none of 2 checkpoints can be used (")
    assert text.split("), ")[0] in said and text.split("), ")[1] in said
    assert said.endswith("give folders that a Trainer saved, or (step, state dict) pairs and their model")
    assert not (tmp_path / "run").exists(), "nothing is begun for nothing"


def test_pairs_of_step_and_state_dict(tmp_path: Path) -> None:
    model = models.Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = models.tokens()["input_ids"]
    saved: list[tuple[int, dict[str, Any]]] = []
    for step in range(0, 30, 10):
        saved.append((step, {f"module.{name}": value.clone() for name, value in model.state_dict().items()}))
        model(ids).square().sum().backward()
        optimizer.step()
    expected = [w["module.embed.weight"] for _, w in saved]

    def stream() -> Iterator[tuple[int, dict[str, Any]]]:
        yield from saved
        yield 15, saved[0][1]
        yield 40, {name: value for name, value in saved[0][1].items() if "head" not in name}

    for name, given in (("list", saved[::-1]), ("generator", stream())):
        done = headscope.replay(
            given, tmp_path / name, model=nn.DataParallel(models.Plain()), probe=ids, dtype="float32"
        )
        run = open_trial(tmp_path / name)
        assert done.steps == run.steps() == [0, 10, 20]
        for step, weight in zip(run.steps(), expected, strict=True):
            model = models.Plain()
            model.load_state_dict({key.removeprefix("module."): v for key, v in dict(saved)[step].items()})
            assert torch.equal(model.embed.weight, weight)
            np.testing.assert_allclose(run.tensor("logits").value(step), model(ids).detach().numpy(), atol=1e-5)
    assert done.skipped == {
        "step 15": "its step 15 is not after 20, which came before it; give each step once, in order",
        "step 40": "RuntimeError: Error(s) in loading state_dict for Plain: Missing key(s) in state_dict: "
        '"head.weight", "head.bias".',
    }


def test_one_checkpoint_is_held_at_a_time(tmp_path: Path) -> None:
    import weakref

    class State(dict[str, Any]):
        """A dict that can be referred to weakly."""

    held: list[weakref.ref[State]] = []

    def stream() -> Iterator[tuple[int, State]]:
        for step in (1, 2, 2, 3):
            assert [ref for ref in held if ref() is not None] == []
            state = State(models.Plain().state_dict())
            held.append(weakref.ref(state))
            pair = step, state
            del state
            yield pair
            del pair

    done = headscope.replay(stream(), tmp_path, model=models.Plain(), probe=models.tokens()["input_ids"])
    assert (done.steps, len(done.skipped), len(held)) == ([1, 2, 3], 1, 4)


def test_a_model_of_ones_own_that_a_trainer_saved(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.Plain()

        def forward(self, input_ids: Any, labels: Any = None, attention_mask: Any = None) -> Any:
            logits = self.inner(input_ids)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, model=Own(), max_steps=2, **saving).train()
    texts = [(text, label) for text, label in TEXTS if text]
    done = headscope.replay(tmp_path / "out", tmp_path / "run", model=Own(), probe=texts, tokenizer=tokenizer())
    assert done.steps == [1, 2]
    assert [layer.path for layer in open_trial(tmp_path / "run").layers(2)] == ["inner.layers.0", "inner.layers.1"]
    (tmp_path / "out" / "checkpoint-1" / "model.safetensors").unlink()
    done = headscope.replay(tmp_path / "out", tmp_path / "run", model=Own(), probe=texts, tokenizer=tokenizer())
    assert list(done.skipped.values()) == ["it has none of model.safetensors, pytorch_model.bin"]


def test_replaying_again_is_a_new_attempt(trained: Path, tmp_path: Path) -> None:
    for attempt in range(2):
        headscope.replay(trained / "out" / "checkpoint-4", tmp_path, probe=TEXTS)
        assert open_trial(tmp_path).attempt == attempt


# Errors.


def test_errors_say_what_to_do(trained: Path, tmp_path: Path) -> None:
    one = trained / "out" / "checkpoint-2"
    out = tmp_path / "run"
    state = models.bert().state_dict()
    with pytest.raises(NotSupported, match=r"^step 3 is a state dict, and no model was given; pass model=$"):
        headscope.replay([(3, state)], out, probe=TEXTS)
    with pytest.raises(
        HeadscopeError, match=r"^a checkpoint is a tuple of \(str, dict\); give a folder that a Trainer"
    ):
        headscope.replay([("3", dict(state))], out, probe=TEXTS)  # type: ignore[list-item]
    with pytest.raises(HeadscopeError, match=r"^the probe is int; what can be probed is a list of texts"):
        headscope.replay(one, out, probe=3)
    with pytest.raises(HeadscopeError, match=r"^the probe has 2 texts and the tokenizer is NoneType; pass tokenizer="):
        headscope.replay([(3, state)], out, model=models.bert(), probe=TEXTS)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write to"):
        headscope.replay(one, tmp_path / "file", probe=TEXTS)


def test_a_model_class_that_is_unknown(folder: Path, tmp_path: Path) -> None:
    one = folder / "checkpoint-2"
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**config, "architectures": ["MyBert"]}))
    text = (
        f"the config.json of {one} names the architecture 'MyBert', which transformers does not have; make the model "
        "and pass it as model= to headscope.replay"
    )
    with pytest.raises(NotSupported, match=f"^{re.escape(text)}$"):
        headscope.replay(one, tmp_path / "run", probe=TEXTS)
    done = headscope.replay(folder, tmp_path / "run", model=models.bert(), probe=TEXTS)
    assert done.steps == [2, 4, 6, 8, 10]


def test_a_probe_that_fails_in_the_model_is_an_error_and_a_failed_run(tmp_path: Path) -> None:
    model = models.Plain()
    ids = torch.full((2, 4), models.VOCABULARY)
    with pytest.raises(HeadscopeError, match=r"^the capture failed at step 5: IndexError: index out of range"):
        headscope.replay([(5, models.Plain().state_dict())], tmp_path, model=model, probe=ids)
    state = open_trial(tmp_path).state()
    assert (state.state, state.message.split(":")[0]) == ("failed", "HeadscopeError at step 5")


def test_slow_writing_leaves_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from headscope.writer import Writer

    put = Writer._put_step

    def slowly(self: Writer, job: Any) -> None:
        time.sleep(0.2)
        put(self, job)

    monkeypatch.setattr(Writer, "_put_step", slowly)
    monkeypatch.setattr(Writer, "patience_s", 0.01)
    saved = [(step, models.Plain().state_dict()) for step in range(7)]
    done = headscope.replay(saved, tmp_path, model=models.Plain(), probe=models.tokens()["input_ids"])
    assert open_trial(tmp_path).steps() == done.steps == list(range(7))


def test_without_transformers_pairs_can_be_replayed_and_folders_say_what_to_install(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name="transformers")
sys.meta_path.insert(0, Blocker())
import headscope, models
pair = (3, models.Plain().state_dict())
probe = models.tokens()["input_ids"]
print(headscope.replay([pair], {str(tmp_path / "run")!r}, model=models.Plain(), probe=probe).steps)
try:
    (__import__("pathlib").Path({str(tmp_path)!r}) / "checkpoint-2").mkdir()
    headscope.replay({str(tmp_path)!r}, {str(tmp_path / "run")!r}, probe=probe)
except ImportError as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == (
        "[3]\nreplaying a Trainer's checkpoint folders needs transformers, which is not installed: pip install "
        "'transformers>=4.48'; or give (step, state dict) pairs and their model\n"
    ), done.stderr


# The file of examples.


def test_examples_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "probe.txt"
    file.write_text("a dull film\t0\n\n  a fine one\t1\n")
    assert read_examples(file) == [("a dull film", 0), ("  a fine one", 1)]
    file.write_text("a dull film\na fine one")
    assert read_examples(file) == ["a dull film", "a fine one"]
    file = tmp_path / "probe.jsonl"
    file.write_text('{"text": "a\\tb", "label": 0}\n{"text": "c", "label": 1, "more": 2}\n')
    assert read_examples(file) == [("a\tb", 0), ("c", 1)]
    file.write_text('{"text": "a"}\n')
    assert read_examples(str(file)) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.txt",
            b"a\tpositive",
            "line 1 of {} is no example: after the tab stands 'positive'; a label is a whole number",
        ),
        ("a.txt", b"a\t1\nb", "line 2 of {} has no label, unlike those before it; give all lines a label, or none"),
        ("a.txt", b"a\nb\t1", "line 2 of {} has a label, unlike those before it; give all lines a label, or none"),
        ("a.txt", b"\n \n", "the probe {} has no line with a text"),
        ("a.txt", b"\xff", "the probe {} cannot be read: UnicodeDecodeError"),
        ("a.txt", None, "the probe {} cannot be read: FileNotFoundError"),
        ("a.jsonl", b"{", "line 1 of {} is no example: Expecting property name"),
        ("a.jsonl", b"[1]", 'line 1 of {} is no example: a line of .jsonl is an object with "text", and "label" if'),
        ("a.jsonl", b'{"text": "a", "label": "x"}', "line 1 of {} is no example: \"label\" is 'x'; a label is a whole"),
    ],
)
def test_files_that_are_no_examples(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(HeadscopeError, match=f"^{re.escape(says.format(tmp_path / name))}"):
        read_examples(tmp_path / name)


# The command.


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = tmp_path / "probe.txt"
    probe.write_text("w7 w8 w9\t1\nw10 w11\t0\n")
    out = str(tmp_path / "run")
    command = ["replay", str(folder), "--probe", str(probe), "--out", out]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{out}: 5 checkpoints replayed, steps 2, 4, 6, 8, 10; 0 skipped\n"
    assert cli.main(["check", out]) == 0
    assert cli.main(["info", out]) == 0
    assert "2, 4, 6, 8, 10; attempt 0" in capsys.readouterr().out
    (folder / "checkpoint-4" / "config.json").unlink()
    assert cli.main([*command, "--dtype", "float32", "--tokenizer", str(folder / "checkpoint-2")]) == 1
    assert capsys.readouterr().out == (
        f"SKIPPED {folder}/checkpoint-4: it has no config.json\n"
        f"{out}: 4 checkpoints replayed, steps 2, 6, 8, 10; 1 skipped\n"
    )
    assert cli.main([*command[:1], str(tmp_path / "none"), *command[2:]]) == 2
    assert "none of 1 checkpoints can be used" in capsys.readouterr().err
    assert cli.main([*command, "--tokenizer", str(tmp_path)]) == 2
    assert f"no tokenizer can be loaded from {tmp_path}: " in capsys.readouterr().err
