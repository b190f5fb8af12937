"""A callback for transformers' Trainer and its subclasses.

A Trainer tells its callbacks neither of itself nor of a training that raises. So the callback looks for it among its
callers, and for as long as training lasts it stands in the way of an exception that leaves it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ..errors import Missing
from .watching import Watching

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as problem:
    if problem.name != "transformers":
        raise
    raise Missing(
        "headscope.HeadscopeCallback is for the Trainer of transformers, which is not installed: "
        "pip install 'transformers>=4.48' accelerate"
    ) from problem

# All that runs between the beginning and the end of training; the second line is that of transformers 4.
_STAGES = ("_evaluate", "_run_epoch", "_finalize_training")
_STAGES_4 = ("evaluate", "get_batch_samples", "training_step")


class HeadscopeCallback(Watching, TrainerCallback):
    """Watches what a `transformers.Trainer` trains, by one argument more: `callbacks=[HeadscopeCallback("runs/a")]`.

    Steps are the trainer's global steps, and go on with them when it resumes from a checkpoint. Its tokenizer names the
    tokens, and what it logs is on the time line. Each `train()` is an attempt of its own. In distributed training the
    first rank writes; a model that is sharded so that no rank can run it is not watched, and that is said. Nothing that
    goes wrong here ends training.

    Args:
        out: folder, or `s3://` or `gs://` address.
        probe: the examples, as for `headscope.watch`. Without them, the first 8 of the trainer's evaluation set, put
            together by its own data collator; of the training set, if there is none; or of the first training batch,
            if both are streamed.
        tokenizer: turns texts into ids and ids into token strings; the trainer's `processing_class`, if None.
        every: optimiser steps from one capture to the next.
        dtype: how a float32 model's q and k are kept, as for `headscope.watch`.
        budget: `layers`, `heads`, `examples`, `tokens`, `max_bytes`, `overhead`, as for `headscope.watch`.

    Raises:
        HeadscopeError: an argument is not usable.

    Source:
        `TrainerCallback` of transformers 5.23.
    """

    def __init__(
        self,
        out: str | Path,
        probe: Any = None,
        *,
        tokenizer: Any = None,
        every: int = 50,
        dtype: str | torch.dtype | None = None,
        **budget: Any,
    ) -> None:
        super().__init__(out, probe, tokenizer, {"every": every, "dtype": dtype, **budget})
        self._stages: list[tuple[Any, str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_stages": []}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any
    ) -> None:
        """Begins an attempt."""
        trainer = self._trainer()
        processing = found.get("processing_class", found.get("tokenizer"))
        if processing is None:
            processing = getattr(getattr(trainer, "data_collator", None), "tokenizer", None)
        # Processors of images and sound have the tokenizer inside.
        tokenizer = getattr(processing, "tokenizer", processing)
        self._begin(found["model"], state.global_step, tokenizer, lambda: _sources(trainer))
        for row in state.log_history:
            # The time line takes from an older attempt only what lies before this one's first step.
            if row.get("step") == state.global_step:
                self._log(row)
        if trainer is not None and self.watch is not None:
            with self._guarded("the end"):
                self._stand_by(trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        """Counts an optimiser step."""
        self._stepped(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **found: Any,
    ) -> None:
        """Puts the trainer's numbers on the time line."""
        if "train_runtime" in (logs or {}):
            # The summary comes last, but before the trainer puts back the best checkpoint's weights.
            self._end()
        self._log(logs or {})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        """Ends the attempt."""
        self._end()

    def _trainer(self) -> Any:
        """The trainer that is calling, or None."""
        frame = sys._getframe(1)
        while (back := frame.f_back) is not None:
            frame = back
            candidate = frame.f_locals.get("self")
            handler = getattr(candidate, "__dict__", {}).get("callback_handler")
            if any(callback is self for callback in getattr(handler, "callbacks", ())):
                return candidate
        return None

    def _stand_by(self, trainer: Any) -> None:
        """Until the attempt ends, lets every exception that leaves a stage of the training end it."""
        for name in _STAGES if hasattr(trainer, "_run_epoch") else _STAGES_4:
            if stage := getattr(trainer, name, None):
                self._stages.append((trainer, name, vars(trainer).get(name)))
                setattr(trainer, name, self._heard(stage))

    def _heard(self, stage: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stage)
        def heard(*args: Any, **named: Any) -> Any:
            try:
                return stage(*args, **named)
            except BaseException as error:
                self._end(error)
                raise

        return heard

    def _end(self, error: BaseException | None = None) -> None:
        while self._stages:
            trainer, name, before = self._stages.pop()
            vars(trainer).pop(name, None)
            if before is not None:
                setattr(trainer, name, before)
        super()._end(error)


def _sources(trainer: Any) -> Iterator[tuple[Any, Any]]:
    """The evaluation set and the training set, each with the collator that it goes through."""
    for name in ("eval_dataset", "train_dataset"):
        dataset, collate = getattr(trainer, name, None), trainer.data_collator
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()), None)
        if hasattr(dataset, "remove_columns"):
            dataset = trainer._remove_unused_columns(dataset)
        else:
            collate = trainer._get_collator_with_removed_columns(collate)
        yield dataset, collate
