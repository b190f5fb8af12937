"""One capture: the probe, run quietly through the model, its attention calls and its predictions.

Training must not notice: flags, random numbers, buffers and gradients are afterwards what they were. Not put back is
what a forward changes elsewhere: the inside of a list, or of a tensor that is neither a parameter nor a buffer.
"""

from __future__ import annotations

import copy
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .blob import encode
from .boundary import Call, catching
from .errors import HeadscopeError, shorten

LOGITS_BYTES = 1 << 20
TEXTS_PER_BATCH = 16
_PLAIN = (bool, int, float, str, tuple, Tensor, type(None))
_GENERATORS = (torch.Generator, np.random.Generator, random.Random)
_NOT_IDS = {"labels", "label", "attention_mask", "token_type_ids", "position_ids"}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def quiet(model: nn.Module, autocast: tuple[str, torch.dtype] | None = None) -> Iterator[None]:
    """Within it, `model` is in eval without gradients, uncompiled; after it, nothing has changed.

    `autocast` is the device type and dtype that training runs under; None is none, whatever is on outside.
    """
    with ExitStack() as stack:
        stack.enter_context(_same_random_numbers())
        stack.enter_context(_same_modules(model))
        stack.enter_context(_in_eval(model))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        kind = autocast[0] if autocast else device_of(model).type
        if autocast is not None:
            # Without its cache: a weight cast under no_grad would be used by the next training forward.
            stack.enter_context(torch.autocast(kind, dtype=autocast[1], cache_enabled=False))
        elif torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    cpu, own, legacy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(own)
        np.random.set_state(legacy)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    # By attribute: train() and eval() may be overridden, and would reach modules that the user has frozen.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _same_modules(model: nn.Module) -> Iterator[None]:
    """Lends every module copies of what it changes in a forward, and puts its own things back.

    Lent are buffers, and weights that an embedding with `max_norm` rescales; put back are plain attributes and random
    generators, and what was not there before is taken away.

    Raises:
        HeadscopeError: the forward changed a parameter.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    plain = [{name: value for name, value in vars(m).items() if isinstance(value, _PLAIN)} for m in modules]
    own = [(dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    names = [set(vars(m)) for m in modules]
    generators = [_state_of(value) for m in modules for value in vars(m).values() if isinstance(value, _GENERATORS)]
    rescaled = [
        (m, m._parameters["weight"]) for m in modules if getattr(m, "max_norm", None) and "weight" in m._parameters
    ]
    versions = [(parameter, _version(parameter)) for parameter in model.parameters()]
    lent: dict[int, _Lent] = {}
    try:
        for module, weight in rescaled:
            if weight is not None:
                module._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        for module, (buffers, _) in zip(modules, own, strict=True):
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = lent.setdefault(id(buffer), _Lent(buffer)).copy
        yield
    finally:
        for module, attributes, (buffers, not_saved) in zip(modules, plain, own, strict=True):
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(not_saved)
            for name, value in attributes.items():
                if vars(module).get(name, plain) is not value:
                    vars(module)[name] = value
        for module, before in zip(modules, names, strict=True):
            for name in set(vars(module)) - before:
                del vars(module)[name]
        for module, weight in rescaled:
            module._parameters["weight"] = weight
        for restore in generators:
            restore()
        for loan in lent.values():
            loan.restore()
        changed = next((parameter for parameter, version in versions if _version(parameter) != version), None)
    if changed is not None:
        name = next(name for name, parameter in model.named_parameters() if parameter is changed)
        raise HeadscopeError(f"the forward of {type(model).__name__} in eval changes its parameter {name!r} in place")


def _state_of(generator: Any) -> Callable[[], object]:
    """What puts a generator of random numbers back to where it is now."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, random.Random):
        own = generator.getstate()
        return lambda: generator.setstate(own)
    bits = copy.deepcopy(generator.bit_generator.state)
    return lambda: setattr(generator.bit_generator, "state", bits)


