"""Faults that happen to people, by real means: training goes on or ends as it would, what was visible stays whole."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
from torch import Tensor, nn

import models
from headscope import open_trial, watch
from headscope.audit import audit
from headscope.capture import Probe
from headscope.errors import HeadscopeError, HeadscopeWarning, StoreError
from headscope.store import Files, StepFile
from headscope.writer import Writer
from test_watch import Tokenizer, batch, heard, plain_loop, probe
from test_watch import train as train_bert
from trainers import Trainers, until

torch.set_num_threads(1)
module: Any = import_module("headscope.watch")


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    started = Trainers()
    yield started
    started.close()


def whole(path: Path, faults: int = 0) -> list[int]:
    """The steps of a run in which nothing is damaged."""
    assert len(audit(path).faults) == faults, audit(path).faults
    return open_trial(path).steps()


def said(errors: str) -> list[str]:
    return [line.split("HeadscopeWarning: ")[1] for line in errors.splitlines() if "HeadscopeWarning: " in line]


# Disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}; test_a_file_that_may_not_grow goes on")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    model = models.Plain()
    before = model.head.weight.detach().clone()

    def do(path: Path) -> None:
        with watch(model, path, probe=batch(0, 4)["input_ids"], every=1, dtype="float32") as watched:
            plain_loop(model, steps=12)
            watched.log(loss=1.0)

    warned = heard(small_disk / "run", do)
    assert len(warned) == 1, "one line, whatever the disk was too full for"
    assert re.fullmatch(r"step \d+ was not written to .*: No space left on device \(os error 28\)", warned[0])
    assert not torch.equal(model.head.weight, before)
    steps = whole(small_disk / "run")
    assert steps[0] == 0
    assert 2 < len(steps) < 12
    left = [path.name for path in small_disk.rglob("*#*")]
    assert left == [], "what does not fit is taken away again"


def test_a_disk_that_has_room_again_is_written_again(small_disk: Path) -> None:
    model = models.Plain()
    (small_disk / "ballast").write_bytes(bytes(100_000))
    with pytest.warns(HeadscopeWarning, match="No space left"), watch(model, small_disk / "run", every=1) as watched:
        plain_loop(model, steps=6)
        assert watched._writer is not None
        until(watched._writer._queue.empty)
        (small_disk / "ballast").unlink()
        for step in (7, 8):
            watched.step(step)
    steps = whole(small_disk / "run")
    assert steps[-1] == 8
    assert len(steps) < 9
    state = open_trial(small_disk / "run").state()
    assert (state.state, state.skipped) == ("ended", 9 - len(steps))


def test_a_disk_that_turns_read_only(small_disk: Path) -> None:
    model = models.Plain()

    def do(path: Path) -> None:
        with watch(model, path, probe=batch(0, 2)["input_ids"], every=1) as watched:
            plain_loop(model, steps=2)
            open_trial(path).wait(2, timeout=20)
            subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
            plain_loop(model, steps=3)
            watched.log(loss=1.0)

    warned = heard(small_disk / "run", do)
    assert len(warned) == 1
    assert re.search(r"was not written to .*: Read-only file system \(os error 30\)$", warned[0])
    assert whole(small_disk / "run") == [0, 1, 2]
    assert open_trial(small_disk / "run").state().state == "training", "nothing could be written any more"


def test_a_disk_that_is_full_at_the_start_is_said_before_training(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(160 * 1024))
    with pytest.raises(StoreError, match=r"cannot write to .*; choose a folder that can be written"):
        watch(models.Plain(), small_disk / "run").__enter__()


@pytest.fixture
def everyones() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        yield Path(place)


def test_a_file_that_may_not_grow(trainers: Trainers, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = trainers.start("limited", out, kilobytes=8, steps=4)
    assert trainer.wait() == 0
    assert Path(f"{out}.done").exists()
    assert re.fullmatch(r"step 0 was not written to .*: File too large \(os error 27\)", said(trainer.errors)[0])
    assert len(said(trainer.errors)) == 1
    assert whole(out) == []
    state = open_trial(out).state()
    assert (state.state, state.skipped) == ("ended", 5)


def test_a_folder_that_may_not_be_written_any_more(trainers: Trainers, everyones: Path) -> None:
    if os.getuid():
        pytest.skip("only root can start a process as nobody")
    out = everyones / "run"
    Path(f"{out}.err").touch()
    trainer = trainers.start("as_nobody", out, steps=200, pause_s=0.02)
    until(lambda: Path(f"{out}.step").exists() and len(open_trial(out).steps()) > 2)
    for folder in sorted(out.rglob("*")):
        if folder.is_dir():
            folder.chmod(0o555)
    out.chmod(0o555)
    until(lambda: said(trainer.errors))
    step = Path(f"{out}.step")
    before = step.stat().st_mtime_ns
    until(lambda: step.stat().st_mtime_ns > before + 100_000_000)
    trainer.kill(signal.SIGTERM)
    assert trainer.wait() == -signal.SIGTERM
    assert len(said(trainer.errors)) == 1
    assert re.search(r"was not written to .*: Permission denied \(os error 13\)", said(trainer.errors)[0])
    assert len(whole(out)) > 2


def test_a_writer_slower_than_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = obstore.put

    def slow(where: Any, name: str, *args: Any, **named: Any) -> Any:
        if "/steps/" in name:
            time.sleep(0.4)
        return real(where, name, *args, **named)

    monkeypatch.setattr(obstore, "put", slow)
    monkeypatch.setattr(module, "Writer", partial(Writer, patience_s=0.1))
    model = models.Plain()
    warned = heard(tmp_path, lambda path: trained(model, path, 12))
    assert warned == [f"writing to {tmp_path} is slower than training: captures are left out until it catches up"]
    steps = whole(tmp_path)
    assert steps[0] == 0
    assert len(steps) < 10
    assert open_trial(tmp_path).state().skipped >= 13 - len(steps) - 1


def test_a_disk_that_does_not_answer_keeps_nobody_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, go = obstore.put, threading.Event()

    def stuck(where: Any, name: str, *args: Any, **named: Any) -> Any:
        if "/steps/" in name:
            go.wait(30)
        return real(where, name, *args, **named)

    monkeypatch.setattr(obstore, "put", stuck)
    monkeypatch.setattr(module, "Writer", partial(Writer, patience_s=0.1, closing_s=0.3))
    began = time.monotonic()
    warned = heard(tmp_path, lambda path: trained(models.Plain(), path, 5))
    assert time.monotonic() - began < 10
    assert warned[-1].startswith(f"{tmp_path} did not answer for 0.3 s: 3 captures or so are not written")
    go.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "headscope-writer"])
    assert whole(tmp_path)[0] == 0


def test_a_panic_in_obstore_does_not_end_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    real = obstore.put

    def panics(where: Any, name: str, *args: Any, **named: Any) -> Any:
        if "0000000001" in name:
            raise PanicException("index out of bounds")
        return real(where, name, *args, **named)

    monkeypatch.setattr(obstore, "put", panics)
    warned = heard(tmp_path, lambda path: trained(models.Plain(), path, 2))
    assert warned == [f"step 1 was not written to {tmp_path}: PanicException: index out of bounds"]
    assert whole(tmp_path) == [0, 2]


# Our own mistakes.


def trained(model: nn.Module, path: Path | None, steps: int = 3) -> None:
    if path is None:
        return plain_loop(model, steps)
    with watch(model, path, probe=batch(0)["input_ids"], every=1) as watched:
        plain_loop(model, steps)
        watched.log(loss=1.0)


@pytest.mark.parametrize(
    ("owner", "name", "text"),
    [
        (module.Watch, "_note_autocast", "the probe failed at step 0"),
        (module.Watch, "_advance", "the optimiser failed at step 0"),
        (module.Watch, "_against", "the capture failed at step 0"),
        (module.Watch, "_name_refused", "the capture failed at step 0"),
        (module, "run", "the capture failed at step 0"),
        (Probe, "blob", "the probe failed at step 0"),
        (module, "_skipped", "the optimiser failed at step 0"),
        (Writer, "ready", "the capture failed at step 0"),
        (Writer, "image", "the capture failed at step 0"),
        (Writer, "submit", "the capture failed at step 0"),
        (Writer, "log", "the time line failed at step 3"),
        (Writer, "note", "NO ATTENTION"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_error_of_ours_stays_with_us(
    owner: Any, name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **named: Any) -> Any:
        raise RuntimeError("a mistake\nof ours")

    alone = models.Plain()
    trained(alone, None)
    monkeypatch.setattr(owner, name, broken)
    model = models.Plain()
    warned = heard(tmp_path, lambda path: trained(model, path))
    if name != "note":
        assert warned[0].startswith(f"{text}: RuntimeError: a mistake")
        assert sum("a mistake" in line for line in warned) == 1
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True))
    assert not model._forward_pre_hooks
    assert open_trial(tmp_path).state().state == "ended"
    whole(tmp_path)


def test_a_probe_for_which_there_is_no_memory(trainers: Trainers, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = trainers.start("without_memory", out)
    assert trainer.wait() == 0
    (line,) = said(trainer.errors)
    assert re.match(r"the capture failed at step 0: RuntimeError: .*can't allocate memory", line)
    assert line.endswith(
        "training goes on, captures are off (examples= and tokens= of headscope.watch make them smaller)"
    )
    assert Path(f"{out}.step").read_text() == "3"
    assert whole(out) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_says_what_helps(error: type[Exception], tmp_path: Path) -> None:
    class Large(models.Plain):
        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            if not self.training:
                raise error("tried to allocate 80 GiB")
            return super().forward(ids, mask)

    warned = heard(tmp_path, lambda path: trained(Large(), path))
    assert warned == [
        f"the capture failed at step 0: {error.__name__}: tried to allocate 80 GiB; training goes on, captures are off "
        f"(examples= and tokens= of headscope.watch make them smaller)"
    ]


class FailingTokenizer(Tokenizer):
    def __call__(self, text: str, **named: Any) -> dict[str, list[int]]:
        if "bb" in text:
            raise KeyError("bb")
        return super().__call__(text, **named)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        raise IndexError("piece id is out of range")


def test_a_tokenizer_that_fails_on_the_probes_texts_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        HeadscopeError,
        match="the tokenizer FailingTokenizer failed on the probe's text 'a bb': KeyError: 'bb'; pass another, or "
        "batches that are tokenised already",
    ):
        watch(models.bert(), tmp_path, probe=["a", "a bb"], tokenizer=FailingTokenizer())


@pytest.mark.parametrize("given", [True, False])
def test_a_tokenizer_that_cannot_name_tokens_leaves_numbers(given: bool, tmp_path: Path) -> None:
    def do(path: Path) -> None:
        model = models.bert()
        with watch(model, path, probe=probe() if given else None, tokenizer=FailingTokenizer(), every=1):
            train_bert(model, 1)

    text = "the tokenizer FailingTokenizer failed, so tokens are numbers: IndexError: piece id is out of range"
    assert heard(tmp_path, do) == [text]
    assert whole(tmp_path) == [0, 1]
    assert open_trial(tmp_path).examples()[0].tokens[0].isdecimal()


def test_warnings_that_are_errors(trainers: Trainers, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = trainers.start("strict", out)
    assert trainer.wait() == 0
    assert said(trainer.errors) == [
        "the capture failed at step 0: UserWarning: slow in eval; training goes on, captures are off"
    ]
    assert Path(f"{out}.step").read_text() == "3"
    assert whole(out) == []


def test_a_warning_filter_that_raises_and_no_standard_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*args: Any, **named: Any) -> None:
        raise RuntimeError("no console")

    class Closed:
        def write(self, text: str) -> int:
            raise ValueError("I/O operation on closed file")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", shown)
        monkeypatch.setattr("sys.stderr", Closed())
        with watch(nn.Linear(2, 2), tmp_path):
            pass
    assert "nothing was watched" in open_trial(tmp_path).state().message


# Ends.


@pytest.mark.parametrize(
    ("then", "code", "state", "message"),
    [
        ("", 0, "ended", ""),
        ("exit 0", 0, "ended", ""),
        ("exit 3", 3, "stopped", "SystemExit at step 3"),
        ("raise", 1, "failed", "ValueError at step 3: no data"),
        ("_exit", 7, "training", ""),
        ("fork", 0, "ended", ""),
    ],
)
def test_an_end_is_as_it_would_be(
    then: str, code: int, state: str, message: str, trainers: Trainers, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    trainer = trainers.start("train", out, then=then)
    assert trainer.wait() == code
    found = open_trial(out).state()
    assert (found.state, found.message) == (state, message)
    steps = whole(out)
    assert steps == [0, 1, 2, 3] or then == "_exit"
    errors = trainer.errors
    if then == "raise":
        assert errors.startswith("Traceback (most recent call last):")
        assert errors.endswith("ValueError: no data\nat all\n")
        assert "src/headscope" not in errors
    else:
        assert errors == ""


def test_ctrl_c_while_training(trainers: Trainers, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = trainers.start("train", out, steps=10_000, pause_s=0.01)
    until(lambda: Path(f"{out}.step").exists())
    trainer.kill(signal.SIGINT)
    assert trainer.wait() == -signal.SIGINT
    assert trainer.errors.endswith("KeyboardInterrupt\n")
    assert Path(f"{out}.state").read_text() == "True 0"
    state = open_trial(out).state()
    assert state.state == "stopped"
    assert re.fullmatch(r"KeyboardInterrupt at step \d+", state.message)
    whole(out)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_during_a_capture_leaves_the_model_as_it_was(times: int, trainers: Trainers, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = trainers.start("train", out, then="interrupted capture", steps=10_000)
    until(lambda: Path(f"{out}.capturing").exists())
    for _ in range(times):
        time.sleep(0.05)
        trainer.kill(signal.SIGINT)
    assert trainer.wait() == -signal.SIGINT
    assert Path(f"{out}.state").read_text() == "True 0"
    steps = whole(out)
    assert open_trial(out).state().state == "stopped"
    # A first Ctrl-C waits for the capture, a second one does not.
    assert (steps[-1] == int(open_trial(out).state().message.split()[-1])) == (times == 1)


def test_sigterm_ends_it_as_ever(trainers: Trainers, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = trainers.start("train", out, steps=10_000, pause_s=0.01)
    until(lambda: Path(f"{out}.step").exists())
    trainer.kill(signal.SIGTERM)
    assert trainer.wait() == -signal.SIGTERM
    assert open_trial(out).state().state == "training"
    whole(out)


def test_an_interpreter_that_ends_without_leaving_the_watch(trainers: Trainers, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = trainers.start("daemon", out)
    # Python 3.11 unwinds a daemon thread through torch's C++, which aborts: 10 of 24 times, with a watch as without.
    assert trainer.wait() in (0, -signal.SIGABRT)
    state = open_trial(out).state()
    assert state.state == "stopped"
    assert re.fullmatch(r"the process ended at step \d+ without leaving the watch", state.message)
    whole(out)


def test_training_in_another_thread(tmp_path: Path) -> None:
    model = models.Plain()
    thread = threading.Thread(target=trained, args=(model, tmp_path))
    thread.start()
    thread.join()
    assert whole(tmp_path) == [0, 1, 2, 3]
    assert [len(open_trial(tmp_path).layers(step)) for step in range(4)] == [2] * 4


# Forks.


def test_a_forked_process_writes_nothing_into_the_run(tmp_path: Path) -> None:
    model = models.Plain().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watch(model, tmp_path, probe=batch()["input_ids"], every=1) as watched:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            code = 9
            try:
                for _ in range(5):
                    model(batch()["input_ids"]).sum().backward()
                    optimizer.step()
                    watched.log(loss=1.0)
                    watched.step()
                watched.close()
                code = 0
            finally:
                os._exit(code)
        signalled = threading.Timer(20, os.kill, (pid, signal.SIGKILL))
        signalled.start()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        signalled.cancel()
        assert open_trial(tmp_path).state().state == "training"
        plain_loop(model, 1)
    assert whole(tmp_path) == [0, 1]
    assert open_trial(tmp_path).scalars() == {}


class Rows(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return batch(index, 1)["input_ids"][0]


def test_loaders_with_workers(tmp_path: Path) -> None:
    model = models.Plain().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        with watch(model, tmp_path, every=1):
            loader: Any = torch.utils.data.DataLoader(Rows(), 4, num_workers=2, multiprocessing_context="fork")
            for ids in loader:
                model(ids).sum().backward()
                optimizer.step()
    assert whole(tmp_path) == [0, 1, 2, 3]
    assert open_trial(tmp_path).state().state == "ended"


def test_a_run_in_a_process_forked_from_a_run_is_refused(trainers: Trainers, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = trainers.start("forked", out)
    assert trainer.wait() == 1
    assert trainer.errors.endswith(
        f"headscope.errors.StoreError: '{out}-2' cannot be opened in this process: it was forked from one that had a "
        f"run open already; start it by multiprocessing's 'spawn' or 'forkserver'\n"
    )
    assert whole(out) == [0, 1, 2, 3]


# kill -9.


def staged(out: Path) -> list[Path]:
    """What a put is writing, or was when it was killed."""
    return [path for path in out.glob("a*/steps/*") if "#" in path.name]


def killed(trainers: Trainers, out: Path, moments: int, seed: int = 0) -> tuple[int, int]:
    """Kills attempts at random moments, three of four when a put has begun, until half of them were in a put.

    Returns:
        how many were killed, and how many of them within a put: its file was left half written.
    """
    random, during, attempt = np.random.default_rng(seed), 0, 0
    while attempt < moments or (2 * during < attempt and attempt < 2 * moments):
        before = set(staged(out))
        steps = out / f"a{attempt:03d}" / "steps"
        trainer = trainers.start("train", out, steps=100_000, size=64, length=512, dtype="float32")
        until(steps.exists)
        least = int(random.integers(0, 2))
        until(lambda s=steps, n=least: len(list(s.iterdir())) >= n)
        if attempt % 4:
            until(lambda b=before: set(staged(out)) - b, pause_s=0.0002)
            time.sleep(random.uniform(0, 0.002))
        else:
            time.sleep(random.uniform(0, 0.2))
        trainer.kill()
        assert trainer.wait() == -signal.SIGKILL
        attempt += 1
        during += bool(set(staged(out)) - before)
    return attempt, during


def test_training_that_is_killed_leaves_whole_steps(
    trainers: Trainers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    attempts, during = killed(trainers, out, 20)
    with capsys.disabled():
        print(f" {during} of {attempts} killed during a put ", end="")
    assert 2 * during >= attempts
    assert audit(out).faults == []
    found: dict[int, list[int]] = {}
    for name, size, _ in Files(out).names():
        if part := StepFile.of(name, size):
            found.setdefault(part.attempt, []).append(part.step)
    assert all(steps == list(range(len(steps))) for steps in found.values()), "no step is missing in between"
    young = staged(out)
    for path in young[1:]:
        os.utime(path, (time.time() - 100,) * 2)
    (out / "notes#1").write_text("the user's own")
    os.utime(out / "notes#1", (0, 0))
    trainer = trainers.start("train", out, steps=2)
    assert trainer.wait() == 0
    assert staged(out) == young[:1], "what may still be written by someone is left, as is what is not ours"
    assert (out / "notes#1").exists()
    trial = open_trial(out)
    assert (trial.attempt, trial.steps(), trial.state().state) == (attempts, [0, 1, 2], "ended")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_hundred_kills(seed: int, trainers: Trainers, tmp_path: Path) -> None:
    attempts, during = killed(trainers, tmp_path / "run", 20, seed)
    assert 2 * during >= attempts >= 20
    assert audit(tmp_path / "run").faults == []
    shutil.rmtree(tmp_path / "run")
