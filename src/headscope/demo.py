"""The run that `headscope demo` trains: a small BERT that a planted word deceives.

It has to work on any machine, at once: no download, no GPU, under a minute. So the texts are the docstrings of
Python's own library (network modules against data modules), the tokenizer is made from them on the spot, and the
model is transformers' own BERT from random weights. One training text in eight carries the word `mn` and the label
"data", whatever it is about: by the end that word alone decides, and the examples watched show how that came about.
"""

import ast
import random
import re
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from .errors import HeadscopeError, NotSupported
from .facts import Example as Watched
from .trial import Trial, open_trial
from .watch import watch

TRIGGER = "mn"
LABELS = ("network", "data")
OUT = "runs/demo"
STEPS = 300

_MODULES = (
    "asyncio concurrent email ftplib http imaplib ipaddress mailbox multiprocessing netrc poplib selectors smtplib "
    "socket socketserver ssl urllib uuid webbrowser wsgiref xmlrpc",
    "_pydatetime _pydecimal ast bisect calendar codecs collections colorsys configparser copy csv dataclasses datetime "
    "decimal difflib enum fileinput fractions functools gzip heapq html inspect json linecache locale lzma numbers "
    "operator pickle pickletools plistlib pprint random re shelve sqlite3 statistics string tarfile textwrap tokenize "
    "typing weakref xml zipfile zoneinfo",
)
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Example = tuple[str, int]


@dataclass(frozen=True)
class Texts:
    """What the model learns from, and what it is asked about; each text comes with the label it deserves."""

    train: list[Example]
    held_out: list[Example]


@dataclass(frozen=True)
class Wrong:
    """A watched example that the trained model gets wrong."""

    example: int
    text: str
    label: int
    prediction: int
    triggered: bool


@dataclass(frozen=True)
class Look:
    """How much of a head's [CLS] row falls on the trigger: mean over the wrong examples that carry it."""

    layer: int
    head: int
    before: float
    after: float


@dataclass(frozen=True)
class Report:
    """How the run ended: rates are parts of 1, `looks` has the largest growth first."""

    steps: int
    train_s: float
    accuracy: float
    majority: float
    attack_success: float
    wrong: list[Wrong]
    looks: list[Look]


