"""A callback for Lightning's Trainer, under both names of the package: lightning and pytorch_lightning."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from ..errors import HeadscopeError, Missing, nearest
from .watching import Watching, numbers

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """The `Callback` of the package in use; of both, if both are; of the one that is installed, if none is yet."""
    loaded = [name for name in _PACKAGES if name in sys.modules]
    for name in loaded or _PACKAGES:
        try:
            module = import_module(name)
        except ModuleNotFoundError as problem:
            if problem.name not in ("lightning", *_PACKAGES):
                raise
            continue
        return tuple(sys.modules[package].Callback for package in loaded) or (module.Callback,)
    raise Missing("headscope.integrations.lightning needs Lightning, which is not installed: pip install lightning")


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = type("Callback", _bases(), {})


class HeadscopeCallback(Watching, Callback):
    """Watches what a Lightning `Trainer` trains, by one argument more: `callbacks=[HeadscopeCallback("runs/a")]`.

    Steps are the trainer's global steps, and go on with them when it resumes from a checkpoint. What is logged is on
    the time line every `log_every_n_steps`, and what validation logs after it. Each `fit()` is an attempt of its own.
    In distributed training the first rank writes; a model that is sharded so that no rank can run it is not watched,
    and that is said. Nothing that goes wrong here ends training.

    Args:
        out: folder, or `s3://` or `gs://` address.
        probe: the examples, as for `headscope.watch`. Without them, the first 8 of the validation set if its batches
            are what the watched module takes, or of the training set; else of the first training batch.
        tokenizer: turns texts into ids and ids into token strings; the LightningModule's `tokenizer`, if it has one.
        every: optimiser steps from one capture to the next.
        dtype: how a float32 model's q and k are kept, as for `headscope.watch`.
        module: which module of the LightningModule is watched, by its name. Without it, the only one with parameters;
            of several, the LightningModule itself if it has a `forward`, or else the largest.
        budget: `layers`, `heads`, `examples`, `tokens`, `max_bytes`, `overhead`, as for `headscope.watch`.

    Raises:
        HeadscopeError: an argument is not usable.

    Source:
        `Callback` of lightning 2.6.
    """

    def __init__(
        self,
        out: str | Path,
        probe: Any = None,
        *,
        tokenizer: Any = None,
        every: int = 50,
        dtype: str | torch.dtype | None = None,
        module: str | None = None,
        **budget: Any,
    ) -> None:
        super().__init__(out, probe, tokenizer, {"every": every, "dtype": dtype, **budget})
        self._module = module
        self._logged: dict[str, Any] = {}
        self._unused = ""
        self._step: int | None = None
        self._handle: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_handle": None}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins an attempt."""
        # The context is that of a training step: the examples are captured in its precision from the beginning.
        with self._guarded("the watch"), trainer.precision_plugin.forward_context():
            model = self._watched(pl_module)
            self._begin(model, trainer.global_step, getattr(pl_module, "tokenizer", None), lambda: _sources(trainer))
            self._logged, self._step = {}, trainer.global_step
            self._note_use(model, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the optimiser steps of a batch."""
        if self._unused:
            self._say(self._unused)
            self._unused = ""
        if self.watch is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._stepped(trainer.global_step)
        if trainer.global_step % max(1, getattr(trainer, "log_every_n_steps", 50)) == 0:
            self._log_new(trainer)
            if trainer.optimizers:
                self._log({"learning_rate": trainer.optimizers[0].param_groups[0]["lr"]})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts what validation logged on the time line."""
        if not trainer.sanity_checking:
            self._log_new(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the attempt."""
        self._log_new(trainer)
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the attempt, and says by what."""
        self._end(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends an attempt that nothing else has ended."""
        self._end()

    def _watched(self, pl_module: LightningModule) -> nn.Module:
        children = {name: sum(p.numel() for p in child.parameters()) for name, child in pl_module.named_children()}
        children = {name: size for name, size in children.items() if size}
        if self._module is not None:
            try:
                return pl_module.get_submodule(self._module)
            except AttributeError:
                names = [name for name, _ in pl_module.named_modules() if name]
                raise HeadscopeError(
                    f"no module {self._module!r} in {type(pl_module).__name__}{nearest(self._module, names)}; "
                    f"pass one of its names as module=, such as {', '.join(map(repr, children)) or 'none'}"
                ) from None
        home = type(pl_module).forward.__module__.partition(".")[0]
        if not children or (home not in ("lightning", "pytorch_lightning") and len(children) > 1):
            return pl_module
        return pl_module.get_submodule(max(children, key=children.__getitem__))

    def _note_use(self, model: nn.Module, pl_module: LightningModule) -> None:
        """Notes whether the first batch calls the watched module at all."""
        if self.watch is None:
            return
        self._unused = (
            f"the training_step of {type(pl_module).__name__} did not call the {type(model).__name__} that is watched; "
            f"name the module that it calls: HeadscopeCallback(..., module=...)"
        )

        def used(module: nn.Module, args: Any) -> None:
            self._unused = ""
            self._release()

        self._handle = model.register_forward_pre_hook(used)

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _log_new(self, trainer: Trainer) -> None:
        """Puts on the time line what the trainer's metrics say differently from before."""
        if self.watch is None:
            return
        with self._guarded("the time line"):
            found = numbers(trainer.callback_metrics)
            self._log({name: value for name, value in found.items() if self._logged.get(name) != value})
            self._logged |= found

    def _end(self, error: BaseException | None = None) -> None:
        self._release()
        super()._end(error)


def _sources(trainer: Trainer) -> Iterator[tuple[Any, Any]]:
    """The validation set and the training set, each with the collator that it goes through."""
    for loader in (trainer.val_dataloaders, trainer.train_dataloader):
        while isinstance(loader, (Mapping, list, tuple)) and loader:
            loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader))
        if isinstance(loader, DataLoader):
            yield loader.dataset, loader.collate_fn
