"""What a capture leaves in a step's file: attention calls and outputs as tensors and facts, each with its proof."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from . import attention
from .blob import Array, Image, Json
from .boundary import Call
from .errors import HeadscopeError

_FP16_LARGEST = 65504.0
# What stands in a file for an error that is infinite or not a number: JSON has neither.
_NOT_FINITE = 1e9
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.bool: np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Keeping:
    """Which attention calls and heads are kept; None is all.

    Attributes:
        layers: a regular expression that is found in the module path, or the paths themselves.
        heads: their numbers in the model.
    """

    layers: str | Collection[str] | None = None
    heads: Sequence[int] | None = None

    @classmethod
    def of(cls, layers: str | Collection[str] | None, heads: Sequence[int] | None) -> Keeping:
        """The choice that a user made, checked.

        Raises:
            HeadscopeError: it is none.
        """
        if isinstance(layers, str):
            try:
                re.compile(layers)
            except re.error as problem:
                raise HeadscopeError(
                    f"layers={layers!r} is not a regular expression: {problem}; or give a list of paths"
                ) from None
        if heads is not None and (not len(heads) or any(type(head) is not int or head < 0 for head in heads)):
            raise HeadscopeError(f"heads must be a list of head numbers from 0 on, not {heads!r}")
        return cls(layers, heads)

    def heads_of(self, path: str, heads: int) -> list[int] | None:
        """The heads of a layer that are kept: None is all, an empty list none."""
        if isinstance(self.layers, str) and not re.search(self.layers, path):
            return []
        if not isinstance(self.layers, str | None) and path not in self.layers:
            return []
        return None if self.heads is None else [head for head in self.heads if head < heads]


def _only(call: Call, numbers: list[int]) -> Call:
    """The call with some of its heads, each with keys and values of its own."""
    groups = call.q.shape[1] // call.k.shape[1]
    shared = [number // groups for number in numbers]

    def picked(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, numbers]

    return replace(
        call,
        q=call.q[:, numbers],
        k=call.k[:, shared],
        v=call.v[:, shared],
        output=call.output[:, numbers],
        mask=picked(call.mask),
        bias=picked(call.bias),
        sinks=None if call.sinks is None else call.sinks[numbers],
    )


class Record:
    """One step's file while it is being filled.

    Filling copies and nothing else; the proof is made in `finish`, on the writer's thread, from the copied bytes.

    Args:
        image: the file to fill.
        kept: how a float32 model's q and k are kept, float16 or float32; a 16-bit model's are kept as they are.
        exact: paths whose q and k are kept as float32 all the same; `finish` adds those that float16 is too coarse for.
        turn: which example is checked, counted on from capture to capture.
        keeping: which layers and heads; all, if None.
    """

    def __init__(
        self, image: Image, *, kept: torch.dtype, exact: set[str], turn: int, keeping: Keeping | None = None
    ) -> None:
        self.calls: list[Json] = []
        self.left_out = 0
        self.image = image
        self._kept = kept
        self._exact = exact
        self._turn = turn
        self._keeping = keeping or Keeping()
        self._shared: dict[tuple[int, int], tuple[str, Tensor]] = {}

    def add(self, call: Call, *, mode: str, batch: int, named: bool = True) -> None:
        """Copies one attention call, if it is one of those that are kept.

        Args:
            named: its queries and its keys are the tokens of the examples, in their order.
        """
        numbers = self._keeping.heads_of(call.path, call.q.shape[1])
        if numbers is not None and not numbers:
            self.left_out += 1
            return
        facts = {**call.facts(), "kept": numbers, "named": named}
        if numbers is not None:
            call = _only(call, numbers)
        prefix = f"{mode}/{batch}/"
        name = f"{call.path}@{call.call}" if call.call else call.path
        example = self._turn % call.q.shape[0]
        rows = attention.rows_to_check(call.q.shape[2])
        self._put(f"{prefix}{name}.q", call.q, call.path)
        self._put(f"{prefix}{name}.k", call.k, call.path)
        if call.dropout == 0:
            self._put(f"{prefix}{name}.v", call.v[example : example + 1], call.path)
            chosen = torch.from_numpy(rows).to(call.output.device)
            self._put(f"{prefix}{name}.output", call.output[example : example + 1].index_select(2, chosen), call.path)
        if call.sinks is not None:
            self._copy(f"{prefix}{name}.sinks", call.sinks, torch.float32)
        self.calls.append(
            {
                "mode": mode,
                "batch": batch,
                **facts,
                "mask": self._once(prefix, "mask", batch, call.mask),
                "bias": self._once(prefix, "bias", batch, call.bias),
                "check": {"example": example, "rows": rows.tolist(), "error": None, "limit": None, "note": ""},
            }
        )

    def add_output(
        self, *, mode: str, batch: int, logits: Array | None, predictions: Array | None, loss: float | None
    ) -> None:
        """Copies what the model said of a batch."""
        found = {"logits": logits, "predictions": predictions, "loss": None if loss is None else np.float32(loss)}
        for kind, array in found.items():
            if array is not None:
                np.copyto(self.image.slot(f"{mode}/{batch}/{kind}", array.dtype, array.shape), array)

    def _put(self, key: str, tensor: Tensor, path: str) -> None:
        """Copies q, k, v or the output in the precision that is kept."""
        dtype = tensor.dtype
        if dtype not in (torch.float16, torch.bfloat16):
            dtype = torch.float32 if path in self._exact else self._kept
            if dtype == torch.float16 and tensor.numel() and not float(tensor.abs().amax()) <= _FP16_LARGEST:
                dtype = torch.float32
        self._copy(key, tensor, dtype)

    def _copy(self, key: str, tensor: Tensor, dtype: torch.dtype) -> None:
        slot = self.image.slot(key, _NUMPY[dtype], tuple(tensor.shape))
        if dtype == torch.bfloat16:
            target = torch.from_numpy(slot.view(np.int16)).view(torch.bfloat16)
        else:
            target = torch.from_numpy(slot)
        target.copy_(tensor.detach())

    def _once(self, prefix: str, kind: str, batch: int, tensor: Tensor | None) -> str | None:
        """The name of a mask or bias; copied the first time that it is met."""
        if tensor is None:
            return None
        known = self._shared.get((batch, id(tensor)))
        if known is None:
            count = sum(name.startswith(kind) for (b, _), (name, _) in self._shared.items() if b == batch)
            # The tensor is kept beside its name so that its id is not given to another.
            known = self._shared[batch, id(tensor)] = (f"{kind}.{count}", tensor)
            keep = tensor.dtype if tensor.dtype in _NUMPY else torch.float32
            self._copy(f"{prefix}{known[0]}", tensor, keep)
        return known[0]

    def finish(self, metadata: Json) -> tuple[Json, object]:
        """Makes the proof of every call and gives the file's whole metadata and the facts of its layout."""
        for call in self.calls:
            call["check"] |= self._proof(call)
        facts = [{name: value for name, value in call.items() if name != "check"} for call in self.calls]
        return {**metadata, "calls": self.calls}, facts

    def _proof(self, call: Json) -> Json:
        prefix = f"{call['mode']}/{call['batch']}/"
        name = prefix + (f"{call['path']}@{call['call']}" if call["call"] else call["path"])
        if call["dropout"] > 0:
            return {"note": "unchecked: dropout"}
        tensors = {kind: self.image[f"{name}.{kind}"] for kind in ("q", "k", "v", "output")}
        tensors |= {kind: self.image[prefix + call[kind]] for kind in ("mask", "bias") if call[kind]}
        if call["sinks"]:
            tensors["sinks"] = self.image[f"{name}.sinks"]
        error = attention.self_check(call, tensors)
        wide = call["dtype"] in ("float32", "float64")
        exact = wide and tensors["q"].dtype == np.float32 == tensors["output"].dtype
        if np.isnan(error):
            return {"note": "unchecked: no row of this example may attend to anything"}
        limit = attention.LIMIT_EXACT if exact else attention.LIMIT_16_BITS
        if error > limit and wide and not exact:
            self._exact.add(call["path"])
        return {"error": min(error, _NOT_FINITE), "limit": limit}

    def failed(self) -> list[Json]:
        """The calls whose self-check failed; known once `finish` has run."""
        return [call for call in self.calls if (call["check"]["error"] or 0) > (call["check"]["limit"] or 1)]
