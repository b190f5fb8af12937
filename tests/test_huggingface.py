"""The callback in a real Trainer."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimisers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import headscope
import models
from headscope import HeadscopeCallback, open_trial
from headscope.errors import HeadscopeError, HeadscopeWarning
from headscope.integrations import watching

torch.set_num_threads(1)


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Sentences of tokens, of several lengths, with a column that no model takes."""

    def __init__(self, count: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = [6 + i % 5 for i in range(count)]
        self.rows = [torch.randint(5, models.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        # As data with augmentation does.
        random.random(), torch.rand(())
        return {"input_ids": self.rows[index], "labels": index % 2, "source": f"row {index}"}


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = Rows()
        return iter([rows[i] for i in range(len(rows))])


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{i}" for i in range(len(special), models.VOCABULARY))]
    whole = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    whole.pre_tokenizer = Whitespace()
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=whole, pad_token="[PAD]", unk_token="[UNK]", model_max_length=20)


def trainer(
    path: Path,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Trainer,
    model: nn.Module | None = None,
    train: Any = None,
    dev: Any = None,
    **named: Any,
) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2}
    settings |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 7}
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return kind(
        model=model if model is not None else models.bert(),
        args=TrainingArguments(str(path / "out"), **{**settings, **named}),
        train_dataset=Rows() if train is None else train,
        eval_dataset=dev,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """After every test: no thread of ours, no global hook."""
    before = dict(optimisers._global_optimizer_post_hooks)
    yield
    assert dict(optimisers._global_optimizer_post_hooks) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "headscope-writer"]


def test_one_argument_more(tmp_path: Path) -> None:
    dev = Rows(10, seed=1)
    training = trainer(
        tmp_path, HeadscopeCallback(tmp_path / "run", every=2), dev=dev, eval_strategy="steps", eval_steps=3
    )
    training.train()
    run = open_trial(tmp_path / "run")
    assert run.steps() == [0, 2, 4, 6]
    assert (run.state().state, run.attempt) == ("ended", 0)
    history = training.state.log_history
    for name, steps in (
        ("loss", [2, 4, 6]),
        ("learning_rate", [2, 4, 6]),
        ("grad_norm", [2, 4, 6]),
        ("eval_loss", [3, 6]),
    ):
        found, values = run.scalars()[name]
        assert found.tolist() == steps
        assert values.tolist() == [row[name] for row in history if name in row]
    assert set(run.scalars()) == {"loss", "learning_rate", "grad_norm", "eval_loss"}
    examples = run.examples()
    assert len(examples) == 8, "the first of the evaluation set"
    for index, example in enumerate(examples):
        assert example.tokens == tuple(f"w{i}" for i in dev.rows[index])
        assert example.label == index % 2
    assert all(layer.check.passed for step in run.steps() for layer in run.layers(step))
    assert run.layers(0)[0].path == "bert.encoder.layer.0.attention.self"
    assert run.loss(6) is not None
    # What was captured last is what the model gives now.
    batch = training.data_collator([{k: v for k, v in dev[i].items() if k != "source"} for i in range(8)])
    model: Any = training.model
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    assert run.predictions(6) == logits.argmax(-1).tolist()
    np.testing.assert_allclose(np.array(run.probabilities(6)), torch.softmax(logits, -1).numpy(), atol=1e-5)


def test_accumulation_counts_optimiser_steps(tmp_path: Path) -> None:
    callback = HeadscopeCallback(tmp_path / "run", every=1)
    trainer(tmp_path, callback, max_steps=2, gradient_accumulation_steps=3, per_device_train_batch_size=2).train()
    run = open_trial(tmp_path / "run")
    assert run.steps() == [0, 1, 2]
    assert run.header(2).facts("forwards", dict)["train"] == 6
    assert run.scalars()["loss"][0].tolist() == [2]


def test_resuming_goes_on_with_the_steps(tmp_path: Path) -> None:
    def again(steps: int, **named: Any) -> Trainer:
        return trainer(
            tmp_path, HeadscopeCallback(tmp_path / "run", every=2), dev=Rows(4, seed=1), max_steps=steps, **named
        )

    again(4, save_strategy="steps", save_steps=2).train()
    again(7).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    run = open_trial(tmp_path / "run")
    assert run.attempt == 1
    assert open_trial(tmp_path / "run", attempt=1).steps() == [2, 4, 6, 7]
    assert run.steps() == [0, 2, 4, 6, 7], "0 is the first attempt's"
    assert run.scalars()["loss"][0].tolist() == [2, 4, 6]


