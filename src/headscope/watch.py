"""Watching a model while it trains: when to capture, and what becomes of it."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .blob import Json
from .boundary import Call
from .capture import Batch, Pass, Probe, device_of, run, unwrap
from .errors import HeadscopeError, HeadscopeWarning, NotSupported, StoreError, shorten
from .forwards import Forwards, Hook
from .pace import Pace
from .ranks import Council, alone, gathered, here, sharded
from .record import Keeping, Record
from .writer import Writer

_KEPT = {"float16": torch.float16, "float32": torch.float32}
_SCALAR = re.compile(r"[A-Za-z][\w./ -]*")
_RESERVED = {"step", "time"}


class Watch:
    """Watches a model's attention while it trains; use it in a `with` around any PyTorch loop.

    A fixed set of examples is run through the model before training, every so many optimiser steps, and at the end,
    in eval mode and without leaving a trace in the training. What is caught goes to `out`, from where
    `headscope serve` and `headscope.open_trial` read it while training goes on.

    Args:
        model: trained in this process; wrapped (compiled, DDP) or not. In distributed training, use it alike in every
            rank: the first one writes.
        out: folder, or `s3://` or `gs://` address; training again into it starts a new attempt, nothing is overwritten.
        probe: the examples: texts or (text, label) pairs with a tokenizer, a batch as the model takes it, or a list of
            batches. Without one, the first 8 examples of the first training batch.
        tokenizer: turns texts into ids and ids into token strings.
        every: optimiser steps from one capture to the next.
        dtype: how a float32 model's q and k are kept: "float16" (the default; weights off by 1e-3 or so) or "float32"
            (exactly). A 16-bit model's are kept as they are.
        optimizer: whose steps count; without it, the first that steps parameters of the model. A step that a GradScaler
            skips is none.
        start_step: the optimiser step at which training begins, when it goes on from a checkpoint.
        layers: which attention is kept: a regular expression to be found in its module path, or a list of paths.
        heads: which heads of each layer are kept, by their numbers.
        examples: how many examples of the probe are used at most.
        tokens: to how many tokens each of them is cut at most.
        max_bytes: of all captures together; above it, captures are deleted so that the older they are, the wider they
            lie apart. The first and the newest stay.
        overhead: the part of the training time, such as 0.02, that captures may take; where they take more, they are
            made at fewer steps.

    Raises:
        HeadscopeError: an argument is not usable; said before training begins.
        NotSupported: the model is sharded over ranks in a way that no rank can run it alone.
        StoreError: `out` cannot be written.

    Example:
        with headscope.watch(model, "runs/a", probe=texts, tokenizer=tokenizer) as watch:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                watch.log(loss=loss)
    """

    def __init__(
        self,
        model: nn.Module,
        out: str | Path,
        *,
        probe: Any = None,
        tokenizer: Any = None,
        every: int = 50,
        dtype: str | torch.dtype | None = None,
        optimizer: Optimizer | None = None,
        start_step: int = 0,
        layers: str | Collection[str] | None = None,
        heads: Sequence[int] | None = None,
        examples: int | None = None,
        tokens: int | None = None,
        max_bytes: int | None = None,
        overhead: float | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise HeadscopeError(f"cannot watch a {type(model).__name__}; pass the torch.nn.Module that is trained")
        if type(every) is not int or every < 1:
            raise HeadscopeError(f"every must be a whole number of optimiser steps from 1 on, not {every!r}")
        for said, number, least in (
            ("start_step", start_step, 0),
            ("examples", examples, 1),
            ("tokens", tokens, 1),
            ("max_bytes", max_bytes, 1),
        ):
            if number is not None and (type(number) is not int or number < least):
                raise HeadscopeError(f"{said} must be a whole number from {least} on, not {number!r}")
        if overhead is not None and not 0 < overhead < 1:
            raise HeadscopeError(f"overhead must be a part of the training time, between 0 and 1, not {overhead!r}")
        self._keeping = Keeping.of(layers, heads)
        self._examples, self._tokens = examples, tokens
        self._max_bytes = max_bytes
        self._pace = Pace(overhead)
        name = str(dtype or "float16").removeprefix("torch.")
        if name not in _KEPT:
            raise HeadscopeError(
                f"dtype must be {' or '.join(map(repr, _KEPT))}, not {dtype!r}; a 16-bit model keeps its own"
            )
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise HeadscopeError(
                f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer; leave it out and call "
                f"watch.step() after each of its steps"
            )
        self.out = str(out)
        self.every = every
        self._given, self._model = model, unwrap(model)
        self._kept = _KEPT[name]
        self._tokenizer = tokenizer
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner  # Accelerate's wrapper is an Optimizer without its hooks.
        self._optimizer = optimizer
        # The one that was found; another takes its place when it is gone.
        self._first: ref[Optimizer] | None = None
        self._probe = None if probe is None else Probe.of(probe, tokenizer, self._model, examples, tokens)
        self._exact: set[str] = set()
        self._forwards = {"train": 0, "eval": 0}
        self._step = self._start = start_step
        self._captured = -1
        self._captures = 0
        self._autocast: tuple[str, torch.dtype] | None = None
        self._busy = self._begun = self._entered = self._closed = False
        self._asked = -1
        self._pid = os.getpid()
        self._foreign: WeakSet[Optimizer] = WeakSet()
        self._others: WeakSet[Optimizer] = WeakSet()
        self._postponed = False
        self._off = self._nothing = ""
        self._told: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._forwards_heard: Forwards | None = None
        self._writer: Writer | None = None
        self._council: Council | None = None

    @property
    def attempt(self) -> int:
        """The number of this (re)start of training in the run; -1 in a rank that does not write."""
        self._active()
        return -1 if self._writer is None else self._writer.attempt

    def _running(self) -> Writer:
        if self._writer is None:
            raise HeadscopeError("the watch has not begun; use `with headscope.watch(...) as watch:`")
        return self._writer

    def _active(self) -> bool:
        """Whether there is something to do here: not in a rank that only trains, and not in a forked process."""
        if not self._entered:
            raise HeadscopeError("the watch has not begun; use `with headscope.watch(...) as watch:`")
        return bool(self._handles) and os.getpid() == self._pid

    def __enter__(self) -> Watch:
        if self._entered:
            raise HeadscopeError(f"this watch of {self.out} has been used; make a new one with headscope.watch(...)")
        if isinstance(self._model, torch.jit.ScriptModule):
            raise NotSupported(
                f"cannot watch {type(self._model).__name__}: a scripted model runs no Python; "
                f"watch the module that it was made of"
            )
        self._pid = os.getpid()
        self._council = Council() if sharded(self._model) else None
        writes = here()[0] == 0
        if writes:
            try:
                self._open()
            except StoreError as problem:
                if self._council is not None or here()[1] == 1:
                    raise
                # Raised in this rank alone, it would leave the others waiting for it in their first all-reduce.
                self._say(f"{problem}; training goes on, unwatched")
                writes = False
        if self._council is not None and not writes and (reason := self._council.agree()):
            raise HeadscopeError(f"rank 0 cannot begin: {reason}")
        self._entered = True
        if writes or self._council is not None:
            atexit.register(self._at_exit)
            try:
                self._hook()
                if self._probe is not None:
                    with self._guarded("the probe"):
                        self._note_autocast()
                    self._begin(lambda: None)
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
        return self

    def _open(self) -> None:
        reason = "it could not open the run"
        try:
            self._writer = Writer(self.out, self._facts(), self._say, max_bytes=self._max_bytes)
            reason = ""
        except HeadscopeError as problem:
            reason = str(problem)
            raise
        finally:
            if self._council is not None:
                self._council.agree(reason)

    def _hook(self) -> None:
        self._forwards_heard = Forwards(self._model, self._given, self._on_forward, self._on_trace)
        if self._optimizer is not None:
            self._handles.append(self._optimizer.register_step_post_hook(Hook(self._on_step)))
        else:
            self._handles.append(register_optimizer_step_post_hook(Hook(self._on_step)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close()
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            self.close("stopped", f"{type(error).__name__} at step {self._step}")
        else:
            first = str(error).strip().split("\n", 1)[0]
            self.close("failed", f"{type(error).__name__} at step {self._step}: {first}")

    def close(self, state: str = "ended", message: str = "") -> None:
        """Captures the last step, writes what is waiting, and takes every hook away; called by `with`."""
        if not self._entered or self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._unhook()
        try:
            if self._council is not None and state != "ended":
                with suppress(Exception):
                    self._council.leave(message)
            elif state == "ended" and self._step > (self._captured if self._council is None else self._asked):
                self._capture()
            self._name_silence()
        except BaseException as error:
            state, message = "stopped", f"{type(error).__name__} at step {self._step}"
            raise
        finally:
            if self._writer is not None:
                with self._guarded("the end", turn_off=False):
                    said = (message or self._off, self._nothing)
                    self._writer.close(state, "; ".join(part for part in said if part))

    def _name_silence(self) -> None:
        """Says so if there was no training to watch."""
        if self._writer is None:
            return
        if not self._forwards["train"] + self._forwards["eval"]:
            self._say(
                f"nothing was watched: the forward of {type(self._model).__name__} was never called within the watch"
            )
        elif self._step == self._start:
            self._say(
                "no optimiser step was seen: pass optimizer= if it does not train this model's own parameters, or call "
                "watch.step() after each step"
            )

    def _at_exit(self) -> None:
        self.close("stopped", f"the process ended at step {self._step} without leaving the watch")

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._forwards_heard is not None:
            self._forwards_heard.close()

    def step(self, step: int | None = None) -> None:
        """Says that an optimiser step was made; from then on optimisers are not listened to.

        For loops whose optimiser is not a `torch.optim.Optimizer`, or which count their steps themselves.

        Args:
            step: its number; one more than the last, if None.
        """
        if not self._active():
            return
        with self._guarded("step", turn_off=False):
            for handle in self._handles:
                handle.remove()
            number = self._step + 1 if step is None else int(step)
            if number > self._step:
                self._advance(number)

    def log(self, **values: float | torch.Tensor) -> None:
        """Puts numbers on the time line, at the present step.

        Args:
            values: by name; numbers or tensors of one element.
        """
        if not self._active() or self._writer is None:
            return
        numbers = {}
        for name, value in values.items():
            with self._guarded(f"log of {name!r}", turn_off=False):
                if name in _RESERVED or not _SCALAR.fullmatch(name):
                    raise HeadscopeError("a name is letters, digits, and _./ -, and neither step nor time")
                numbers[name] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        with self._guarded("the time line", turn_off=False):
            self._writer.log(self._step, numbers)

    def _facts(self) -> Json:
        config = getattr(self._model, "config", None)
        labels = getattr(config, "id2label", None)
        transformers = sys.modules.get("transformers")
        return {
            "model": type(self._model).__name__,
            "torch": torch.__version__,
            "transformers": getattr(transformers, "__version__", None),
            "every": self.every,
            "world": 1,
            "started": time.time(),
            "labels": [str(labels[i]) for i in sorted(labels)] if isinstance(labels, dict) else None,
        }

    # Hooks. Nothing of ours may reach the training: each is guarded.

    def _on_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._postponed and not self._busy and os.getpid() == self._pid:
            self._due()
        with self._guarded("the probe"):
            if self._note_forward() and not self._begun and not self._off:
                most, tokens = self._examples or 8, self._tokens
                self._begin(lambda: Probe.first(args, kwargs, self._tokenizer, most, tokens))

    def _on_trace(self) -> None:
        with self._guarded("the probe"):
            self._note_forward()

    def _note_forward(self) -> bool:
        """Counts a forward of the user's; whether it is one that trains."""
        if self._busy or os.getpid() != self._pid:
            return False
        self._forwards["train" if self._model.training else "eval"] += 1
        if not torch.is_grad_enabled():
            return False
        self._note_autocast()
        return True

    def _note_autocast(self) -> None:
        kind = device_of(self._model).type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self._autocast = (kind, torch.get_autocast_dtype(kind)) if on else None

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or os.getpid() != self._pid:
            return
        with self._guarded("the optimiser"):
            first = self._optimizer or (self._first and self._first())
            if optimizer is not first and optimizer not in self._foreign and optimizer not in self._others:
                ours = {id(parameter) for parameter in self._model.parameters()}
                if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
                    self._foreign.add(optimizer)
                elif first is None:
                    first, self._first = optimizer, ref(optimizer)
                else:
                    self._others.add(optimizer)
            if optimizer is first and not _skipped(optimizer):
                self._advance(self._step + 1)

    def _advance(self, step: int) -> None:
        self._step = step
        if not self._begun and self._forwards_heard is not None and self._forwards_heard.sealed:
            self._say(
                f"NO ATTENTION WAS CAUGHT in {type(self._model).__name__}: no probe was given, and its forward is "
                f"part of a larger function that is compiled, so that its inputs are not seen; pass probe= to "
                f"headscope.watch",
                kind="nothing",
            )
        # Of several optimisers the others have yet to step: the model is whole again at its next forward.
        self._postponed = self._step % self.every == 0 and len(self._others) > 0
        if self._step % self.every == 0 and not self._postponed:
            self._due()

    def _due(self) -> None:
        self._postponed = False
        self._capture(paced=True)
        if self._pace.stretched:
            self._say(
                f"captures take more than {self._pace.overhead:g} of the training time every {self.every} steps; "
                f"they are made at fewer, as time allows",
                kind="pace",
            )

    def _begin(self, first: Callable[[], Probe | None]) -> None:
        """Writes the examples, and captures them before the first optimiser step."""
        self._begun = True
        if self._writer is not None:
            with self._guarded("the probe"):
                self._probe = self._probe or first()
                assert self._probe is not None
                self._writer.put_probe(self._probe.blob())
                for trouble in {batch.trouble for batch in self._probe.batches} - {""}:
                    self._say(trouble)
        self._capture()

    def _capture(self, *, paced: bool = False) -> None:
        """Runs the probe, if nothing speaks against it; where the model is sharded, in all ranks or in none."""
        if self._busy:
            return
        self._asked = self._step
        if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in self._model.parameters()):
            self._say(f"step {self._step} is not captured: the model has parameters that its first forward will make")
            return
        reason = own = "it is not known whether it can be made"
        with self._guarded("the capture"):
            reason = own = self._against(paced)
        with self._guarded("the capture"):
            if self._council is not None:
                reason = self._council.agree(own)
                if reason and not own and self._writer is not None:
                    self._say(f"captures are not made from step {self._step} on: {reason}", kind="council")
            if not reason:
                spread = (
                    nullcontext() if self._council is None else gathered(self._model, keep=self._writer is not None)
                )
                with _uninterrupted(), self._pace.timed(), self._busily(), spread:
                    self._run()

    def _against(self, paced: bool) -> str:
        """What speaks against a capture now, or nothing."""
        if self._off or self._writer is None:
            return self._off
        if self._probe is None:
            return "there is no probe yet"
        if here()[1] > 1 and sharded(self._model) != (self._council is not None):
            raise NotSupported(
                f"{type(self._model).__name__} was sharded after the watch began; shard it first, then watch it"
            )
        if paced and not self._pace.due():
            return "captures take too much time"
        return "" if self._writer.ready() else "writing is behind"

    def _run(self) -> None:
        """Runs the probe and hands what it gave to the writer."""
        writer, probe = self._writer, self._probe
        if writer is None or probe is None:
            return
        record = Record(writer.image(), kept=self._kept, exact=self._exact, turn=self._captures, keeping=self._keeping)

        def on_call(batch: int, call: Call) -> None:
            examples = probe.batches[batch].examples
            if call.q.shape[0] != examples:
                raise NotSupported(
                    f"its batch is {call.q.shape[0]}, the probe's {examples}; heads, windows or beams that are folded "
                    f"into the batch are not captured"
                )
            record.add(call, mode="probe", batch=batch, named=self._named(call, probe.batches[batch]))

        with alone() if here()[1] > 1 else nullcontext():  # type: ignore[no-untyped-call]
            passes = run(self._model, probe, autocast=self._autocast, on_call=on_call)
        for done in passes:
            record.add_output(
                mode="probe", batch=done.batch, logits=done.logits, predictions=done.predictions, loss=done.loss
            )
        self._name_refused(record, passes)
        forwards = dict(self._forwards)
        writer.submit(self._step, record.image, lambda metadata: self._finish(record, metadata, forwards))
        self._captured = self._step
        self._captures += 1

    @contextmanager
    def _busily(self) -> Iterator[None]:
        """Within it, forward passes are ours and are not counted."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _finish(self, record: Record, metadata: Json, forwards: dict[str, int]) -> tuple[Json, object]:
        """On the writer's thread: the self-check, and what is said when it fails."""
        whole, facts = record.finish({**metadata, "forwards": forwards})
        failed = record.failed()
        if failed:
            worst = max(failed, key=lambda call: call["check"]["error"])
            self._say(
                f"self-check failed at step {metadata['step']} in {shorten(call['path'] for call in failed)}: rebuilt "
                f"weights differ from the kernel's output by {worst['check']['error']:.1e} "
                f"(limit {worst['check']['limit']:g}), so they are marked and not drawn",
                kind=f"self-check {sorted(call['path'] for call in failed)}",
            )
        return whole, facts

    def _named(self, call: Call, batch: Batch) -> bool:
        """Whether queries and keys of a call are the tokens that the batch names, as far as can be known."""
        tokens = None if batch.mask is None else batch.mask.shape[1]
        # A decoder beside an encoder reads tokens of its own, of which the batch may name none.
        other = getattr(getattr(self._model, "config", None), "is_encoder_decoder", False) and "decoder" in call.path
        return not other and call.q.shape[2] == call.k.shape[2] == tokens

    def _name_refused(self, record: Record, passes: list[Pass]) -> None:
        """Says which attention was not caught; and loudly if none was."""
        refused = {path: reason for done in passes for path, reason in done.refused.items()}
        if record.calls or record.left_out:
            if not record.calls:
                self._say(
                    f"none of {record.left_out} attention calls is kept: layers or heads name none of them", kind="none"
                )
            for path, reason in list(refused.items())[:3]:
                self._say(f"attention in {path or 'the model'} is not captured: {reason}")
            return
        if refused:
            path, reason = next(iter(refused.items()))
            why = f"in {path or 'the model'}, {reason}"
        else:
            why = (
                f"{type(self._model).__name__} called neither an attention function of transformers nor "
                f"torch.nn.functional.scaled_dot_product_attention; attention written out by hand and "
                f"nn.MultiheadAttention are not captured yet, nor is what runs no Python (TorchScript, exported and "
                f"CUDA graphs: watch the module that they were made of)"
            )
        self._say(f"NO ATTENTION WAS CAUGHT in {type(self._model).__name__}: {why}", kind="nothing")

    def _say(self, message: str, kind: str | None = None) -> None:
        """One warning of each kind; it never raises, and shows in the viewer too."""
        if (kind or message) in self._told:
            return
        self._told.add(kind or message)
        if kind == "nothing":
            self._nothing = message
        if self._writer is not None:
            self._writer.note(self._nothing or message)
        try:
            warnings.warn(message, HeadscopeWarning, stacklevel=2)
        except Exception:
            with suppress(Exception):
                print(f"HeadscopeWarning: {message}", file=sys.stderr)

    @contextmanager
    def _guarded(self, what: str, *, turn_off: bool = True) -> Iterator[None]:
        """Keeps our errors from the training: said once, and the capture is off from then on."""
        try:
            yield
        except Exception as problem:
            first = str(problem).strip().split("\n", 1)[0]
            message = f"{what} failed at step {self._step}: {type(problem).__name__}: {first}"
            if turn_off:
                self._off = message
                message += "; training goes on, captures are off"
                memory = isinstance(problem, (MemoryError, torch.cuda.OutOfMemoryError))
                if memory or "allocate memory" in first:
                    message += " (examples= and tokens= of headscope.watch make them smaller)"
            self._say(message, kind=f"{what} {type(problem).__name__}")


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimiser has left its step out: a GradScaler tells it of gradients that are not finite."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.item())


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within it, Ctrl-C waits until the model is as it was; a second one does not."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        if asked:
            signal.default_int_handler(number, frame)
        asked.append(number)

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if asked:
            raise KeyboardInterrupt


# The name that users type: `with headscope.watch(...)`.
watch = Watch
