"""What the callbacks have in common: a watch per training, and nothing of ours that could end one."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..capture import Probe, quiet
from ..errors import HeadscopeWarning
from ..watch import Watch

EXAMPLES = 8
_OF_THE_CLOCK = ("_runtime", "_per_second")
_OF_THE_TRAINER = {"epoch", "step", "total_flos", "num_input_tokens_seen"}


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """What of a trainer's logs belongs on the time line: numbers, without those of its clock."""
    found = {name: _number(value) for name, value in logs.items() if name not in _OF_THE_TRAINER}
    return {name: value for name, value in found.items() if value is not None and not name.endswith(_OF_THE_CLOCK)}


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    with suppress(TypeError, ValueError):
        return None if isinstance(value, (str, bytes)) else float(value)
    return None


class Watching:
    """A watch for each training that a trainer begins."""

    watch: Watch | None = None

    def __init__(self, out: str | Path, probe: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        # What is not usable is to be said now, and not when training begins.
        Watch(nn.Module(), out, **settings)
        self.out = str(out)
        self._probe = probe
        self._tokenizer = tokenizer
        self._settings = settings
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Trainers are copied and pickled, for a search over hyperparameters say; what runs stays with its own.
        return {**vars(self), "watch": None}

    def _begin(
        self, model: nn.Module, step: int, tokenizer: Any, sources: Callable[[], Iterator[tuple[Any, Any]]]
    ) -> None:
        """Begins an attempt at `step`; `sources` yields (dataset, collator) that a probe may come from."""
        if self.watch is not None:
            watch, self.watch = self.watch, None
            with self._guarded("the end"):
                watch.close("stopped", "training began anew")
        with self._guarded("the watch"):
            tokenizer = self._tokenizer if self._tokenizer is not None else tokenizer
            probe = self._probe
            if probe is None:
                probe = self._first_examples(model, tokenizer, sources)
            watch = Watch(model, self.out, probe=probe, tokenizer=tokenizer, start_step=step, **self._settings)
            self.watch = watch.__enter__()
            watch.step(step)

    def _first_examples(
        self, model: nn.Module, tokenizer: Any, sources: Callable[[], Iterator[tuple[Any, Any]]]
    ) -> Mapping[str, Any] | Tensor | None:
        """A batch of the first source that can be read without taking from it; None, if there is none."""
        count = self._settings.get("examples") or EXAMPLES
        with suppress(Exception), quiet(model):
            for dataset, collate in sources():
                if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
                    continue
                with suppress(Exception):
                    rows = [dataset[i] for i in range(min(count, len(dataset)))]
                    # A copy: a collator may have a random generator of its own.
                    batch: Any = copy.deepcopy(collate)(rows)
                    # What is in a tuple is for the training step to say.
                    if isinstance(batch, (Mapping, Tensor)):
                        Probe.of(batch, tokenizer, model)
                        return batch
        return None

    def _stepped(self, step: int) -> None:
        if self.watch is not None:
            with self._guarded("the step"):
                self.watch.step(step)

    def _log(self, logs: Mapping[str, Any]) -> None:
        if self.watch is not None:
            with self._guarded("the time line"):
                self.watch.log(**numbers(logs))

    def _end(self, error: BaseException | None = None) -> None:
        """Ends the attempt, if one runs; by `error`, if there is one."""
        watch, self.watch = self.watch, None
        if watch is not None:
            with self._guarded("the end"):
                watch.__exit__(None if error is None else type(error), error, None)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as problem:
            first = str(problem).strip().split("\n", 1)[0]
            self._say(f"{what} of {self.out} failed, and training goes on: {type(problem).__name__}: {first}")

    def _say(self, message: str) -> None:
        if message in self._told:
            return
        self._told.add(message)
        try:
            warnings.warn(message, HeadscopeWarning, stacklevel=2)
        except HeadscopeWarning:
            print(f"HeadscopeWarning: {message}", file=sys.stderr)