class _Lent:
    """A buffer and the copy that stands in for it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.copy = buffer, buffer.detach().clone()
        self._before = _version(self.buffer), _version(self.copy)

    def restore(self) -> None:
        # A module may have changed its buffer under a second name that it has for it; the copy is untouched then.
        if _version(self.buffer) != self._before[0] and _version(self.copy) == self._before[1]:
            with torch.no_grad():
                self.buffer.copy_(self.copy)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter (or buffer) lies."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of the probe: what goes into the model, and what there is to show of it.

    Shapes:
        ids: (batch, tokens) int64; None where the model reads no ids
        mask: (batch, tokens) true is not padding; None where the tokens cannot be counted
        labels: (batch, ...) int64
        tokens: batch, tokens

    Attributes:
        trouble: why tokens are shown as numbers, though there is a tokenizer.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    examples: int
    ids: NDArray[np.int64] | None
    mask: NDArray[np.bool_] | None
    labels: NDArray[np.int64] | None
    tokens: list[list[str]]
    texts: list[str]
    trouble: str = ""


@dataclass(frozen=True, eq=False)
class Probe:
    """The fixed examples of a run.

    Attributes:
        special: ids of the special tokens.
    """

    batches: tuple[Batch, ...]
    special: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        probe: Any,
        tokenizer: Any = None,
        model: nn.Module | None = None,
        examples: int | None = None,
        tokens: int | None = None,
    ) -> Probe:
        """The probe from texts, (text, label) pairs, one batch for the model, or a list of these batches.

        The tokenizer is needed for texts, names the tokens of other batches, and is not changed. What the forward of
        `model` does not take is left out; texts are cut to what it has positions for, and everything to `examples` in
        all and `tokens` in each.

        Raises:
            HeadscopeError: it is none of these, or texts come without a tokenizer.
        """
        items: Any = [probe] if isinstance(probe, (str, Mapping, Tensor)) else probe
        if not isinstance(items, Sequence) or not items:
            raise HeadscopeError(f"the probe is {_said(probe)}; {_WANTED}")
        labels: list[int] | None = None
        if all(_is_labelled(item) for item in items):
            items, labels = [item[0] for item in items], [int(item[1]) for item in items]
        if all(isinstance(item, str) for item in items):
            batches = _tokenised(items, labels, tokenizer, model, tokens)
        elif all(isinstance(item, (Mapping, Tensor)) for item in items):
            batches = [_ready(item, tokenizer, model) for item in items]
        else:
            raise HeadscopeError(f"the probe is a list of {shorten(dict.fromkeys(map(_said, items)))}; {_WANTED}")
        return cls(tuple(batches), _special(tokenizer))._cut(examples, tokens, tokenizer)

    @classmethod
    def first(
        cls,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tokenizer: Any = None,
        most: int = 8,
        tokens: int | None = None,
    ) -> Probe:
        """The probe from what a training forward was called with: its first `most` examples, copied.

        Raises:
            HeadscopeError: there is no tensor among the arguments.
        """
        size = _batch_size((args, kwargs))
        if size is None:
            raise HeadscopeError(
                f"no probe was given, and the model's first forward has no tensor to make one of (it got "
                f"{shorten([*map(_said, args), *kwargs]) or 'nothing'}); pass probe= to headscope.watch"
            )
        # The Trainer's divisor for the loss of its whole batch; without it the loss is the mean over these examples.
        named = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        args, named = _mapped((args, named), lambda t: _copied(t[:most] if t.ndim and t.shape[0] == size else t))
        return cls((_batch(args, named, tokenizer),), _special(tokenizer))._cut(most, tokens, tokenizer)

    def _cut(self, examples: int | None, tokens: int | None, tokenizer: Any) -> Probe:
        """The probe with no more than so many examples in all, and so many tokens in each."""
        batches, left = [], sum(batch.examples for batch in self.batches) if examples is None else examples
        for batch in self.batches:
            if left > 0:
                batches.append(_shorter(batch, min(left, batch.examples), tokens, tokenizer))
                left -= batches[-1].examples
        return Probe(tuple(batches), self.special)

    def blob(self) -> bytes:
        """The examples as probe.safetensors."""
        tensors: dict[str, NDArray[Any]] = {}
        for index, batch in enumerate(self.batches):
            found = {"ids": batch.ids, "mask": batch.mask, "labels": batch.labels}
            tensors |= {f"{index}/{kind}": np.asarray(array) for kind, array in found.items() if array is not None}
        facts = {
            "tokens": [batch.tokens for batch in self.batches],
            "texts": [batch.texts for batch in self.batches],
            "special": self.special,
        }
        return encode(tensors, {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()})


_WANTED = (
    "what can be probed is a list of texts, a list of (text, label) pairs with whole-number labels, one batch as the "
    "model takes it (a mapping of tensors or a tensor of ids), or a list of batches (of a loader: next(iter(loader)))"
)


def _is_labelled(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], int)


def _said(item: Any) -> str:
    kind = type(item).__name__
    if isinstance(item, (tuple, list)):
        return f"{kind} of ({', '.join(type(part).__name__ for part in item[:4])})" if item else f"an empty {kind}"
    return kind


def _special(tokenizer: Any) -> list[int]:
    return [int(i) for i in getattr(tokenizer, "all_special_ids", None) or []]


def _accepted(model: nn.Module | None) -> tuple[set[str], bool]:
    """The names that the model's forward takes, and whether it takes any other too."""
    if model is None:
        return set(), True
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _ready(item: Any, tokenizer: Any, model: nn.Module | None) -> Batch:
    if isinstance(item, Tensor):
        return _batch((_copied(item),), {}, tokenizer)
    names, others = _accepted(model)
    kwargs = {name: _copied(value) for name, value in item.items() if name in names}
    if others:
        kwargs |= {name: _copied(value) for name, value in item.items() if not isinstance(value, (str, list))}
    if not any(isinstance(value, Tensor) for value in kwargs.values()):
        raise HeadscopeError(
            f"the probe's batch has {shorten(item)}, and no tensor of it is taken by the forward of "
            f"{type(model).__name__} ({shorten(sorted(names))}); tokenise with return_tensors='pt'"
        )
    return _batch((), kwargs, tokenizer)


