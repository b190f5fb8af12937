"""Where attention calls are caught, while a model runs its own kernels.

Two routes are open at once and record each call once. transformers: whatever function `AttentionInterface` hands out is
wrapped, so that keys are seen before they are repeated for every head. Everything else: calls of
`torch.nn.functional.scaled_dot_product_attention`. Nothing stays installed after `catching`.

Not seen: attention written by hand, `nn.MultiheadAttention`, other kernels (each named in `Catch.refused` where it is
noticed), and what runs no Python: CUDA graphs, TorchScript, regions that torch.compile has compiled.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import NotSupported

_SDPA = torch.nn.functional.scaled_dot_product_attention
_MHA = {
    torch.nn.functional.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
}
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call, as its kernel got it and what it gave back; the fields are those of docs/format.md.

    Tensors are detached and not copied: they are what the kernel saw only until the model goes on.

    Shapes:
        q: (batch, heads, queries, dim)
        k: (batch, kv_heads, keys, dim), kv_heads divides heads
        v: (batch, kv_heads, keys, dim_v)
        output: (batch, heads, queries, dim_v)
        mask: broadcasts to (batch, heads, queries, keys), bool, true means may attend; an axis on which it is constant
            has size 1. Equal masks of one `catching` are one object.
        bias: as mask, floating, of no meaning where the mask forbids
        sinks: (heads,)
    """

    path: str
    call: int
    route: str
    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    scale: float
    causal: bool = False
    offset: int = 0
    window: int | None = None
    softcap: float | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def dtype(self) -> str:
        """What the kernel computed in, such as "float32"."""
        return str(self.q.dtype).removeprefix("torch.")

    def facts(self) -> dict[str, Any]:
        """The fields of a call in docs/format.md, without where it is stored and how it was checked."""
        plain = ("path", "call", "route", "scale", "causal", "offset", "window", "softcap", "dropout", "dtype")
        heads = {"heads": self.q.shape[1], "kv_heads": self.k.shape[1], "sinks": self.sinks is not None}
        return {name: getattr(self, name) for name in plain} | heads


