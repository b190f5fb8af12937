"""Hearing every forward of a model, compiled or not, without a graph break or a recompilation.

A hook on a compiled module is not called, but traced: once, at compile time. So besides the module itself its compiled
door is listened to: the module that `torch.compile` gives back, or what `Module.compile` puts in. A door that is made
later is found when it is traced for the first time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod, ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Hook:
    """A hook that holds its method weakly, and stays behind when what it hangs on is copied or saved.

    Where it would be compiled, `traced` is called once instead, at compile time.
    """

    def __init__(self, method: Callable[..., None], traced: Callable[[], None] = lambda: None) -> None:
        self._method = WeakMethod(method)

        def note() -> bool:
            traced()
            return True

        # What torch.compiler.assume_constant_result sets, which imports the compiler: called at trace time, not traced.
        note._dynamo_marked_constant = True  # type: ignore[attr-defined]
        self._note = note

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            self._note()
            return
        method = self._method()
        if method is not None:
            method(*args)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _DEAF

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (_LOGGER, "debug")


# What a copied or saved model has in a hook's place: takes anything, does nothing, and needs no Headscope to be loaded.
_LOGGER = logging.getLogger("headscope")
_DEAF = _LOGGER.debug


class Forwards:
    """Calls `heard(args, kwargs)` before every forward of a model.

    Of a forward that is being compiled there are no values: `traced` is called then, and only if no door was found
    that would have told of it.

    Args:
        model: unwrapped.
        given: the same, as it was handed over: compiled, distributed, or not.
        heard: must not raise.
        traced: must not raise.

    Attributes:
        sealed: the model is part of a larger function that was compiled: only its compilations are heard.
    """

    def __init__(
        self,
        model: nn.Module,
        given: nn.Module,
        heard: Callable[[tuple[Any, ...], dict[str, Any]], None],
        traced: Callable[[], None],
    ) -> None:
        self._model = model
        self._heard = heard
        self._blind = traced
        self._within = False
        self.sealed = False
        self._doors: list[nn.Module] = []
        self._undo: list[Callable[[], None]] = []
        own = ref(self)

        def note() -> None:
            if (forwards := own()) is not None:
                forwards._traced()

        # Before other hooks: they may change the arguments, and will again when the probe runs.
        self._keep(model.register_forward_pre_hook(Hook(self._on_forward, note), with_kwargs=True, prepend=True))
        while given is not model:
            if "_orig_mod" in given._modules or isinstance(given, nn.DataParallel):
                self._listen_at(given)
            given = next(given.children())
        self._listen_inside()

    def close(self) -> None:
        """Takes every hook away."""
        while self._undo:
            self._undo.pop()()

    def _keep(self, handle: RemovableHandle) -> None:
        self._undo.append(handle.remove)

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # DataParallel runs copies of the module, hooks included, each in a thread.
        if not self._within and module is self._model:
            self._tell(args, kwargs)

    def _tell(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Within backward, a forward is a recomputation for gradient checkpointing.
        if torch._C._current_graph_task_id() == -1:
            self._heard(args, kwargs)

    def _traced(self) -> None:
        if self._within:
            return
        self._blind()
        self._listen_inside()
        frame = sys._getframe()
        while (back := frame.f_back) is not None:
            frame = back
            door = frame.f_locals.get("self")
            if isinstance(door, nn.Module) and door._modules.get("_orig_mod") is self._model:
                self._listen_at(door)
                return
        self.sealed = not self._doors and not hasattr(getattr(self._model, "_compiled_call_impl", None), "_headscope")

    def _listen_at(self, door: nn.Module) -> None:
        """Listens at a module that torch.compile or DataParallel made."""
        if any(door is known for known in self._doors):
            return

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling():
                self._tell(args, kwargs)
                self._within = True

        def leave(*_: Any) -> None:
            if not torch.compiler.is_compiling():
                self._within = False

        self._doors.append(door)
        self._keep(door.register_forward_pre_hook(enter, with_kwargs=True))
        self._keep(door.register_forward_hook(leave, always_call=True))

    def _listen_inside(self) -> None:
        """Listens at what Module.compile put into the model, if it has."""
        compiled = getattr(self._model, "_compiled_call_impl", None)
        if compiled is None or getattr(compiled, "_headscope", None) is self:
            return

        def heard(*args: Any, **kwargs: Any) -> Any:
            self._tell(args, kwargs)
            self._within = True
            try:
                return compiled(*args, **kwargs)
            finally:
                self._within = False

        def undo() -> None:
            if self._model._compiled_call_impl is heard:
                self._model._compiled_call_impl = compiled

        heard._headscope = self  # type: ignore[attr-defined]
        self._model._compiled_call_impl = heard
        self._undo.append(undo)
