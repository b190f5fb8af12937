"""Looking today at a training of last month: the probe through checkpoints that exist already."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .blob import Json
from .capture import unwrap
from .errors import HeadscopeError, Missing, NotSupported, shorten
from .integrations.watching import numbers
from .watch import Watch

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Replayed:
    """What a replay did.

    Attributes:
        steps: those that were captured, in order.
        skipped: name of a checkpoint to the reason why it was left out.
    """

    steps: list[int] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Checkpoint:
    name: str
    step: int
    folder: Path | None = None
    state: Mapping[str, Tensor] | None = None
    history: list[Json] = field(default_factory=list)


def replay(
    checkpoints: str | Path | Iterable[str | Path | tuple[int, Mapping[str, Tensor]]],
    out: str | Path,
    *,
    model: nn.Module | None = None,
    probe: Any,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress = lambda done, total: None,
    **budget: Any,
) -> Replayed:
    """Runs a probe through checkpoints, in the order of their steps, and writes an ordinary run.

    One checkpoint is in memory at a time, beside the model that it is put into. Those that are broken or incomplete are
    left out and named. What the Trainer logged up to a checkpoint is put on the time line. The model runs as it was
    saved, without the autocast that it may have been trained under.

    Args:
        checkpoints: folders that a Hugging Face Trainer saved (`checkpoint-500`), or the folder that they are in; or
            pairs of an optimiser step and a state dict, for `model`. Pairs from a generator must come in order.
        out: folder, or `s3://` or `gs://` address of the run.
        model: what the checkpoints belong to; its weights are replaced. Without it, the model class that the
            `config.json` of the first folder names.
        probe: the examples, as for `headscope.watch`.
        tokenizer: as for `headscope.watch`; the one in the first folder, if there is one.
        dtype: how a float32 model's q and k are kept, as for `headscope.watch`.
        progress: called with how many checkpoints are done, and of how many (None: not known).
        budget: `layers`, `heads`, `examples`, `tokens`, `max_bytes`, as for `headscope.watch`.

    Raises:
        HeadscopeError: no checkpoint can be used, or the probe does not go through the model.
        NotSupported: the model class cannot be found; pass `model`.
        Missing: folders were given and transformers is not installed.
        StoreError: `out` cannot be written.

    Example:
        headscope.replay("results", "runs/replayed", probe=[("a dull film", 0), ("a fine one", 1)])
    """
    done = Replayed()
    found, total = _ordered(checkpoints, done.skipped)
    logged = -1
    with ExitStack() as stack:
        watch: _Replay | None = None
        for checkpoint, whole in _filled_in_turn(found, model, done):
            progress(len(done.steps) + len(done.skipped), total)
            if watch is None:
                tokenizer = tokenizer if tokenizer is not None else _tokenizer(checkpoint)
                settings = {"tokenizer": tokenizer, "dtype": dtype, "start_step": checkpoint.step, **budget}
                watch = stack.enter_context(_Replay(whole, out, probe=probe, every=1, **settings))
            watch.step(checkpoint.step)
            watch.log_history(row for row in checkpoint.history if logged < row["step"] <= checkpoint.step)
            logged = checkpoint.step
            done.steps.append(checkpoint.step)
        progress(len(done.steps) + len(done.skipped), total)
    if watch is None:
        reasons = shorten((f"{name}: {reason}" for name, reason in done.skipped.items()), 3)
        raise HeadscopeError(
            f"nothing to replay for {out}: none of {len(done.skipped)} checkpoints can be used ({reasons}); give "
            f"folders that a Trainer saved, or (step, state dict) pairs and their model"
        )
    return done


def _filled_in_turn(
    found: Iterable[_Checkpoint], model: nn.Module | None, done: Replayed
) -> Iterator[tuple[_Checkpoint, nn.Module]]:
    """Each checkpoint that can be used, and the model with its weights; says why the others cannot."""
    last = -1
    for checkpoint in found:
        known = replace(checkpoint, state=None)
        try:
            if known.step <= last:
                raise HeadscopeError(
                    f"its step {known.step} is not after {last}, which came before it; give each step once, in order"
                )
            model = _loaded(checkpoint, model)
        except (Missing, NotSupported):
            raise
        except Exception as problem:
            done.skipped[known.name] = _reason(problem)
            continue
        finally:
            # So that the next one is not read while this one is still held.
            del checkpoint
        last = known.step
        yield known, model


class _Replay(Watch):
    """A watch without training: nothing is left out to spare anyone's time, and what fails is an error."""

    def __enter__(self) -> _Replay:
        super().__enter__()
        if self._writer is not None:
            self._writer.patience_s = math.inf
        return self

    def log_history(self, rows: Iterable[Json]) -> None:
        """Puts a Trainer's `log_history` on the time line, each row at its own step."""
        for row in rows:
            if self._writer is not None and (values := numbers(row)):
                self._writer.log(row["step"], values)

    def _name_silence(self) -> None:
        pass

    @contextmanager
    def _guarded(self, what: str, *, turn_off: bool = True) -> Iterator[None]:
        try:
            yield
        except HeadscopeError:
            raise
        except Exception as problem:
            raise HeadscopeError(f"{what} failed at step {self._step}: {_reason(problem)}") from problem


