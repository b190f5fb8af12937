"""The callback in a real Lightning Trainer."""

from __future__ import annotations

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

import models
from headscope import open_trial
from headscope.errors import HeadscopeError, HeadscopeWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningModule, Trainer

from headscope.integrations.lightning import HeadscopeCallback

torch.set_num_threads(1)

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 12, seed: int = 0) -> None:
        self.ids = torch.randint(5, models.VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": torch.tensor(index % 2)}


class Classifier(LightningModule):
    """A transformer inside, called by the training step and not by a forward of its own."""

    def __init__(self, fails_at: int = -1, error: BaseException | None = None) -> None:
        super().__init__()
        self.model = models.bert().train()
        self.fails_at, self.error = fails_at, error

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if self.global_step == self.fails_at and self.error is not None:
            raise self.error
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Tagger(LightningModule):
    """Two modules with parameters, and a forward that its training step does or does not call."""

    def __init__(self, by_forward: bool = True) -> None:
        super().__init__()
        self.encoder = models.Plain()
        self.head = nn.Linear(2, 2)
        self.by_forward = by_forward

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(ids))
        return found

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        ids, labels = batch
        logits = self(ids) if self.by_forward else self.head(self.encoder(ids))
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def pairs(size: int = 4) -> Any:
    rows = Rows()
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(rows.ids, torch.arange(len(rows)) % 2), batch_size=size
    )


def loader(rows: Rows, shuffle: bool = False) -> Any:
    return torch.utils.data.DataLoader(rows, batch_size=2, shuffle=shuffle)


def trainer(path: Path, *callbacks: Any, **named: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 6, "accelerator": "cpu", "logger": False, "log_every_n_steps": 2}
    settings |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=path, callbacks=list(callbacks), **{**settings, **named})


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """After every test: no thread of ours, no global hook."""
    before = dict(optimisers._global_optimizer_post_hooks)
    yield
    assert dict(optimisers._global_optimizer_post_hooks) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "headscope-writer"]


def heard(do: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        do()
    return [str(warning.message) for warning in found if warning.category is HeadscopeWarning]


def test_one_argument_more(tmp_path: Path) -> None:
    dev, module = Rows(10, seed=1), Classifier()
    training = trainer(tmp_path, HeadscopeCallback(tmp_path / "run", every=2), val_check_interval=3)
    training.fit(module, loader(Rows()), loader(dev))
    run = open_trial(tmp_path / "run")
    assert run.steps() == [0, 2, 4, 6]
    assert (run.state().state, run.attempt) == ("ended", 0)
    assert run.facts()["model"] == "BertForSequenceClassification"
    assert run.layers(0)[0].path == "bert.encoder.layer.0.attention.self", "the only module with parameters"
    assert {name: steps.tolist() for name, (steps, _) in run.scalars().items()} == {
        "train_loss": [2, 3, 4, 6],
        "learning_rate": [2, 4, 6],
        "val_loss": [3, 6],
    }
    assert run.scalars()["val_loss"][1][-1] == pytest.approx(float(training.callback_metrics["val_loss"]))
    examples = run.examples()
    assert [e.tokens for e in examples] == [tuple(map(str, row.tolist())) for row in dev.ids[:8]]
    assert [e.label for e in examples] == [0, 1] * 4
    with torch.no_grad():
        logits = module.model.eval()(input_ids=dev.ids[:8]).logits
    assert run.predictions(6) == logits.argmax(-1).tolist()
    assert all(layer.check.passed for step in run.steps() for layer in run.layers(step))


def test_accumulation_counts_optimiser_steps(tmp_path: Path) -> None:
    callback = HeadscopeCallback(tmp_path / "run", every=1)
    trainer(tmp_path, callback, max_steps=2, accumulate_grad_batches=3).fit(Classifier(), loader(Rows()))
    run = open_trial(tmp_path / "run")
    assert run.steps() == [0, 1, 2]
    assert run.header(2).facts("forwards", dict)["train"] == 6


def test_resuming_goes_on_with_the_steps_and_fitting_twice_is_two_attempts(tmp_path: Path) -> None:
    callback = HeadscopeCallback(tmp_path / "run", every=2)
    training = trainer(tmp_path, callback, max_steps=4)
    training.fit(Classifier(), loader(Rows()))
    training.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, callback, max_steps=7).fit(Classifier(), loader(Rows()), ckpt_path=tmp_path / "last.ckpt")
    assert open_trial(tmp_path / "run", attempt=0).steps() == [0, 2, 4]
    assert open_trial(tmp_path / "run", attempt=1).steps() == [4, 6, 7]
    assert open_trial(tmp_path / "run").steps() == [0, 2, 4, 6, 7]


def test_the_modules_own_forward_and_its_first_batch(tmp_path: Path) -> None:
    trainer(tmp_path, HeadscopeCallback(tmp_path / "run"), max_steps=2).fit(Tagger(), pairs())
    run = open_trial(tmp_path / "run")
    assert (run.facts()["model"], run.steps()) == ("Tagger", [0, 2])
    assert [layer.path for layer in run.layers(0)] == ["encoder.layers.0", "encoder.layers.1"]
    assert len(run.examples()) == 4, "these batches are no mappings: the first training batch's"