class Catch:
    """What one `catching` has seen.

    Attributes:
        calls: every call in order; stays empty when `on_call` takes them.
        count: how many calls were caught.
        refused: module path to a sentence that says why a call of it was not caught.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.count = 0
        self.refused: dict[str, str] = {}


@contextmanager
def catching(model: nn.Module, on_call: Callable[[Call], None] | None = None) -> Iterator[Catch]:
    """Catches the attention calls that `model` makes in this thread; the model's kernels run as ever.

    Recomputation during backward (gradient checkpointing) is left out. An error of ours or of `on_call` never reaches
    the model: it goes to `refused`, and the call is dropped.

    Args:
        model: module paths are those of `model.named_modules()`, without the names that wrappers add; "" is the model.
        on_call: gets each call right after its kernel, while its tensors are what the kernel saw. None keeps the calls,
            and with them their tensors, in `Catch.calls`.

    Raises:
        NotSupported: something is being caught already.
    """
    if not _one_at_a_time.acquire(blocking=False):
        raise NotSupported(
            f"attention of {type(model).__name__} was to be caught while another capture is running in this process; "
            f"captures cannot be nested or run in two threads: leave the first one before"
        )
    catcher = _Catcher(model, on_call)
    try:
        with ExitStack() as installed:
            _install_interface(catcher, installed)
            _install_stack(catcher, model, installed)
            installed.enter_context(_SdpaMode(catcher))
            yield catcher.caught
    finally:
        catcher.open = False
        _one_at_a_time.release()


class _Refusal(Exception):
    """Why a call cannot be recorded."""


_Seen = list[tuple[tuple[Any, ...], dict[str, Any]]]


class _Catcher:
    """Turns what the routes see into calls."""

    def __init__(self, model: nn.Module, on_call: Callable[[Call], None] | None) -> None:
        self.caught = Catch()
        self.open = True
        self.paths = {id(module): _clean(path) for path, module in model.named_modules()}
        self.stack: list[int] = []
        # Within transformers' own SDPA function, the arguments that reached the kernel; None elsewhere.
        self.inner: _Seen | None = None
        self._on_call = on_call
        self._masks = _Masks()
        self._calls_of: dict[str, int] = {}
        self._thread = threading.get_ident()

    def here(self) -> bool:
        return self.open and threading.get_ident() == self._thread

    def live(self) -> bool:
        # Inside backward a forward is a recomputation for gradient checkpointing: the call was seen before.
        return self.here() and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1

    def noticed(self) -> tuple[int, int]:
        return self.caught.count, len(self.caught.refused)

    def refuse(self, path: str, reason: str) -> None:
        self.caught.refused.setdefault(path, reason)

    def record(self, path: str, build: Callable[[], dict[str, Any]]) -> None:
        """Builds a call and hands it on; whatever goes wrong is a reason, never an error."""
        try:
            with torch.no_grad():
                call = Call(path=path, call=self._calls_of.get(path, 0), **_checked(build()))
                if self._on_call is None:
                    self.caught.calls.append(call)
                else:
                    self._on_call(call)
            self._calls_of[path] = call.call + 1
            self.caught.count += 1
        except _Refusal as reason:
            self.refuse(path, str(reason))
        except Exception as error:
            self.refuse(path, f"the call was not recorded: {type(error).__name__}: {error}")

    def sdpa(self, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        """A call of SDPA has returned."""
        if not self.live() or not self.stack:
            return
        if self.inner is not None:
            self.inner.append((arguments, options))
        else:
            path = self.paths[self.stack[-1]]
            self.record(path, lambda: self._of_sdpa(_sdpa_arguments(*arguments, **options), output))

    def _of_sdpa(self, a: dict[str, Any], output: Any) -> dict[str, Any]:
        q, k, v, added = a["query"], a["key"], a["value"], a["attn_mask"]
        _plain(query=q, key=k, value=v, attn_mask=added)
        if q.ndim not in (3, 4):
            raise _Refusal(f"its query has {q.ndim} axes; calls of scaled_dot_product_attention with 3 or 4 are caught")
        if q.ndim == 3:
            q, k, v, output = q[:, None], k[:, None], v[:, None], output[:, None]
            added = added[:, None] if added is not None and added.ndim == 3 else added
        mask, bias = self._masks.split(added, k.shape[2])
        return {
            "route": "sdpa",
            **{"q": q, "k": k, "v": v, "output": output},
            "scale": q.shape[-1] ** -0.5 if a["scale"] is None else float(a["scale"]),
            "causal": bool(a["is_causal"]),
            "mask": mask,
            "bias": None if bias is None else self._masks.shared(_as_kernel(bias)),
            "dropout": float(a["dropout_p"]),
        }

    def of_transformers_sdpa(self, a: dict[str, Any], seen: _Seen, output: Any) -> dict[str, Any]:
        if len(seen) != 1:
            raise _Refusal(f"its 'sdpa' function called scaled_dot_product_attention {len(seen)} times instead of once")
        if a.get("cache") is not None:
            raise _Refusal("paged caches are not captured; run it without continuous batching")
        # Mask, causality and scale as they reached the kernel; q, k, v as they came, with heads not yet repeated.
        inner = _sdpa_arguments(*seen[0][0], **seen[0][1])
        kernel = dict(inner, query=a["query"])
        if inner["query"].shape != a["query"].shape:
            # One query per head was packed along the groups of heads: only the mask from outside has the usual axes.
            if a.get("position_bias") is not None:
                raise _Refusal("a position bias with a single query and shared keys is not captured")
            kernel["attn_mask"] = a["attention_mask"]
        keys = inner["key"].shape[2]
        kernel["key"], kernel["value"] = a["key"][:, :, :keys], a["value"][:, :, :keys]
        return dict(self._of_sdpa(kernel, _heads_first(output)), route="transformers:sdpa")

    def of_transformers_eager(self, a: dict[str, Any], output: Any) -> dict[str, Any]:
        q, k, v, added, bias = a["query"], a["key"], a["value"], a["attention_mask"], a.get("position_bias")
        _plain(query=q, key=k, value=v, attention_mask=added, position_bias=bias)
        if a.get("sinks") is not None:
            raise _Refusal("its sinks differ from query to query; sinks of one number a head are captured")
        mask, bias = self._masks.sum([self._masks.split(_additive(t), k.shape[2]) for t in (bias, added)])
        scale, softcap, sinks, dropout = (a.get(name) for name in ("scaling", "softcap", "s_aux", "dropout"))
        return {
            "route": "transformers:eager",
            **{"q": q, "k": k, "v": v, "output": _heads_first(output)},
            "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
            "softcap": None if softcap is None else float(softcap),
            "mask": mask,
            "bias": bias,
            "sinks": None if sinks is None else sinks.detach().reshape(q.shape[1]),
            "dropout": float(dropout or 0.0) if a["module"].training else 0.0,
        }


class _Masks:
    """Masks and biases in their smallest form, each converted once and equal ones shared."""

    def __init__(self) -> None:
        self._split: dict[tuple[int, int, int], tuple[Tensor, Tensor | None, Tensor | None]] = {}
        self._kept: list[Tensor] = []

    def split(self, added: Tensor | None, keys: int) -> tuple[Tensor | None, Tensor | None]:
        """What of `added` forbids, as a mask, and what is left, as a bias; None where there is nothing."""
        if added is None:
            return None, None
        known = (id(added), -1 if added.is_inference() else added._version, keys)
        if known not in self._split:
            # The tensor is kept beside the result so that its id is not given to another.
            self._split[known] = (added, *self._convert(added.detach(), keys))
        return self._split[known][1:]

    def _convert(self, added: Tensor, keys: int) -> tuple[Tensor | None, Tensor | None]:
        small = _reduced(added[(None,) * (4 - added.ndim)][..., :keys])
        if small.dtype == torch.bool:
            return (None if bool(small.all()) else self.shared(small)), None
        forbidden = small <= torch.finfo(small.dtype).min / 2
        bias = _reduced_bias(small, forbidden)
        return (
            self.shared(_reduced(~forbidden)) if bool(forbidden.any()) else None,
            self.shared(bias) if bool(bias.any()) else None,
        )

    def sum(self, parts: list[tuple[Tensor | None, Tensor | None]]) -> tuple[Tensor | None, Tensor | None]:
        masks, biases = ([t for t in kind if t is not None] for kind in zip(*parts, strict=True))
        mask = self.shared(functools.reduce(torch.logical_and, masks)) if masks else None
        bias = self.shared(functools.reduce(torch.add, biases)) if biases else None
        return mask, bias

    def shared(self, small: Tensor) -> Tensor:
        """The equal tensor that was seen before, or this one."""
        for kept in self._kept:
            same = kept.dtype == small.dtype and kept.shape == small.shape and kept.device == small.device
            if kept is small or (same and torch.equal(kept, small)):
                return kept
        # A copy: the model may change its mask in place later on.
        self._kept.append(small.clone())
        return self._kept[-1]


class _SdpaMode(TorchFunctionMode):
    """Tells the catcher of SDPA calls, early-bound ones too."""

    def __init__(self, catcher: _Catcher) -> None:
        super().__init__()
        self.catcher = catcher

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is _SDPA:
            self.catcher.sdpa(args, kwargs or {}, output)
        elif func in _MHA and self.catcher.stack:
            path = self.catcher.paths[self.catcher.stack[-1]]
            self.catcher.refuse(path, "torch's nn.MultiheadAttention is not captured yet")
        return output


def _install_interface(catcher: _Catcher, installed: ExitStack) -> None:
    """Wraps what transformers' AttentionInterface hands out, if transformers is in use."""
    interface: Any = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    for name in ("get_interface", "__getitem__"):
        if look_up := getattr(interface, name, None):

            def looked_up(own: Any, implementation: Any, *default: Any, _look_up: Any = look_up, **named: Any) -> Any:
                return _watched(catcher, _look_up(own, implementation, *default, **named), implementation)

            installed.enter_context(_replaced(interface, name, looked_up))


