"""Which rank of a distributed training does what, and how ranks agree before they act.

Where every rank has the whole model, the first one looks at it alone. Where fully_shard has spread it, every rank takes
part in gathering it, and then the first one runs it alone. So what goes wrong while it runs leaves no rank waiting for
another: within `alone`, a model that would talk to other ranks is stopped before it does.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import NotSupported

PATIENCE_S = 60.0
_DECIDED = 1_000_000
_REPLAY = "look at its checkpoints with headscope.replay"
_watches = itertools.count()


def here() -> tuple[int, int]:
    """(rank, world) of this process; of what torchrun says, before torch.distributed has begun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(rank), int(world)) if rank.isdecimal() and world.isdecimal() else (0, 1)


def sharded(model: nn.Module) -> bool:
    """Whether the model is spread over ranks by fully_shard, so that every rank has to take part.

    Raises:
        NotSupported: it is spread in another way.
    """
    name, kinds = type(model).__name__, {type(module).__name__ for module in model.modules()}
    if any("DeepSpeedEngine" in kind.__name__ for kind in type(model).__mro__):
        raise NotSupported(
            f"{name} is an engine of DeepSpeed; pass its module: headscope.watch(engine.module, ...), and call "
            f"watch.step() after each engine.step(); with ZeRO stage 3 {_REPLAY}"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotSupported(f"the parameters of {name} are sharded by DeepSpeed ZeRO stage 3; {_REPLAY}")
    if "FullyShardedDataParallel" in kinds:
        raise NotSupported(
            f"{name} is sharded by FullyShardedDataParallel (FSDP1), and no rank can run it alone; shard it by "
            f"torch.distributed.fsdp.fully_shard instead, or {_REPLAY}"
        )
    units = _units(model)
    managed = {id(p) for unit in units for p in unit.parameters()}
    for path, parameter in model.named_parameters():
        placements = getattr(parameter, "placements", ())
        if sum(placement.is_shard() for placement in placements) > 1 or (placements and id(parameter) not in managed):
            raise NotSupported(
                f"parameter {path!r} of {name} is split by tensor parallelism, so that no rank has all heads; {_REPLAY}"
            )
    for unit in units:
        if not any(_state_of(hook) is not None for hook in unit._forward_pre_hooks.values()):
            raise NotSupported(
                f"{type(unit).__name__} in {name} was sharded together with other modules by fully_shard([...]); shard "
                f"each of them by a call of its own, or {_REPLAY}"
            )
    return bool(units)


def _units(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was called on, in an order that is the same on every rank."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def _state_of(hook: Any) -> Any:
    """What fully_shard keeps of a module, if this is its hook."""
    owner = getattr(hook, "__self__", None)
    return owner if type(owner).__name__ == "FSDPState" else None


@contextmanager
def gathered(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """Within it, the whole model is on this rank if `keep`; to be entered on every rank, at the same time.

    A rank for which the model is too large goes on taking part, so that the others do not wait, and raises then.
    """
    units = _units(model)
    failure: Exception | None = None
    try:
        for unit in units:
            try:
                unit.unshard()
            except Exception as problem:
                failure = failure or problem.with_traceback(None)
                for other in units:
                    other.reshard()
                unit.unshard()
            if not keep or failure is not None:
                unit.reshard()
        if failure is not None:
            raise failure
        with _without_hooks(units):
            yield
    finally:
        for unit in units:
            unit.reshard()


@contextmanager
def _without_hooks(units: list[Any]) -> Iterator[None]:
    """Leaves of fully_shard's hooks only their casts: what they note of a forward is for the backward that follows."""
    with ExitStack() as undo:
        for unit in units:
            for hooks, light in ((unit._forward_pre_hooks, _cast_inputs), (unit._forward_hooks, _cast_output)):
                for number, hook in hooks.items():
                    if (state := _state_of(hook)) is not None:
                        undo.callback(hooks.__setitem__, number, hook)
                        hooks[number] = light(state)
        yield


def _cast_inputs(state: Any) -> Any:
    return lambda module, args, kwargs: state._cast_forward_inputs(args, kwargs)


def _cast_output(state: Any) -> Any:
    return lambda module, args, output: state._cast_output_dtype(output)


class alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, nothing can talk to other ranks: they would not answer."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            raise NotSupported(
                f"the model talks to other ranks in its forward ({func}), and rank 0 runs the probe alone; {_REPLAY}"
            )
        return func(*args, **(kwargs or {}))


class Council:
    """How the ranks of a sharded training agree: over their store, without a collective that could hang.

    Raises:
        NotSupported: not every rank came within `PATIENCE_S`.
    """

    def __init__(self) -> None:
        self.rank, self.world = here()
        self._store = distributed.distributed_c10d._get_default_store()
        self._name = f"headscope/{next(_watches)}"
        self._round = 0
        self._broken = self._last = ""
        if reason := self.agree():
            raise NotSupported(
                f"the model is sharded, so the watch is to be entered in every rank, and {reason}: use "
                f"headscope.watch alike in all {self.world} ranks"
            )

    def agree(self, reason: str = "") -> str:
        """A reason not to act that some rank has, or nothing; the same on every rank, whatever happens.

        To be called by every rank at the same point of its training.
        """
        if self._broken:
            return self._broken
        key = f"{self._name}/{self._round}"
        self._round += 1
        self._store.set(f"{key}/{self.rank}", f"={reason}")
        if self.rank == 0:
            return self._decide(key)
        if not self._came(f"{key}/verdict"):
            if self._store.add(f"{key}/closed", 1) < _DECIDED:
                self._broken = self._gone() or f"rank 0 did not come within {PATIENCE_S:g} s"
                return self._broken
            self._store.wait([f"{key}/verdict"])
        return self._said(f"{key}/verdict")

    def _decide(self, key: str) -> str:
        verdict = ""
        for rank in range(self.world):
            if not verdict and not self._came(f"{key}/{rank}"):
                verdict = self._broken = self._gone() or f"rank {rank} did not come within {PATIENCE_S:g} s"
            verdict = verdict or self._said(f"{key}/{rank}")
        # Whoever gives up waiting adds one before: then no other rank may count on it.
        if self._store.add(f"{key}/closed", _DECIDED) != _DECIDED:
            verdict = self._broken = self._broken or "a rank gave up waiting for rank 0"
        self._store.set(f"{key}/verdict", f"={verdict}")
        if not verdict:
            # All have come here, so that none reads the last round's keys any more.
            self._forget(self._last)
        self._last = key
        return verdict

    def _forget(self, key: str) -> None:
        names = [*map(str, range(self.world)), "closed", "verdict"] if key else []
        with suppress(Exception):
            for name in names:
                self._store.delete_key(f"{key}/{name}")

    def leave(self, why: str) -> None:
        """Tells the others not to wait for this rank any more."""
        self._broken = why
        self._store.set(f"{self._name}/gone", f"=rank {self.rank} has left: {why}")

    def _came(self, key: str) -> bool:
        give_up, pause_s = time.monotonic() + PATIENCE_S, 0.001
        while not self._store.check([key]):
            if time.monotonic() > give_up or self._gone():
                return bool(self._store.check([key]))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        return True

    def _gone(self) -> str:
        key = f"{self._name}/gone"
        return self._said(key) if self._store.check([key]) else ""

    def _said(self, key: str) -> str:
        said: bytes = self._store.get(key)
        return said.decode()[1:]