def test_a_forward_that_is_not_used_is_named_and_another_module_can_be(tmp_path: Path) -> None:
    fit = trainer(tmp_path, HeadscopeCallback(tmp_path / "run"), max_steps=2).fit
    said = heard(lambda: fit(Tagger(by_forward=False), pairs()))
    assert said[0] == (
        "the training_step of Tagger did not call the Tagger that is watched; name the module that it calls: "
        "HeadscopeCallback(..., module=...)"
    )
    fit = trainer(tmp_path, HeadscopeCallback(tmp_path / "other", module="encoder"), max_steps=2).fit
    assert heard(lambda: fit(Tagger(by_forward=False), pairs())) == []
    run = open_trial(tmp_path / "other")
    assert (run.facts()["model"], run.steps(), len(run.examples())) == ("Plain", [0, 2], 4)
    fit = trainer(tmp_path, HeadscopeCallback(tmp_path / "none", module="encodr"), max_steps=2).fit
    (wrong,) = heard(lambda: fit(Tagger(), pairs()))
    assert wrong.endswith(
        "HeadscopeError: no module 'encodr' in Tagger; nearest is 'encoder'; pass one of its names as module=, such as "
        "'encoder', 'head'"
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bit_for_bit_as_without(precision: Any, tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [HeadscopeCallback(tmp_path / "run", every=2)]):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        module = Classifier()
        training = trainer(tmp_path, *callbacks, precision=precision)
        training.fit(module, loader(Rows(), shuffle=True), loader(Rows(6, seed=1)))
        numpy: Any = np.random.get_state()
        rng = [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist()]
        found.append((module.state_dict(), training.optimizers[0].state_dict(), rng))
    alone, watched = found
    assert open_trial(tmp_path / "run").steps() == [0, 2, 4, 6]
    for step in (0, 2):
        dtype = open_trial(tmp_path / "run").layers(step)[0].dtype
        assert dtype == ("float32" if precision == "32-true" else "bfloat16")
    assert all(torch.equal(alone[0][name], watched[0][name]) for name in alone[0])
    assert len(alone[1]["state"]) > 10
    for number, state in alone[1]["state"].items():
        assert all(torch.equal(state[name], watched[1]["state"][number][name]) for name in state)
    assert alone[2] == watched[2]


@pytest.mark.parametrize(
    ("error", "raised", "state", "message"),
    [
        (ValueError("no such token\nat all"), ValueError, "failed", "ValueError at step 3: no such token"),
        (KeyboardInterrupt(), SystemExit, "stopped", "KeyboardInterrupt at step 3"),
    ],
)
def test_a_training_that_raises_is_told(
    error: BaseException, raised: type[BaseException], state: str, message: str, tmp_path: Path
) -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(raised):
            trainer(tmp_path, HeadscopeCallback(tmp_path / "run", every=2)).fit(Classifier(3, error), loader(Rows()))
    finally:
        signal.signal(signal.SIGINT, before)
    run = open_trial(tmp_path / "run")
    assert (run.state().state, run.state().message) == (state, message)
    assert run.steps() == [0, 2]


def test_errors_of_ours_end_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = Classifier()
    training = trainer(tmp_path, HeadscopeCallback(tmp_path / "file"), max_steps=2)
    (said,) = heard(lambda: training.fit(module, loader(Rows())))
    assert said.startswith(
        f"the watch of {tmp_path / 'file'} failed, and training goes on: StoreError: cannot write to"
    )
    assert training.global_step == 2
    with pytest.raises(HeadscopeError, match=re.escape("every must be a whole number of optimiser steps from 1 on")):
        HeadscopeCallback(tmp_path, every=0)


OTHER_NAME = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import pytorch_lightning
from headscope.integrations.lightning import HeadscopeCallback
assert issubclass(HeadscopeCallback, pytorch_lightning.Callback)
assert "lightning.pytorch" not in sys.modules
import torch, models
from pathlib import Path
class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = models.Plain()
    def training_step(self, batch, index):
        return self.model(batch[0]).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randint(5, 99, (8, 9))), batch_size=2)
pytorch_lightning.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=HeadscopeCallback({path!r})).fit(Module(), data)
"""


def test_the_package_by_its_other_name(tmp_path: Path) -> None:
    code = OTHER_NAME.format(tests=str(Path(__file__).parent), path=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert open_trial(tmp_path / "run").steps() == [0, 2]


def test_without_lightning_it_says_what_to_install() -> None:
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in ("lightning", "pytorch_lightning"):
            raise ModuleNotFoundError(f"No module named {root!r}", name=root)
sys.meta_path.insert(0, Blocker())
try:
    import headscope.integrations.lightning
except ImportError as problem:
    print(type(problem).__name__, problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == (
        "Missing headscope.integrations.lightning needs Lightning, which is not installed: pip install lightning\n"
    ), done.stderr
