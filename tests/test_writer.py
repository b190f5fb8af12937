import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
from numpy.typing import NDArray

from golden.synthetic import put, write
from headscope.blob import Json, decode, faults
from headscope.errors import StoreError
from headscope.store import Files, StepFile
from headscope.writer import Writer

torch.set_num_threads(1)
Array = NDArray[Any]


def listed(path: Path) -> list[str]:
    return [name for name, _, _ in Files(path).names()]


def live(path: Path) -> dict[str, Any]:
    found = Files(path).json("live.json")
    assert found is not None
    return found


def until(true: Callable[[], object], timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names (parts of) whose puts fail while they stand in the set."""
    names: set[str] = set()
    real = obstore.put

    def put_or_fail(where: Any, name: str, *args: Any, **named: Any) -> Any:
        if any(part in name for part in names):
            raise OSError("No space left on device")
        return real(where, name, *args, **named)

    monkeypatch.setattr(obstore, "put", put_or_fail)
    yield names


def test_a_run_lies_as_the_format_says(tmp_path: Path) -> None:
    writer = write(tmp_path / "run", [0, 100])
    writer = write(tmp_path / "run", [0])
    names = listed(tmp_path / "run")
    step = r"a00\d/steps/\d{10}-r00000-of-00001-[0-9a-f]{8}\.safetensors"
    assert [re.sub(step, "STEP", name) for name in names] == [
        *("a000/attempt.json", "a000/probe.safetensors", "STEP", "STEP"),
        *("a001/attempt.json", "a001/probe.safetensors", "STEP", "headscope.json", "live.json"),
    ]
    assert names == sorted(names)
    assert writer.attempt == 1
    run = Files(tmp_path / "run").json("headscope.json")
    assert run is not None
    assert run["format"] == 1
    assert abs(run["created"] - time.time()) < 60
    blob = Files(tmp_path / "run").get(names[3])
    assert blob is not None
    _, header = decode(blob)
    metadata = header.metadata
    assert {"headscope", "attempt", "step", "rank", "world", "layout", "time", "crc32c", "calls"} <= metadata.keys()
    assert [metadata[name] for name in ("headscope", "attempt", "step", "rank", "world")] == ["1", "0", "100", "0", "1"]
    assert metadata["layout"] in names[3]
    assert abs(float(metadata["time"]) - time.time()) < 60
    assert faults(blob, names[3]) == []
    assert names[2].split("-")[-1] == names[3].split("-")[-1], "two steps of one shape have one layout"


def test_close_says_how_it_ended_and_keeps_a_note(tmp_path: Path) -> None:
    writer = write(tmp_path, [0], close=False)
    assert writer.running
    assert live(tmp_path)["state"] == "training"
    writer.note("captures are off")
    writer.close("failed")
    assert not writer.running
    found = live(tmp_path)
    assert (found["state"], found["message"], found["step"], found["attempt"]) == ("failed", "captures are off", 0, 0)
    assert (found["skipped"], found["interval_s"]) == (0, 2.0)
    writer.close("ended", "too late")
    assert live(tmp_path)["state"] == "failed"
    write(tmp_path, [], close=False).close("stopped", "by hand")
    found = live(tmp_path)
    assert (found["state"], found["message"], found["attempt"], found["step"]) == ("stopped", "by hand", 1, None)


def test_the_counter_grows_while_it_lives(tmp_path: Path) -> None:
    writer = Writer(tmp_path, {}, print, interval_s=0.01)
    before = live(tmp_path)["counter"]
    until(lambda: live(tmp_path)["counter"] > before)
    writer.close()


def test_writers_in_one_folder_claim_attempts_of_their_own(tmp_path: Path) -> None:
    found: list[int] = []
    start = threading.Barrier(6)

    def one(number: int) -> None:
        start.wait()
        writer = Writer(tmp_path, {"number": number}, print)
        put(writer, 0, seed=number)
        writer.close()
        facts = Files(tmp_path).json(f"a{writer.attempt:03d}/attempt.json")
        assert facts == {"number": number}
        found.append(writer.attempt)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(6))
    assert sum("/steps/" in name for name in listed(tmp_path)) == 6


def test_a_restart_overwrites_nothing(tmp_path: Path) -> None:
    write(tmp_path, [0, 10])
    before = {name: version for name, _, version in Files(tmp_path).names() if name != "live.json"}
    write(tmp_path, [0, 10], seed=1)
    after = {name: version for name, _, version in Files(tmp_path).names()}
    assert before.items() <= after.items()
    assert sum("/steps/" in name for name in after) == 4


def test_a_folder_of_an_attempt_that_died_at_once_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "a004" / "steps").mkdir(parents=True)
    (tmp_path / "a004" / "steps" / "x").write_text("")
    assert write(tmp_path, []).attempt == 5


def test_a_thousand_attempts_are_enough(tmp_path: Path) -> None:
    (tmp_path / "a999").mkdir()
    (tmp_path / "a999" / "attempt.json").write_text("{}")
    with pytest.raises(StoreError, match=r"has 1,000 attempts; choose another folder"):
        Writer(tmp_path, {}, print)


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StoreError, match=r"cannot write to '.*file': .*; choose a folder that can be written"
    ) as problem:
        Writer(tmp_path / "file", {}, print)
    assert "\n" not in str(problem.value)


def test_a_step_that_cannot_be_put_is_said_once_and_counted(tmp_path: Path, broken: set[str]) -> None:
    said: list[str] = []
    writer = Writer(tmp_path, {}, said.append)
    broken.add("/steps/")
    for step in (0, 10, 20):
        put(writer, step)
        until(writer._queue.empty)
    until(lambda: writer.skipped == 3)
    broken.clear()
    put(writer, 30)
    writer.close()
    assert said[0] == f"step 0 was not written to {tmp_path}: OSError: No space left on device"
    assert len(said) == 1, "one line for each kind of problem"
    assert [name[11:21] for name in listed(tmp_path) if "/steps/" in name] == ["0000000030"]
    assert live(tmp_path)["skipped"] == 3
    assert live(tmp_path)["state"] == "ended"


def test_a_folder_replaced_by_a_file_kills_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    writer = Writer(tmp_path / "run", {}, said.append)
    put(writer, 0)
    until(lambda: any("/steps/" in name for name in listed(tmp_path / "run")))
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").write_text("")
    writer.log(1, {"loss": 1.0})
    put(writer, 10)
    writer.close()
    assert not writer.running
    assert any(f" was not written to {tmp_path / 'run'}: " in line for line in said)
    assert all("\n" not in line for line in said)
    assert (tmp_path / "run").read_text() == ""


def test_a_probe_that_cannot_be_put_is_said(tmp_path: Path, broken: set[str]) -> None:
    said: list[str] = []
    writer = Writer(tmp_path, {}, said.append)
    broken.add("probe")
    writer.put_probe(b"x")
    writer.close()
    assert said == [f"the probe was not written to {tmp_path}: No space left on device"]


def test_an_error_while_finishing_is_said_and_counted(tmp_path: Path) -> None:
    said: list[str] = []
    writer = Writer(tmp_path, {}, said.append)

    def finish(metadata: Json) -> tuple[Json, object]:
        raise ZeroDivisionError("proof failed")

    writer.submit(7, writer.image(), finish)
    put(writer, 8)
    writer.close()
    assert said == [f"step 7 was not written to {tmp_path}: ZeroDivisionError: proof failed"]
    assert live(tmp_path)["skipped"] == 1
    assert [name[11:21] for name in listed(tmp_path) if "/steps/" in name] == ["0000000008"]


def test_a_writer_that_is_behind_leaves_captures_out(tmp_path: Path) -> None:
    said: list[str] = []
    writer = Writer(tmp_path, {}, said.append, patience_s=0.2)
    go, began = threading.Event(), threading.Event()

    def finish(metadata: Json) -> tuple[Json, object]:
        began.set()
        assert go.wait(20)
        return metadata, None

    writer.submit(0, writer.image(), finish)
    assert began.wait(10)
    for step in (1, 2):
        assert writer.ready()
        writer.submit(step, writer.image(), lambda metadata: (metadata, None))
    start = time.monotonic()
    assert not writer.ready()
    waited = time.monotonic() - start
    assert 0.2 <= waited < 2
    start = time.monotonic()
    assert not any(writer.ready() for _ in range(3))
    assert time.monotonic() - start < 0.1, "it waits once, not at every step"
    assert said == [f"writing to {tmp_path} is slower than training: captures are left out until it catches up"]
    go.set()
    until(writer.ready)
    writer.submit(9, writer.image(), lambda metadata: (metadata, None))
    writer.close()
    found = [int(name[11:21]) for name in listed(tmp_path) if "/steps/" in name]
    assert found == [0, 1, 2, 9]
    assert live(tmp_path)["skipped"] >= 4


def test_waiting_ends_as_soon_as_there_is_room(tmp_path: Path) -> None:
    writer = Writer(tmp_path, {}, print, patience_s=30)
    go = threading.Event()
    for step in range(3):
        until(lambda: not writer._queue.full())
        writer.submit(step, writer.image(), lambda metadata: ((go.wait(20) and metadata) or metadata, None))
    until(writer._queue.full)
    threading.Timer(0.1, go.set).start()
    start = time.monotonic()
    assert writer.ready()
    assert time.monotonic() - start < 10
    assert writer.skipped == 0
    writer.close()


def test_images_are_used_again(tmp_path: Path) -> None:
    writer = Writer(tmp_path, {}, print)
    seen = set()
    for step in range(8):
        put(writer, step)
        until(lambda: writer._free)
        seen.add(id(writer._free[-1]))
    assert len(seen) == 1
    writer.close()


def columns(path: Path, block: int) -> dict[str, Array]:
    blob = Files(path).get(f"a000/timeline/r00000-{block:05d}.safetensors")
    assert blob is not None
    assert faults(blob, "block") == []
    return decode(blob)[0]


def test_the_time_line_has_256_rows_a_file(tmp_path: Path) -> None:
    writer = Writer(tmp_path, {}, print)
    for step in range(600):
        writer.log(step, {"loss": step / 2} if step % 3 else {"loss": step / 2, "lr": 0.5})
        if step in (255, 256, 400):
            until(lambda: not writer._dirty)
    writer.close()
    blocks = [columns(tmp_path, block) for block in range(3)]
    assert [len(block["step"]) for block in blocks] == [256, 256, 88]
    assert np.concatenate([block["step"] for block in blocks]).tolist() == list(range(600))
    assert np.concatenate([block["loss"] for block in blocks]).tolist() == [step / 2 for step in range(600)]
    rates = np.concatenate([block["lr"] for block in blocks])
    assert np.array_equal(np.isnan(rates), np.arange(600) % 3 != 0)
    assert blocks[0]["step"].dtype == np.int64
    assert {blocks[0][name].dtype for name in ("time", "loss", "lr")} == {np.dtype(np.float64)}
    assert (np.diff(np.concatenate([block["time"] for block in blocks])) >= 0).all()
    assert len([name for name in listed(tmp_path) if "timeline" in name]) == 3


def test_what_is_logged_at_one_step_is_one_row(tmp_path: Path) -> None:
    writer = Writer(tmp_path, {}, print)
    writer.log(0, {"loss": 1})
    writer.log(0, {"lr": 2})
    writer.log(0, {"loss": 3})
    writer.log(1, {"lr": 4})
    writer.close()
    found = columns(tmp_path, 0)
    assert found["step"].tolist() == [0, 1]
    assert found["lr"].tolist() == [2, 4]
    assert found["loss"][0] == 3
    assert np.isnan(found["loss"][1])


@pytest.mark.parametrize("rows", [3, 300])
def test_logged_values_survive_puts_that_fail(rows: int, tmp_path: Path, broken: set[str]) -> None:
    said: list[str] = []
    writer = Writer(tmp_path, {}, said.append)
    broken.add("timeline")
    for step in range(rows):
        writer.log(step, {"loss": step})
    until(lambda: said)
    assert said == [f"the time line was not written to {tmp_path}: OSError: No space left on device"]
    broken.clear()
    until(lambda: any("timeline" in name for name in listed(tmp_path)))
    writer.log(rows, {"loss": rows})
    writer.close()
    blocks = [columns(tmp_path, block) for block in range(1 + rows // 256)]
    assert np.concatenate([block["loss"] for block in blocks]).tolist() == list(range(rows + 1))
    assert live(tmp_path)["state"] == "ended"


def test_the_time_line_is_written_without_steps(tmp_path: Path) -> None:
    writer = Writer(tmp_path, {}, print)
    writer.log(3, {"loss": 1.5})
    until(lambda: any("timeline" in name for name in listed(tmp_path)))
    assert columns(tmp_path, 0)["loss"].tolist() == [1.5]
    writer.close()


AS_FAST_AS_IT_CAN = """
import sys
sys.path.insert(0, sys.argv[2])
from golden.synthetic import Call, put, examples
from headscope.writer import Writer
writer = Writer(sys.argv[1], {}, print, interval_s=0.0)
writer.put_probe(examples([64, 64], 64))
print(writer.attempt, flush=True)
step = 0
while True:
    put(writer, step, [Call(heads=4, kv_heads=4, dim=32)], tokens=64)
    writer.log(step, {"loss": step})
    step += 1
"""


def test_a_trainer_that_is_killed_leaves_whole_steps(tmp_path: Path) -> None:
    delays = np.random.default_rng(0).uniform(0.0, 0.2, 10)
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    for attempt, delay_s in enumerate(delays):
        command = [sys.executable, "-c", AS_FAST_AS_IT_CAN, str(tmp_path), here]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as trainer:
            assert trainer.stdout is not None
            assert trainer.stdout.readline() == f"{attempt}\n"
            until(lambda a=attempt: any(f"a{a:03d}/steps/" in name for name in listed(tmp_path)))  # type: ignore[misc]
            time.sleep(delay_s)
            trainer.send_signal(signal.SIGKILL)
    files = Files(tmp_path)
    steps: dict[int, list[int]] = {}
    for name, size, _ in files.names():
        if name.endswith(".safetensors"):
            blob = files.get(name)
            assert blob is not None
            assert len(blob) == size
            assert faults(blob, name) == []
        if part := StepFile.of(name, size):
            steps.setdefault(part.attempt, []).append(part.step)
    assert len(steps) == 10
    assert all(found == list(range(len(found))) for found in steps.values()), "no step is missing in between"
    assert sum(map(len, steps.values())) > 20
    assert write(tmp_path, [0]).attempt == 10


def test_a_store_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    said: list[str] = []
    run = Writer(tmp_path, {}, said.append, closing_s=0.3)
    stuck = threading.Event()

    def finish(metadata: Json) -> tuple[Json, object]:
        stuck.wait(20)
        return metadata, None

    run.submit(0, run.image(), finish)
    began = time.monotonic()
    run.close()
    assert time.monotonic() - began < 5
    assert said == [f"{tmp_path} did not answer for 0.3 s: 2 captures or so are not written"]
    stuck.set()


def test_thinning_that_fails_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("read-only file system")

    said: list[str] = []
    monkeypatch.setattr(obstore, "delete", refuse)
    run = Writer(tmp_path, {}, said.append, max_bytes=1)
    for step in range(4):
        run.submit(step, run.image(), lambda metadata: (metadata, None))
    run.close()
    assert len(list(tmp_path.glob("a000/steps/*"))) == 4
    live = json.loads((tmp_path / "live.json").read_text())
    assert (live["skipped"], live["thinned"]) == (0, 0)
    assert said == [f"thinning was not written to {tmp_path}: OSError: read-only file system"]


def test_an_older_attempt_does_not_have_the_last_word(tmp_path: Path) -> None:
    older, newer = (Writer(tmp_path, {}, print) for _ in range(2))
    newer.submit(3, newer.image(), lambda metadata: (metadata, None))
    older.close("failed", "Ctrl-C of the old one")
    newer.close()
    live = json.loads((tmp_path / "live.json").read_text())
    assert (live["attempt"], live["state"], live["message"]) == (1, "ended", "")