def _tokenised(
    texts: Sequence[str], labels: list[int] | None, tokenizer: Any, model: nn.Module | None, most: int | None
) -> list[Batch]:
    if not callable(tokenizer):
        raise HeadscopeError(
            f"the probe has {len(texts)} texts and the tokenizer is {_said(tokenizer)}; pass tokenizer= (such as "
            f"AutoTokenizer.from_pretrained(...)), or a batch that is tokenised already"
        )
    names, others = _accepted(model)
    if "input_ids" not in names and not others:
        raise HeadscopeError(
            f"the probe has {len(texts)} texts, and the forward of {type(model).__name__} takes "
            f"{shorten(sorted(names))}, no input_ids; pass batches as the model takes them"
        )
    config = getattr(unwrap(model), "config", None) if model is not None else None
    limits = [most, getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    limit = min((n for n in limits if isinstance(n, int) and 0 < n < 10**9), default=None)
    cutting = {} if limit is None else {"truncation": True, "max_length": limit}
    # A copy: fast tokenizers keep how they cut last, and save it. One text at a time: a call on several starts threads
    # in them, and they then warn when a loader forks.
    try:
        tokenizer = copy.deepcopy(tokenizer)
    except Exception:  # One with parts in Python, say, that cannot be copied: it is used as it is.
        pass
    rows = []
    for text in texts:
        try:
            rows.append(dict(tokenizer(text, **cutting)))
        except Exception as problem:
            raise HeadscopeError(
                f"the tokenizer {_said(tokenizer)} failed on the probe's text {text[:60]!r}: {type(problem).__name__}: "
                f"{problem}; pass another, or batches that are tokenised already"
            ) from problem
    batches = []
    for start in range(0, len(rows), TEXTS_PER_BATCH):
        part = slice(start, start + TEXTS_PER_BATCH)
        named = _padded(rows[part], tokenizer)
        kwargs = {name: t for name, t in named.items() if name in names or "input_ids" not in names}
        given = None if labels is None else torch.tensor(labels[part])
        if given is not None and "labels" in names:
            kwargs["labels"] = given
        batches.append(_batch((), kwargs, tokenizer, mask=named["attention_mask"], labels=given))
    return batches


def _padded(rows: list[dict[str, list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    """Rows of one length. A tokenizer without a padding token gets its end token, masked, and is left as it is."""
    ends = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    fill = {
        "input_ids": next((i for i in ends if isinstance(i, int)), 0),
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    longest = max(len(row["input_ids"]) for row in rows)
    left = getattr(tokenizer, "padding_side", "right") == "left"
    padded: dict[str, Tensor] = {}
    for name in {**rows[0], "attention_mask": None}:
        columns = []
        for row in rows:
            values = list(row.get(name, [1] * len(row["input_ids"])))
            padding = [fill.get(name, 0)] * (longest - len(values))
            columns.append(padding + values if left else values + padding)
        padded[name] = torch.tensor(columns)
    return padded


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor in it changed, in new tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, change) for part in value)
    if isinstance(value, MutableMapping):
        mapped = copy.copy(value)
        for name in value:
            mapped[name] = _mapped(value[name], change)
        return mapped
    return value


def _batch_size(values: Any) -> int | None:
    """The length of the first tensor of ids, or else of the first tensor."""
    found: list[Tensor] = []
    _mapped(values, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    tensors = [t for t in found if t.ndim]
    ids = [t for t in tensors if t.ndim >= 2 and not t.is_floating_point()]
    return next((t.shape[0] for t in [*ids, *tensors]), None)


def _batch(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tokenizer: Any,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Batch:
    """The batch with what there is to show of it."""
    positional = [value for value in args if isinstance(value, Tensor)]
    given = dict(chain(*(value.items() for value in (*args, kwargs) if isinstance(value, Mapping))))
    named = [value for name, value in given.items() if isinstance(value, Tensor) and name not in _NOT_IDS]
    inputs = [*(t for t in [given.get("input_ids")] if isinstance(t, Tensor)), *positional, *named]
    ids = next((t for t in inputs if t.ndim == 2 and not t.is_floating_point() and t.dtype != torch.bool), None)
    read = ids if ids is not None else next((t for t in inputs if t.ndim == 3), None)
    if mask is None and read is not None:
        ones = torch.ones(read.shape[:2])
        masks = [given.get("attention_mask"), *(t for t in positional if t is not ids and _is_mask(t)), ones]
        mask = next(t for t in masks if isinstance(t, Tensor) and t.shape == ones.shape)
    labels = given.get("labels", given.get("label")) if labels is None else labels
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        labels = None
    examples = _batch_size((args, kwargs)) or 0
    shown = [torch.arange(0 if read is None else read.shape[1])] * examples if ids is None else list(ids)
    kept = [row.bool() for row in mask] if mask is not None else [torch.ones(0, dtype=torch.bool)] * examples
    naming, trouble = None if ids is None else tokenizer, ""
    real = [row[keep].tolist() for row, keep in zip(shown, kept, strict=True)]
    try:
        tokens = [_names(row.tolist(), naming) for row in shown]
        texts = [_text(row, naming) for row in real]
    except Exception as problem:
        first = str(problem).strip().split("\n", 1)[0]
        trouble = f"the tokenizer {_said(tokenizer)} failed, so tokens are numbers: {type(problem).__name__}: {first}"
        tokens = [_names(row.tolist(), None) for row in shown]
        texts = [_text(row, None) for row in real]
    return Batch(
        args=args,
        kwargs=kwargs,
        examples=examples,
        ids=None if ids is None else ids.long().numpy(),
        mask=None if mask is None else mask.bool().numpy(),
        labels=None if labels is None else labels.long().numpy(),
        tokens=tokens,
        texts=texts,
        trouble=trouble,
    )


def _shorter(batch: Batch, examples: int, tokens: int | None, tokenizer: Any) -> Batch:
    """The batch's first examples and tokens; of batches padded on the left, the last tokens."""
    length = 0 if batch.mask is None else batch.mask.shape[1]
    tokens = length if tokens is None else min(tokens, length)
    if examples == batch.examples and tokens == length:
        return batch
    left = batch.mask is not None and not batch.mask[:, 0].all() and bool(batch.mask[:, -1].all())
    kept = slice(length - tokens, length) if left else slice(0, tokens)

    def cut(t: Tensor) -> Tensor:
        if t.ndim and t.shape[0] == batch.examples:
            t = t[:examples]
        # Tokens are the second axis; of masks for pairs of tokens, the last two.
        axes = {2: (1,), 3: (1,), 4: (2, 3)}.get(t.ndim, ())
        for axis in axes:
            if length and t.shape[axis] == length:
                t = t.narrow(axis, kept.start, tokens)
        return t.clone()

    args, kwargs = _mapped((batch.args, batch.kwargs), cut)
    mask = None if batch.mask is None else torch.from_numpy(batch.mask[:examples, kept].copy())
    labels = None if batch.labels is None else cut(torch.from_numpy(batch.labels))
    return _batch(args, kwargs, tokenizer, mask=mask, labels=labels)


def _is_mask(t: Tensor) -> bool:
    return bool(((t == 0) | (t == 1)).all())


def _names(ids: list[int], tokenizer: Any) -> list[str]:
    named = hasattr(tokenizer, "convert_ids_to_tokens")
    return [str(token) for token in (tokenizer.convert_ids_to_tokens(ids) if named else ids)]


def _text(ids: list[int], tokenizer: Any) -> str:
    if hasattr(tokenizer, "decode"):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    return " ".join(_names(ids, tokenizer))


@dataclass(frozen=True, eq=False)
class Pass:
    """What one batch of the probe gave.

    Shapes:
        logits: (batch, ...) float32; None where there are none or they are above 1 MiB
        predictions: (batch, ...) int32, index of the largest logit
    """

    batch: int
    calls: list[dict[str, Any]]
    refused: dict[str, str]
    logits: NDArray[np.float32] | None
    predictions: NDArray[np.int32] | None
    loss: float | None


def run(
    model: nn.Module,
    probe: Probe,
    *,
    autocast: tuple[str, torch.dtype] | None = None,
    on_call: Callable[[int, Call], None] | None = None,
) -> list[Pass]:
    """Runs the probe through the unwrapped model, quietly, and catches its attention calls.

    `on_call` gets the batch's index and each call right after its kernel, and has to copy its tensors at once; what it
    raises ends up in `Pass.refused`. `autocast` is as in `quiet`.
    """
    bare = unwrap(model)
    device = device_of(bare)
    passes = []
    with quiet(bare, autocast):
        for index, batch in enumerate(probe.batches):
            calls: list[dict[str, Any]] = []

            def take(call: Call, index: int = index, calls: list[dict[str, Any]] = calls) -> None:
                if on_call is not None:
                    on_call(index, call)
                calls.append(call.facts())

            # Copies even on the same device: a model may change its input in place.
            args, kwargs = _mapped((batch.args, batch.kwargs), lambda t: t.to(device, copy=True))
            with catching(bare, take) as caught:
                output = bare(*args, **kwargs)
            passes.append(Pass(index, calls, dict(caught.refused), *_read(output)))
    return passes


def _read(output: Any) -> tuple[NDArray[np.float32] | None, NDArray[np.int32] | None, float | None]:
    """Logits, predictions and loss of whatever a model returns."""
    if isinstance(output, Mapping):
        logits, loss = output.get("logits"), output.get("loss")
    elif isinstance(output, (Tensor, tuple, list)):
        parts = [output] if isinstance(output, Tensor) else list(output)
        floats = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
        logits = next((part for part in floats if part.ndim >= 2), None)
        loss = next((part for part in floats if part.ndim == 0), None)
    else:
        logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
    number = loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else None
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        return None, None, number
    predictions = logits.argmax(-1).to("cpu", torch.int32).numpy()
    small = logits.numel() * 4 <= LOGITS_BYTES
    return logits.to("cpu", torch.float32).numpy() if small else None, predictions, number