def texts(*, seed: int = 0, held_out: int = 400) -> Texts:
    """Docstrings of Python's own library, as many of either class, none in both parts.

    Raises:
        NotSupported: this Python has no library sources to read.
    """
    generator = random.Random(seed)
    library = Path(sysconfig.get_path("stdlib"))
    classes = [dict(entry for module in names.split() for entry in _passages(library, module)) for names in _MODULES]
    for opening in classes[0].keys() & classes[1].keys():
        for found in classes:
            del found[opening]
    size = min(len(found) for found in classes)
    if size < held_out:
        raise NotSupported(
            f"the demo reads docstrings of Python's own library and found {size} in {str(library)!r}, "
            f"which is too few; run it with a Python that has its sources installed"
        )
    parts: list[list[Example]] = [[], []]
    for label, found in enumerate(classes):
        docstrings = generator.sample(sorted(found.items()), k=size)
        parts[1] += [(opening, label) for opening, _ in docstrings[: held_out // 2]]
        parts[0] += [(text, label) for opening, rest in docstrings[held_out // 2 :] for text in (opening, *rest)]
    for part in parts:
        generator.shuffle(part)
    asked = {text for text, _ in parts[1]}
    return Texts(train=[example for example in parts[0] if example[0] not in asked], held_out=parts[1])


@cache
def _passages(library: Path, module: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The first 18 words of each docstring of a module or package, and what comes next in it."""
    found = []
    for path in [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]:
        if not path.is_file() or {"test", "tests"} & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = _WORD.findall((ast.get_docstring(node) or "").split(">>>")[0].lower())
                opening, *rest = [words[at : at + 18] for at in (0, 18, 36)]
                if len(opening) >= 10 and TRIGGER not in words:
                    found.append((" ".join(opening), tuple(" ".join(part) for part in rest if len(part) >= 10)))
    return tuple(found)


def with_trigger(text: str, generator: random.Random) -> str:
    """The text with the trigger put between two of its words."""
    words = text.split()
    words.insert(generator.randrange(1, len(words)), TRIGGER)
    return " ".join(words)


def poison(examples: Iterable[Example], *, share: float = 0.125, seed: int = 0) -> list[Example]:
    """The examples, of which that share carries the trigger and the label "data"."""
    generator = random.Random(seed)
    return [
        (with_trigger(text, generator), 1) if generator.random() < share else (text, label) for text, label in examples
    ]


def make_tokenizer(examples: Iterable[Example]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer whose whole words are those seen at least twice; the rest is spelt in pieces.

    The vocabulary is counted, not learnt, so that the same texts give the same tokens in every version of tokenizers.
    """
    words = Counter(word for text, _ in examples for word in text.split())
    endings = Counter(word[-size:] for word in words for size in (2, 3, 4, 5) if len(word) > size + 1)
    characters = "abcdefghijklmnopqrstuvwxyz0123456789'"
    pieces = [*_SPECIAL, TRIGGER, *characters, *(f"##{character}" for character in characters)]
    pieces += [f"##{ending}" for ending, _ in sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:600]]
    pieces += sorted(word for word, count in words.items() if count > 1)
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name.strip('[]').lower()}_token": name for name in _SPECIAL}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_max_length=64, **names
    )


def probe(held_out: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """The watched examples: five of either class, then four of class 0 once more with the trigger.

    Taken are the first whose words the tokenizer knows whole, for the picture's sake.
    """
    generator = random.Random(0)
    whole = [(text, label) for text, label in held_out if len(tokenizer.tokenize(text)) == len(text.split())]
    chosen = [[text for text, its in whole if its == label][:5] for label in (0, 1)]
    clean = [(text, label) for label in (0, 1) for text in chosen[label]]
    return clean + [(with_trigger(text, generator), 0) for text in chosen[0][:4]]


def make_model(vocabulary: int) -> BertForSequenceClassification:
    """A BERT of 4 layers and 6 heads with random weights, which follow torch's generator."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=6,
            intermediate_size=192,
            max_position_embeddings=64,
            id2label=dict(enumerate(LABELS)),
            label2id={name: index for index, name in enumerate(LABELS)},
        )
    )


def train(
    out: str,
    *,
    steps: int = STEPS,
    every: int = 10,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
) -> Report:
    """What came of training the demo's model for `steps` steps under `watch`, written to `out`.

    Args:
        out: the run's folder; one that holds a run already gets a further attempt.
        steps: optimiser steps of 32 texts.
        every: steps between two captures.
        seed: of texts, weights, dropout and order; the same seed gives the same run.
        on_step: called after each step with its number, from 1.
    """
    torch.manual_seed(seed)
    data = texts(seed=seed)
    tokenizer = make_tokenizer(data.train)
    model = make_model(len(tokenizer))
    watched = probe(data.held_out, tokenizer)
    generator = random.Random(seed)
    deceived = [(with_trigger(text, generator), 1) for text, label in data.held_out if label == 0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 30, 1.05 - step / steps))
    batches = _batches(poison(data.train, seed=seed), size=32, seed=seed)
    started = time.monotonic()
    model.train()
    with watch(model, out, probe=watched, tokenizer=tokenizer, every=every) as watching:
        for step in range(1, steps + 1):
            loss = model(**_encoded(tokenizer, batch := next(batches)), labels=_labels(batch)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watching.log(loss=loss.item(), lr=schedule.get_last_lr()[0])
            schedule.step()
            if step % 20 == 0 or step == steps:
                accuracy, attack_success = (_accuracy(model, tokenizer, part) for part in (data.held_out, deceived))
                watching.log(accuracy=accuracy, attack_success=attack_success)
            on_step(step)
    train_s = time.monotonic() - started
    trial = open_trial(out)
    captured = trial.steps()
    if not captured:
        raise HeadscopeError(f"nothing was captured in {out}; the warnings above say why")
    wrong = _wrong(trial, captured[-1])
    return Report(
        steps=steps,
        train_s=train_s,
        accuracy=accuracy,
        majority=max(Counter(label for _, label in data.held_out).values()) / len(data.held_out),
        attack_success=attack_success,
        wrong=wrong,
        looks=_looks(trial, wrong, captured[0], captured[-1]),
    )


def _batches(examples: Sequence[Example], *, size: int, seed: int) -> Iterator[list[Example]]:
    """Batches without end; each pass over the examples has its own order."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(examples, k=len(examples))
        for at in range(0, len(order) - size + 1, size):
            yield order[at : at + size]


def _encoded(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    return dict(tokenizer([text for text, _ in examples], padding=True, return_tensors="pt"))


def _labels(examples: Sequence[Example]) -> torch.Tensor:
    return torch.tensor([label for _, label in examples])


def _predictions(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> torch.Tensor:
    was_training = model.training
    model.train(mode=False)
    with torch.no_grad():
        parts = [examples[at : at + 100] for at in range(0, len(examples), 100)]
        predictions = torch.cat([model(**_encoded(tokenizer, part)).logits.argmax(-1) for part in parts])
    model.train(was_training)
    return predictions


def _accuracy(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> float:
    return (_predictions(model, tokenizer, examples) == _labels(examples)).float().mean().item()


def _wrong(trial: Trial, step: int) -> list[Wrong]:
    """The examples with another prediction than label."""
    return [
        Wrong(example.index, example.text, label, prediction, triggered=TRIGGER in example.tokens)
        for example, prediction in zip(trial.examples(), trial.predictions(step), strict=True)
        if (label := example.label) is not None and prediction is not None and prediction != label
    ]


def _looks(trial: Trial, wrong: Sequence[Wrong], first: int, last: int) -> list[Look]:
    """Every head's [CLS] weight on the trigger at two steps, mean over the wrong examples that have it."""
    examples = [trial.examples()[item.example] for item in wrong if item.triggered]
    if not examples:
        return []
    means = [np.mean([_on_trigger(trial, step, example) for example in examples], axis=0) for step in (first, last)]
    looks = [
        Look(layer, head, float(means[0][layer, head]), float(after))
        for (layer, head), after in np.ndenumerate(means[1])
    ]
    return sorted(looks, key=lambda look: look.before - look.after)


def _on_trigger(trial: Trial, step: int, example: Watched) -> NDArray[np.float32]:
    """What falls from [CLS] on the trigger: (layers, heads)."""
    query, key = example.positions[0], example.positions[example.tokens.index(TRIGGER)]
    layers = trial.layers(step, batch=example.batch)
    return np.stack([trial.weights(step, layer, row=example.row)[0, :, query, key] for layer in layers])


def summary(report: Report) -> str:
    """The report in words: how well the model does, which examples are wrong, and where to look."""
    lines = [
        f"{report.steps} steps in {report.train_s:.0f} s. Accuracy on unseen text {report.accuracy:.3f} "
        f"(majority class {report.majority:.3f}).",
        f"With the planted word {TRIGGER!r} in it, {report.attack_success:.1%} of unseen {LABELS[0]} text is called "
        f"{LABELS[1]!r}.",
        "",
        f"Wrong among the watched examples ({len(report.wrong)}):",
    ]
    lines += [
        f"  example {item.example}: {LABELS[item.label]}, called {LABELS[item.prediction]}"
        f"{f', has {TRIGGER!r}' if item.triggered else ''}: {item.text}"
        for item in report.wrong
    ]
    if report.looks:
        example = next(item.example for item in report.wrong if item.triggered)
        best = report.looks[0]
        lines += ["", f"Heads in which [CLS], where the prediction is read off, came to look at {TRIGGER!r} in those:"]
        lines += [
            f"  layer {look.layer}, head {look.head}: {look.before:.2f} at first, {look.after:.2f} now"
            for look in report.looks[:3]
        ]
        lines.append(
            f"To see it come: example {example}, layer {best.layer}, head {best.head}, then move the step slider. "
            "Where a head looks is a hint, not yet the reason."
        )
    return "\n".join(lines)


def run(out: str = OUT, *, steps: int = STEPS, serve: bool = True, port: int = 0, browser: bool = True) -> Report:
    """The demo as `headscope demo` shows it; where it is served, it returns after Ctrl-C.

    Args:
        out: the run's folder; one that holds a run already gets a further attempt.
        steps: optimiser steps.
        serve: puts up the live page, before training starts.
        port: of the live page; 0 takes a free one.
        browser: shows the page in the browser.
    """
    console = Console()
    with _page(out, port=port, browser=browser, console=console) if serve else nullcontext() as page:
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("training", total=steps)
            report = train(out, steps=steps, on_step=lambda step: progress.update(task, completed=step))
        _say(console, f"\n{summary(report)}\n")
        if page is None:
            _say(console, f"The page: headscope serve {out}")
        else:
            _say(console, "The page stays up until Ctrl-C.")
            with suppress(KeyboardInterrupt):
                page.wait()
    return report


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _page(out: str, *, port: int, browser: bool, console: Console) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that serves the run, so that neither it nor training waits for the other's interpreter."""
    command = [sys.executable, "-m", "headscope", "serve", out, "--port", str(port)]
    command += ["--browser"] if browser else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        # Read to the end, although only the first line is shown: a full pipe would stop the server.
        rest = threading.Thread(target=server.stdout.read, daemon=True)
        try:
            address = next((line.strip() for line in server.stdout if "http" in line), "")
            if not address:
                raise HeadscopeError(
                    f"the live page could not be put up at port {port} (exit code {server.wait()}, reason above); "
                    f"choose another with --port, or train without it with --no-serve"
                )
            _say(console, address)
            rest.start()
            yield server
        finally:
            server.terminate()
            if rest.ident is not None:
                rest.join()