def _watched(catcher: _Catcher, fn: Any, implementation: Any) -> Any:
    """The attention function `fn` with the catcher told of its calls."""
    if not callable(fn) or getattr(fn, "_headscope", None) is catcher:
        return fn
    if hasattr(fn, "_headscope"):
        fn = fn.__wrapped__  # Someone kept it from an earlier catching.
    sdpa, eager = _is_transformers_sdpa(fn), implementation in ("eager", None)

    @functools.wraps(fn)
    def watched(*args: Any, **kwargs: Any) -> Any:
        path = catcher.paths.get(id(args[0] if args else kwargs.get("module")))
        if path is None or not catcher.live():
            return fn(*args, **kwargs)
        noticed = catcher.noticed()
        seen: _Seen = []
        outer, catcher.inner = catcher.inner, seen if sdpa else None
        try:
            output = fn(*args, **kwargs)
        finally:
            catcher.inner = outer
        if sdpa:
            catcher.record(path, lambda: catcher.of_transformers_sdpa(_named(fn, args, kwargs), seen, output))
        elif catcher.noticed() != noticed:
            pass  # It was built on SDPA, which has been seen.
        elif eager:
            catcher.record(path, lambda: catcher.of_transformers_eager(_named(fn, args, kwargs), output))
        else:
            catcher.refuse(
                path,
                f"its attention implementation {implementation!r} is not captured; 'sdpa' and 'eager' are: load the "
                f"model with attn_implementation='sdpa'",
            )
        return output

    watched._headscope = catcher  # type: ignore[attr-defined]
    return watched