def test_training_twice_is_two_attempts(tmp_path: Path) -> None:
    training = trainer(tmp_path, HeadscopeCallback(tmp_path / "run", every=2), max_steps=2)
    training.train()
    training.train()
    assert open_trial(tmp_path / "run").attempt == 1
    for attempt in (0, 1):
        assert open_trial(tmp_path / "run", attempt=attempt).steps() == [0, 2]


class Preferring(Trainer):
    """As in TRL: its own loss, from two forwards of the model, and its own training step."""

    seen = 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        chosen = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        other = model(input_ids=inputs["input_ids"].flip(1), attention_mask=inputs["attention_mask"].flip(1))
        loss = -nn.functional.logsigmoid(chosen.logits[:, 0] - other.logits[:, 0]).mean()
        self.log_metric = float(loss.detach())
        return (loss, chosen) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Tensor:
        self.seen += 1
        return super().training_step(model, inputs, *args, **named)

    def log(self, logs: dict[str, float], *args: Any, **named: Any) -> None:
        super().log({**logs, "rewards/margin": 0.5, "note": "text"}, *args, **named)  # type: ignore[dict-item]


def test_subclasses_with_steps_and_losses_of_their_own(tmp_path: Path) -> None:
    training = trainer(tmp_path, HeadscopeCallback(tmp_path / "run", every=3), kind=Preferring)
    training.train()
    run = open_trial(tmp_path / "run")
    assert training.seen == 6  # type: ignore[attr-defined]
    assert run.steps() == [0, 3, 6]
    assert run.header(6).facts("forwards", dict)["train"] == 12
    assert run.scalars()["rewards/margin"][0].tolist() == [2, 4, 6]
    assert "training_step" not in vars(training)


# Which examples.


def test_without_an_evaluation_set_the_training_set(tmp_path: Path) -> None:
    rows = Rows()
    trainer(tmp_path, HeadscopeCallback(tmp_path / "run", every=9), train=rows, max_steps=1).train()
    examples = open_trial(tmp_path / "run").examples()
    assert [e.tokens for e in examples] == [tuple(f"w{i}" for i in row) for row in rows.rows[:8]]


def test_of_several_evaluation_sets_the_first_and_as_many_as_asked(tmp_path: Path) -> None:
    dev = {"one": Rows(5, seed=1), "two": Rows(5, seed=2)}
    trainer(tmp_path, HeadscopeCallback(tmp_path / "run", examples=3), dev=dev, max_steps=1).train()
    examples = open_trial(tmp_path / "run").examples()
    assert [e.tokens for e in examples] == [tuple(f"w{i}" for i in row) for row in dev["one"].rows[:3]]


def test_what_is_streamed_is_not_taken_from(tmp_path: Path) -> None:
    trainer(tmp_path, HeadscopeCallback(tmp_path / "run"), train=Stream(), max_steps=1).train()
    run = open_trial(tmp_path / "run")
    assert run.steps() == [0, 1]
    assert [e.tokens for e in run.examples()] == [tuple(f"w{i}" for i in row) for row in Rows().rows[:4]]


def test_texts_go_through_the_trainers_tokenizer(tmp_path: Path) -> None:
    callback = HeadscopeCallback(tmp_path / "run", [("w7 w8 w9", 1), ("w10", 0)])
    trainer(tmp_path, callback, dev=Rows(), max_steps=1).train()
    first, second = open_trial(tmp_path / "run").examples()
    assert (first.tokens, first.label) == (("w7", "w8", "w9"), 1)
    assert (second.tokens, second.label) == (("w10",), 0)


# What training must not notice.


def state_of(training: Trainer) -> list[Any]:
    numpy: Any = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), training.state.log_history]


@pytest.mark.parametrize("bf16", [False, True])
def test_training_is_bit_for_bit_as_without(bf16: bool, tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [HeadscopeCallback(tmp_path / "run", every=2)]):
        dev = Rows(6, seed=1)
        training = trainer(tmp_path, *callbacks, dev=dev, bf16=bf16, eval_strategy="steps", eval_steps=3)
        training.train()
        for row in training.state.log_history:
            for name in [n for n in row if n.endswith(("_runtime", "_per_second"))]:
                del row[name]
        optimizer: Any = training.optimizer
        model: Any = training.model
        found.append((model.state_dict(), optimizer.state_dict(), state_of(training)))
    alone, watched = found
    assert open_trial(tmp_path / "run").steps() == [0, 2, 4, 6]
    for step in (0, 2):
        assert open_trial(tmp_path / "run").layers(step)[0].dtype == ("bfloat16" if bf16 else "float32")
    assert alone[0].keys() == watched[0].keys()
    assert all(torch.equal(alone[0][name], watched[0][name]) for name in alone[0])
    assert alone[1]["param_groups"] == watched[1]["param_groups"]
    assert len(alone[1]["state"]) > 10
    for number, state in alone[1]["state"].items():
        assert all(torch.equal(state[name], watched[1]["state"][number][name]) for name in state)
    assert alone[2] == watched[2]