def _reason(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).strip().split("\n")]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if isinstance(problem, HeadscopeError) else f"{type(problem).__name__}: {said}"


# Which checkpoints there are.


def _ordered(
    checkpoints: str | Path | Iterable[str | Path | tuple[int, Mapping[str, Tensor]]], skipped: dict[str, str]
) -> tuple[Iterable[_Checkpoint], int | None]:
    """The checkpoints, by step where all are known, and how many were given."""
    if isinstance(checkpoints, (str, Path)):
        checkpoints = [checkpoints]
    if not isinstance(checkpoints, Sequence):
        return _taken(checkpoints, skipped), None
    spread = [part for item in checkpoints for part in (_inside(item) if isinstance(item, (str, Path)) else [item])]
    return sorted(_taken(spread, skipped), key=lambda checkpoint: checkpoint.step), len(spread)


def _inside(item: str | Path) -> list[str | Path]:
    """The checkpoints in a folder of checkpoints, or the folder itself."""
    folder = Path(item).expanduser()
    if _NAME.fullmatch(folder.name):
        return [item]
    return sorted(part for part in folder.glob("checkpoint-*") if _NAME.fullmatch(part.name)) or [item]


def _taken(items: Iterable[Any], skipped: dict[str, str]) -> Iterator[_Checkpoint]:
    for item in items:
        if isinstance(item, (str, Path)):
            try:
                yield _of_folder(Path(item).expanduser())
            except (HeadscopeError, OSError, ValueError) as problem:
                skipped[str(item)] = _reason(problem)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping) and type(item[0]) is int:
            yield _Checkpoint(f"step {item[0]}", item[0], state=item[1])
        else:
            raise HeadscopeError(
                f"a checkpoint is {_said(item)}; give a folder that a Trainer saved, or a pair of an optimiser step "
                f"and a state dict"
            )
        del item


def _said(item: Any) -> str:
    if isinstance(item, tuple):
        return f"a tuple of ({', '.join(type(part).__name__ for part in item[:4])})"
    return f"of type {type(item).__name__}"


def _of_folder(folder: Path) -> _Checkpoint:
    if not folder.is_dir():
        raise HeadscopeError("there is no such folder")
    trainer = folder / "trainer_state.json"
    named = _NAME.fullmatch(folder.name)
    state: Json = {}
    try:
        state = json.loads(trainer.read_text()) if trainer.is_file() else {}
        step = int(state["global_step"] if "global_step" in state else named[1] if named else -1)
        history = [row for row in state.get("log_history", []) if type(row.get("step")) is int]
    except (ValueError, AttributeError, TypeError) as problem:
        raise HeadscopeError(f"its trainer_state.json cannot be read: {_reason(problem)}") from None
    if step < 0:
        raise HeadscopeError("its step is not known: it has no trainer_state.json, and is not called checkpoint-<step>")
    return _Checkpoint(str(folder), step, folder=folder, history=sorted(history, key=lambda row: int(row["step"])))


# Into the model.