def _install_stack(catcher: _Catcher, model: nn.Module, installed: ExitStack) -> None:
    """Keeps the stack of modules that are running, by hooks."""

    def enter(module: nn.Module, _: Any) -> None:
        if catcher.here():
            catcher.stack.append(id(module))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        # A hook of someone else that raised may have kept `enter` from running.
        if catcher.here() and id(module) in catcher.stack:
            while catcher.stack.pop() != id(module):
                pass

    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            installed.callback(module.register_forward_pre_hook(enter).remove)
            installed.callback(module.register_forward_hook(leave, always_call=True).remove)


@contextmanager
def _replaced(owner: type, name: str, new: Any) -> Iterator[None]:
    """Sets an attribute of a class for a while, and leaves no trace where it was inherited."""
    own, old = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, old)
        else:
            delattr(owner, name)


def _clean(path: str) -> str:
    """A module path without the names that wrappers such as torch.compile put in."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _is_transformers_sdpa(fn: Any) -> bool:
    return fn is getattr(sys.modules.get("transformers.integrations.sdpa_attention"), "sdpa_attention_forward", None)


def _named(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound = inspect.signature(fn).bind(*args, **kwargs)
    return {**bound.arguments, **bound.kwargs}


def _sdpa_arguments(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> dict[str, Any]:
    named = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    return {**named, "dropout_p": dropout_p, "is_causal": is_causal, "scale": rest.get("scale")}


def _plain(**tensors: Any) -> None:
    """Refuses what is neither None nor an ordinary tensor."""
    for name, t in tensors.items():
        if t is not None and (type(t) not in (Tensor, nn.Parameter) or t.is_nested):
            kind = "nested tensor" if isinstance(t, Tensor) and t.is_nested else type(t).__name__
            raise _Refusal(f"its {name} is a {kind}; plain tensors are captured")


def _additive(added: Tensor | None) -> Tensor | None:
    """What eager attention adds for a mask: whole numbers and booleans count as they are."""
    return added if added is None or added.is_floating_point() else added.float()


def _as_kernel(t: Tensor) -> Tensor:
    """The tensor in the dtype that the kernel gets under autocast."""
    kind = t.device.type
    t = t.detach()
    if torch.is_autocast_enabled(kind) and t.is_floating_point() and t.dtype != torch.float64:
        return t.to(torch.get_autocast_dtype(kind))
    return t


def _heads_first(output: Any) -> Tensor:
    """The output of a transformers attention function as (batch, heads, queries, dim_v)."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, Tensor) or first.ndim != 4:
        raise _Refusal("its attention function did not return (batch, queries, heads, dim) first")
    return first.transpose(1, 2)


def _reduced(t: Tensor) -> Tensor:
    """The tensor with size 1 on every axis along which it is constant."""
    for axis in range(t.ndim):
        first = t.narrow(axis, 0, min(1, t.shape[axis]))
        if t.shape[axis] > 1 and (t.stride(axis) == 0 or torch.equal(t, first.expand_as(t))):
            t = first
    return t


def _reduced_bias(t: Tensor, forbidden: Tensor) -> Tensor:
    """The tensor with size 1 on every axis along which the entries that are not forbidden are constant."""
    for axis in range(t.ndim):
        high = t.masked_fill(forbidden, -torch.inf).amax(axis, keepdim=True)
        low = t.masked_fill(forbidden, torch.inf).amin(axis, keepdim=True)
        if bool((high <= low).all()):
            t, forbidden = high, forbidden.all(axis, keepdim=True)
    return t.masked_fill(forbidden, 0)


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a call, detached and in the kernel's dtype, if their shapes fit each other."""
    fields |= {name: _as_kernel(fields[name]) for name in ("q", "k", "v")} | {"output": fields["output"].detach()}
    q, k, v, output = (tuple(fields[name].shape) for name in ("q", "k", "v", "output"))
    if {len(q), len(k), len(v)} != {4}:
        raise _Refusal(f"its q, k, v are {q}, {k}, {v}; (batch, heads, tokens, dim) is captured")
    if not q[0] == k[0] == v[0]:
        raise _Refusal(f"its q, k, v have batches of {q[0]}, {k[0]}, {v[0]}; only equal ones are captured")
    if k[1] != v[1] or q[1] % k[1]:
        raise _Refusal(f"its {q[1]} heads cannot share {k[1]} heads of keys and {v[1]} of values evenly")
    if output != (*q[:3], v[3]):
        raise _Refusal(f"its output is {output} (batch, heads, queries, dim) where {(*q[:3], v[3])} was expected")
    full = (*q[:3], k[2])
    for name in ("mask", "bias"):
        if (t := fields[name]) is not None and any(s not in (1, n) for s, n in zip(t.shape, full, strict=True)):
            raise _Refusal(f"its {name} of {tuple(t.shape)} does not broadcast to {full}")
    return fields