def test_the_best_weights_are_not_taken_for_the_last(tmp_path: Path) -> None:
    training = trainer(
        tmp_path,
        HeadscopeCallback(tmp_path / "run", every=100),
        dev=Rows(6, seed=1),
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    last: list[Tensor] = []

    class Keep(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any = None, **named: Any) -> None:
            last[:] = [model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()]

    training.add_callback(Keep())
    training.train()
    model: Any = training.model
    best = model.bert.encoder.layer[0].attention.self.query.weight.detach()
    assert not torch.equal(best, last[0]), "another checkpoint was the best"
    run = open_trial(tmp_path / "run")
    name = "bert.encoder.layer.0.attention.self.q"
    at_end = run.tensor(name).value(6)
    assert run.steps() == [0, 6]
    with headscope.watch(model, tmp_path / "best", probe=dict(_batch(training))) as watched:
        watched.step(1)
    assert np.abs(open_trial(tmp_path / "best").tensor(name).value(1) - at_end).max() > 0.1


def _batch(training: Trainer) -> Any:
    dev: Any = training.eval_dataset
    return training.data_collator([{k: v for k, v in dev[i].items() if k != "source"} for i in range(6)])


# What goes wrong.


def failing(at: int, error: BaseException) -> type[Trainer]:
    class Failing(Trainer):
        def training_step(self, *args: Any, **named: Any) -> Tensor:
            if self.state.global_step == at:
                raise error
            return super().training_step(*args, **named)

    return Failing


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (ValueError("no such token\nat all"), "failed", "ValueError at step 3: no such token"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt at step 3"),
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_a_training_that_raises_is_told(
    error: BaseException, state: str, message: str, added: bool, tmp_path: Path
) -> None:
    callback = HeadscopeCallback(tmp_path / "run", every=2)
    training = trainer(tmp_path, *([] if added else [callback]), kind=failing(3, error))
    if added:
        training.add_callback(callback)
    with pytest.raises(type(error)) as raised:
        training.train()
    assert raised.value is error
    run = open_trial(tmp_path / "run")
    assert (run.state().state, run.state().message) == (state, message)
    assert run.steps() == [0, 2]
    assert not {"_run_epoch", "_evaluate", "_finalize_training"} & set(vars(training))


def test_an_evaluation_or_an_end_that_raises_is_told(tmp_path: Path) -> None:
    class Bad(Trainer):
        def evaluate(self, *args: Any, **named: Any) -> dict[str, float]:
            raise OSError("the disk")

        def store_flos(self) -> None:
            raise OSError("the end")

    for name, message in (("steps", "OSError at step 2: the disk"), ("no", "OSError at step 4: the end")):
        callback = HeadscopeCallback(tmp_path / name)
        settings: dict[str, Any] = {"eval_strategy": name, "eval_steps": 2, "logging_strategy": "no"}
        training = trainer(tmp_path, callback, kind=Bad, dev=Rows(), max_steps=4, **settings)
        with pytest.raises(OSError, match="the "):
            training.train()
        assert open_trial(tmp_path / name).state().message == message


def test_with_the_stages_of_transformers_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.integrations import huggingface

    monkeypatch.setattr(huggingface, "_STAGES", huggingface._STAGES_4)
    training = trainer(tmp_path, HeadscopeCallback(tmp_path / "run"), kind=failing(2, ValueError("bad")))
    with pytest.raises(ValueError, match="bad"):
        training.train()
    assert open_trial(tmp_path / "run").state().message == "ValueError at step 2: bad"


def test_training_anew_after_a_smaller_batch_was_needed(tmp_path: Path) -> None:
    class Hungry(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Tensor:
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **named)

    training = trainer(tmp_path, HeadscopeCallback(tmp_path / "run", every=2), kind=Hungry, auto_find_batch_size=True)
    training.train()
    run = open_trial(tmp_path / "run")
    assert run.attempt is not None and run.attempt > 0
    assert (run.state().state, run.steps()) == ("ended", [0, 2, 4, 6])


def heard(do: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        do()
    return [str(warning.message) for warning in found if warning.category is HeadscopeWarning]


def test_what_is_not_usable_is_said_when_the_callback_is_made(tmp_path: Path) -> None:
    for named, text in (
        ({"every": 0}, "every must be a whole number of optimiser steps from 1 on, not 0"),
        ({"dtype": "float64"}, "dtype must be 'float16' or 'float32', not 'float64'; a 16-bit model keeps its own"),
        ({"overhead": 2}, "overhead must be a part of the training time, between 0 and 1, not 2"),
    ):
        with pytest.raises(HeadscopeError, match=f"^{re.escape(text)}"):
            HeadscopeCallback(tmp_path, **named)


def test_a_folder_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    training = trainer(tmp_path, HeadscopeCallback(tmp_path / "file"), max_steps=2)
    (said,) = heard(training.train)
    assert said.startswith(
        f"the watch of {tmp_path / 'file'} failed, and training goes on: StoreError: cannot write to"
    )
    assert training.state.global_step == 2


def test_a_probe_that_is_no_use_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = trainer(tmp_path, HeadscopeCallback(tmp_path / "run", 7), max_steps=2)
    training.train()
    # Warnings are errors here: it is said all the same.
    assert "HeadscopeError: the probe is int; what can be probed is a list of texts" in capsys.readouterr().err
    assert training.state.global_step == 2
    assert not (tmp_path / "run").exists()


def test_errors_of_ours_end_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **named: Any) -> Any:
        raise ZeroDivisionError("ours")

    callback = HeadscopeCallback(tmp_path / "run", every=1)
    training = trainer(tmp_path, callback, max_steps=2)
    for name in ("step", "log"):
        monkeypatch.setattr(headscope.watch, name, broken)
    said = heard(training.train)
    assert any("the watch of" in line and "ZeroDivisionError: ours" in line for line in said)
    assert training.state.global_step == 2


def test_a_model_that_no_rank_can_run_is_refused_in_words(tmp_path: Path) -> None:
    model: Any = models.bert()
    model.classifier.weight.ds_id = 1  # As DeepSpeed ZeRO stage 3 marks what it has spread.
    training = trainer(tmp_path, HeadscopeCallback(tmp_path / "run"), model=model, max_steps=1)
    (said,) = heard(training.train)
    assert said.startswith(f"the watch of {tmp_path / 'run'} failed, and training goes on: NotSupported: ")
    assert said.endswith("look at its checkpoints with headscope.replay")
    assert training.state.global_step == 1
    assert not (tmp_path / "run").exists()


RANKS = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_huggingface import HeadscopeCallback, Rows, trainer
path = Path({path!r})
trainer(path, HeadscopeCallback(path / "run", every=2), dev=Rows(4, seed=1), max_steps=4, ddp_backend="gloo").train()
torch.distributed.destroy_process_group()
"""


def test_two_ranks_write_one_run(tmp_path: Path) -> None:
    code = RANKS.format(tests=str(Path(__file__).parent), path=str(tmp_path))
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    run = open_trial(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("a*")] == ["a000"]
    assert (run.state().state, run.steps()) == ("ended", [0, 2, 4])
    assert run.layers(4)[0].path == "bert.encoder.layer.0.attention.self"


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_trainer_in_training_can_be_copied_and_its_callback_pickled(tmp_path: Path) -> None:
    copies: list[HeadscopeCallback] = []
    callback = HeadscopeCallback(tmp_path / "run", every=2)

    class Copying(TrainerCallback):
        def on_step_end(self, *args: Any, **named: Any) -> None:
            copies.append(copy.deepcopy(callback))
            copies.append(pickle.loads(pickle.dumps(callback)))

    trainer(tmp_path, callback, Copying(), max_steps=2).train()
    assert len(copies) == 4
    assert all(one.watch is None and one.out == callback.out for one in copies)
    assert open_trial(tmp_path / "run").steps() == [0, 2]


def test_a_watch_around_a_trainer(tmp_path: Path) -> None:
    training = trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert training.model is not None
    with headscope.watch(training.model, tmp_path / "run", tokenizer=tokenizer(), every=4):
        training.train()
    run = open_trial(tmp_path / "run")
    assert run.steps() == [0, 4, 6]
    assert run.state().state == "ended"
    assert len(run.examples()) == 2


def test_without_transformers_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["transformers"] = None
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name="transformers")
del sys.modules["transformers"]
sys.meta_path.insert(0, Blocker())
import headscope
try:
    headscope.HeadscopeCallback
except ImportError as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == (
        "headscope.HeadscopeCallback is for the Trainer of transformers, which is not installed: "
        "pip install 'transformers>=4.48' accelerate\n"
    ), done.stderr


def test_numbers_of_a_log() -> None:
    logs = {"loss": torch.tensor(0.5), "eval_acc": np.float32(0.25), "note": "0.5", "eval_runtime": 3, "epoch": 1.0}
    logs |= {"train_loss_step": 1, "matrix": torch.ones(2), "nothing": None, "eval_steps_per_second": 2}
    assert watching.numbers(logs) == {"loss": 0.5, "eval_acc": 0.25, "train_loss_step": 1.0}
    assert json.dumps(watching.numbers({"a": True})) == '{"a": 1.0}'