def _loaded(checkpoint: _Checkpoint, model: nn.Module | None) -> nn.Module:
    """The model with a checkpoint's weights, all of them; a new one, if there is none yet."""
    if checkpoint.state is not None:
        if model is None:
            raise NotSupported(f"{checkpoint.name} is a state dict, and no model was given; pass model=")
        return _filled(model, checkpoint.state)
    assert checkpoint.folder is not None
    transformers = _transformers()
    bare = None if model is None else unwrap(model)
    if bare is not None and not isinstance(bare, transformers.PreTrainedModel):
        return _filled(bare, _state_of(checkpoint.folder))
    if not (checkpoint.folder / "config.json").is_file():
        adapter = (checkpoint.folder / "adapter_config.json").is_file()
        raise HeadscopeError(
            "it has an adapter (PEFT) and no whole model; merge it, and give (step, state dict) pairs"
            if adapter
            else "it has no config.json"
        )
    kind = type(bare) if bare is not None else _class_of(checkpoint.folder)
    with _silent(transformers.utils.logging):
        fresh, report = kind.from_pretrained(checkpoint.folder, local_files_only=True, output_loading_info=True)
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if report.get(what):
            raise HeadscopeError(
                f"it does not fit {kind.__name__}: {what.replace('_', ' ')} {shorten(sorted(map(str, report[what])))}"
            )
    if bare is None:
        whole: nn.Module = fresh
        return whole
    return _filled(bare, fresh.state_dict())


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """Within it, transformers neither draws bars nor warns of what is reported here."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _filled(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    bare = unwrap(model)
    bare.load_state_dict({_WRAPPERS.sub("", name): value for name, value in state.items()})
    return bare


def _state_of(folder: Path) -> Mapping[str, Tensor]:
    """The weights that a Trainer saved of a model that is none of transformers'."""
    from transformers.modeling_utils import load_state_dict

    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise HeadscopeError(f"it has none of {', '.join(_WEIGHTS)}")
    state: Mapping[str, Tensor] = load_state_dict(str(file))
    return state


def _class_of(folder: Path) -> Any:
    names = json.loads((folder / "config.json").read_text()).get("architectures") or []
    kind = getattr(_transformers(), names[0], None) if names else None
    if not hasattr(kind, "from_pretrained"):
        raise NotSupported(
            f"the config.json of {folder} names the architecture {names[0] if names else None!r}, which transformers "
            f"does not have; make the model and pass it as model= to headscope.replay"
        )
    return kind


def _tokenizer(checkpoint: _Checkpoint) -> Any:
    if checkpoint.folder is None or not any((checkpoint.folder / name).is_file() for name in _TOKENIZER):
        return None
    return load_tokenizer(checkpoint.folder)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer that a folder of transformers has.

    Raises:
        HeadscopeError: it has none that can be loaded.
        Missing: transformers is not installed.
    """
    try:
        return _transformers().AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Missing:
        raise
    except Exception as problem:
        raise HeadscopeError(
            f"no tokenizer can be loaded from {path}: {_reason(problem)}; give the folder of one with tokenizer="
        ) from problem


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as problem:
        if problem.name != "transformers":
            raise
        raise Missing(
            "replaying a Trainer's checkpoint folders needs transformers, which is not installed: "
            "pip install 'transformers>=4.48'; or give (step, state dict) pairs and their model"
        ) from problem
    return transformers


# The probe from a file.


def read_examples(path: str | Path) -> list[str] | list[tuple[str, int]]:
    """The texts of a file, or (text, label) pairs if it has labels.

    Args:
        path: one text per line, with a tab and a whole-number label after each or none; or, as `.jsonl`, one object per
            line with "text" and "label".

    Raises:
        HeadscopeError: it cannot be read, or a line is not like that.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise HeadscopeError(f"the probe {path} cannot be read: {_reason(problem)}") from None
    parse = _of_json if str(path).endswith(".jsonl") else _of_line
    found: list[tuple[str, int | None]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(parse(line))
        except ValueError as problem:
            raise HeadscopeError(f"line {number} of {path} is no example: {problem}") from None
        if (found[-1][1] is None) != (found[0][1] is None):
            raise HeadscopeError(
                f"line {number} of {path} has {'no' if found[0][1] is not None else 'a'} label, unlike "
                f"those before it; give all lines a label, or none"
            )
    if not found:
        raise HeadscopeError(f"the probe {path} has no line with a text")
    labelled = [(text, label) for text, label in found if label is not None]
    return labelled or [text for text, _ in found]


def _of_line(line: str) -> tuple[str, int | None]:
    text, tab, label = line.rpartition("\t")
    if not tab:
        return line, None
    if not re.fullmatch(r"\s*-?\d+\s*", label):
        raise ValueError(f"after the tab stands {label!r}; a label is a whole number")
    return text, int(label)


def _of_json(line: str) -> tuple[str, int | None]:
    found = json.loads(line)
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise ValueError('a line of .jsonl is an object with "text", and "label" if there is one')
    label = found.get("label")
    if label is not None and type(label) is not int:
        raise ValueError(f'"label" is {label!r}; a label is a whole number')
    return found["text"], label
