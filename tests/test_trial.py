import json
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from golden.synthetic import BF16, Call, examples, put, write
from headscope import attention, history, open_trial
from headscope.errors import HeadscopeWarning, NoSuchName, NoSuchStep, StoreError, TrainerGone
from headscope.facts import Check, Layer, State
from headscope.store import Files
from headscope.trial import Trial
from headscope.writer import Writer

Array = NDArray[Any]
BOTH = [Call("layer.0"), Call("layer.1", heads=4, kv_heads=2, causal=True)]


def test_what_a_run_holds(tmp_path: Path) -> None:
    write(tmp_path, [0, 10, 20], BOTH, facts={"model": "Made", "labels": ["no", "yes"]})
    run = open_trial(tmp_path)
    assert run.steps() == [0, 10, 20]
    assert run.steps("probe") == [0, 10, 20]
    assert run.steps("train") == []
    assert run.modes() == ["probe"]
    assert run.attempt == 0
    assert run.facts()["labels"] == ["no", "yes"]
    kinds = ("k", "output", "q", "v", "weights")
    assert run.tensor_names() == [f"layer.{i}.{kind}" for i in (0, 1) for kind in kinds]
    assert run.tensor_names(r"^layer\.1.*\.[qk]$") == ["layer.1.k", "layer.1.q"]
    assert run.tensor_names("weights", step=10, mode="probe") == ["layer.0.weights", "layer.1.weights"]
    assert run.tensor_names(mode="train") == []
    assert run.tensor_names("nothing") == []
    assert [layer.name for layer in run.layers(10)] == ["layer.0", "layer.1"]
    assert run.layers(10, "train") == []
    assert run.layers(10, batch=1) == []
    assert run.damaged == {}


def test_a_module_called_twice_has_two_names(tmp_path: Path) -> None:
    write(tmp_path, [0], [Call("a"), Call("a", call=1)])
    run = open_trial(tmp_path)
    assert [(layer.name, layer.path, layer.call) for layer in run.layers(0)] == [("a", "a", 0), ("a@1", "a", 1)]
    assert "a@1.weights" in run.tensor_names()
    one, two = (run.tensor(f"{name}.weights").value(0) for name in ("a", "a@1"))
    assert one.shape == two.shape
    assert np.abs(one - two).max() > 0.1


TERMS = [
    Call(),
    Call(dtype=np.float16, causal=True, scale=0.7),
    Call(dtype=BF16, heads=4, kv_heads=2),
    Call(heads=6, kv_heads=1, softcap=3.0, window=3, causal=True),
    Call(heads=4, kv_heads=4, mask=True, bias=True, sinks=True),
    Call(heads=4, kv_heads=2, mask=True, bias=True, sinks=True, causal=True, dtype=np.float16),
]
KEEP = np.array([[True] * 6, [True] * 4 + [False] * 2])


@pytest.mark.parametrize("call", TERMS, ids=lambda call: f"{np.dtype(call.dtype)}-{call.heads}-{call.kv_heads}")
def test_weights_are_those_of_attention_weights(call: Call, tmp_path: Path) -> None:
    write(tmp_path, [0, 5], [call], keep=KEEP)
    run = open_trial(tmp_path)
    q, k = (run.tensor(f"layer.0.{kind}").value(5) for kind in "qk")
    assert q.dtype == (np.float32 if call.dtype is BF16 else call.dtype)
    terms: dict[str, Any] = {name: getattr(call, name) for name in ("scale", "causal", "softcap", "window")}
    terms["mask"] = KEEP[:, None, None] if call.mask else None
    terms["bias"] = run.tensor("bias.0").value(5) if call.bias else None
    terms["sinks"] = run.tensor("layer.0.sinks").value(5) if call.sinks else None
    full = attention.weights(q.astype(np.float32), k.astype(np.float32), **terms)
    assert np.abs(full - 1 / 6).max() > 0.3, "far from uniform"
    found = run.tensor("layer.0.weights").value(5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, full, atol=1e-7)
    layer = run.layers(5)[0]
    heads = [call.heads - 1, 0, call.heads // 2]
    for row in range(2):
        np.testing.assert_allclose(run.weights(5, layer, row=row), full[row : row + 1], atol=1e-7)
        np.testing.assert_allclose(run.weights(5, layer, row=row, heads=heads), full[row : row + 1, heads], atol=1e-7)
    np.testing.assert_allclose(run.weights(5, layer, heads=heads), full[:, heads], atol=1e-7)
    some = np.array([4, 1])
    np.testing.assert_allclose(run.weights(5, layer, queries=some), full[:, :, some], atol=1e-7)
    found = run.weights(5, layer, row=1, heads=heads, queries=some)
    np.testing.assert_allclose(found, full[1:, heads][:, :, some], atol=1e-7)
    assert layer.check.passed
    assert layer.check.error is not None
    assert layer.check.error < 1e-5


def test_one_head_reads_only_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [0], [Call(heads=8, kv_heads=4, dim=4)])
    run = open_trial(tmp_path)
    layer = run.layers(0)[0]
    asked: list[tuple[int, int]] = []
    real = Files._ranges

    def ranges(files: Files, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        asked.extend(spans)
        return real(files, name, spans)

    monkeypatch.setattr(Files, "_ranges", ranges)
    run.weights(0, layer, row=1, heads=[5])
    assert sum(end - start for start, end in asked) == 2 * 6 * 4 * 4, "q and k of one head of one example"


def test_bfloat16_comes_as_float32_with_the_same_values(tmp_path: Path) -> None:
    write(tmp_path, [0], [Call(dtype=BF16)])
    found = open_trial(tmp_path).tensor("layer.0.q").value(0)
    assert found.dtype == np.float32
    assert np.array_equal(found.astype(ml_dtypes.bfloat16).astype(np.float32), found)
    assert np.abs(found).max() > 0.5


def test_a_step_that_may_come_can_be_waited_for(tmp_path: Path) -> None:
    run = Writer(tmp_path, {}, print)
    run.submit(0, run.image(), lambda metadata: (metadata, None))
    trial = open_trial(tmp_path)
    trial.wait(0, timeout=20)
    with pytest.raises(NoSuchStep, match=r"nearest 0\. trial\.wait\(step=12\) blocks until it is written\.$"):
        trial.header(12)
    run.close()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path / "run", [0, 10, 30], BOTH)
    run = open_trial(tmp_path / "run")
    with pytest.raises(NoSuchStep) as step:
        run.tensor("layer.0.q").value(12)
    assert str(step.value) == f"no step 12 in {tmp_path / 'run'}; it has 0, 10, 30, nearest 10."
    with pytest.raises(NoSuchName) as name:
        run.tensor("layer.0.qq")
    assert str(name.value) == (
        f"no tensor 'layer.0.qq' in {tmp_path / 'run'}; nearest is 'layer.0.q'; it has layer.0.k, layer.0.output, "
        f"layer.0.q, layer.0.v, ... layer.1.weights (10 in all). trial.tensor_names(regex=...) lists them."
    )
    with pytest.raises(NoSuchName) as mode:
        run.tensor("layer.0.q").value(10, mode="train", batch=3)
    assert str(mode.value) == (
        f"no 'layer.0.q' of mode 'train', batch 3, at step 10 of {tmp_path / 'run'}; "
        f"that step has it as mode 'probe' batch 0"
    )
    with pytest.raises(NoSuchName, match=r"no head 2 in layer.0; the run has its heads 0, 1"):
        run.weights(0, run.layers(0)[0], row=0, heads=[0, 2])
    with pytest.raises(NoSuchStep, match=r"it has none\.$"):
        open_trial(tmp_path / "nothing").entries(3)


def test_a_tensor_knows_its_steps_and_modes(tmp_path: Path) -> None:
    writer = write(tmp_path, [0, 10], [Call("a")], close=False)
    put(writer, 20, [Call("a"), Call("b")])
    put(writer, 30, [Call("a")], mode="train")
    writer.close()
    run = open_trial(tmp_path)
    assert run.modes() == ["probe", "train"]
    assert run.steps("train") == [30]
    assert run.tensor("a.weights").steps() == [0, 10, 20, 30]
    assert run.tensor("a.weights").steps("probe") == [0, 10, 20]
    assert run.tensor("b.q").steps() == [20]
    assert run.tensor_names("b", step=10) == []
    assert run.tensor("a.q").value(30).shape == (2, 2, 6, 4)
    assert [layer.mode for layer in run.layers(30, "train")] == ["train"]


def test_one_head_over_all_steps_comes_at_once(tmp_path: Path) -> None:
    writer = write(tmp_path, [0, 10, 20], [Call("a", heads=4, kv_heads=2)], close=False)
    put(writer, 30, [Call("a", heads=4, kv_heads=2)], tokens=5)
    writer.close()
    run = open_trial(tmp_path)
    q = run.tensor("a.q")
    found = q.values([20, 0], example=1, head=3)
    assert found.shape == (2, 6, 4)
    assert np.array_equal(found, np.stack([q.value(step)[1, 3] for step in (20, 0)]))
    assert q.values([0, 10], example=1).shape == (2, 4, 6, 4)
    assert q.values([0, 10]).shape == (2, 2, 4, 6, 4)
    assert q.values([]).shape == (0,)
    with pytest.raises(ValueError, match=r"a\.q changes its shape between these steps; take value\(step\) one by one"):
        q.values()
    with pytest.raises(ValueError, match=r"a head of a\.q is chosen without an example; give example= too"):
        q.values(head=1)
    with pytest.raises(NoSuchName, match=r"a\.weights is rebuilt, not stored: take values\(\) of its q and k"):
        run.tensor("a.weights").values()
    with pytest.raises(NoSuchName, match=r"no 'a\.q' of mode 'train', batch 0, at step 0 of .*; that step has it as"):
        q.values([0], mode="train")
    with pytest.raises(NoSuchName, match=r"index 4 in 'probe/0/a\.q' of a000/steps/.*, whose axis has 4"):
        q.values([0], example=0, head=4)


def test_a_flipped_bit_in_a_whole_tensor_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [0, 10])
    file = steps_of(tmp_path)[1]
    blob = bytearray(file.read_bytes())
    blob[-3] ^= 16
    file.write_bytes(blob)
    run = open_trial(tmp_path)
    with pytest.raises(
        StoreError, match=r"a000/steps/0000000010.*: tensor 'probe/0/layer\.0\.v' from byte \d+ on does not"
    ):
        run.tensor("layer.0.v").value(10)
    assert run.tensor("layer.0.v").value(0).shape == (1, 2, 6, 4)


def test_weights_that_failed_their_check_warn(tmp_path: Path) -> None:
    write(tmp_path, [0], [Call("a", error=0.5), Call("b")])
    run = open_trial(tmp_path)
    with pytest.warns(HeadscopeWarning, match=r"a.weights at step 0 failed its self-check \(5.0e-01 > 0.02\)"):
        run.tensor("a.weights").value(0)
    run.tensor("b.weights").value(0)
    assert [layer.check.passed for layer in run.layers(0)] == [False, True]


# Live.


def until(true: Any, timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


def test_new_steps_are_seen_without_reopening(tmp_path: Path) -> None:
    run = open_trial(tmp_path / "run")
    assert run.steps() == []
    assert run.refresh() == []
    assert run.examples() == []
    assert run.attempt is None
    assert run.facts() == {}
    assert run.scalars() == {}
    assert run.tensor_names() == []
    waiting = run.state()
    assert (waiting.state, waiting.step, waiting.alive, waiting.message) == ("waiting", None, True, "")
    writer = write(tmp_path / "run", [0], close=False)
    until(lambda: run.steps() == [0])
    assert run.state().state == "training"
    assert run.state().alive
    put(writer, 10)
    until(lambda: run.refresh() == [10])
    assert run.refresh() == []
    assert run.steps() == [0, 10]
    writer.log(10, {"loss": 0.5})
    until(lambda: "loss" in run.scalars())
    writer.log(11, {"loss": 0.25})
    until(lambda: len(run.scalars()["loss"][0]) == 2)
    writer.close()
    steps, values = run.scalars()["loss"]
    assert (steps.tolist(), values.tolist()) == ([10, 11], [0.5, 0.25])
    state = run.state()
    assert (state.state, state.step, state.alive, state.skipped) == ("ended", 10, False, 0)


class Counted:
    """Counts what a trial asks of the store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.names: list[str] = []
        for name in ("names", "get", "_ranges"):
            monkeypatch.setattr(Files, name, self.counting(name, getattr(Files, name)))

    def counting(self, name: str, real: Any) -> Any:
        def counted(files: Files, *args: Any) -> Any:
            self.calls[name] += 1
            self.names += args[:1] if name != "names" else []
            return real(files, *args)

        return counted


def test_a_refresh_costs_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write(tmp_path, [0, 10], BOTH, close=False)
    until(lambda: len(open_trial(tmp_path).steps()) == 2)
    run = open_trial(tmp_path)
    counted = Counted(monkeypatch)
    assert run.steps() == [0, 10]
    assert counted.calls == {"names": 1, "get": 2, "_ranges": 1}, "one listing, two small JSON files, one header"
    until(lambda: writer._queue.empty() and json.loads((tmp_path / "live.json").read_text())["step"] == 10)
    run.refresh()
    counted.calls.clear()
    run.refresh()
    assert counted.calls == {"names": 1}
    writer.close()
    counted.calls.clear()
    run.refresh()
    assert counted.calls == {"names": 1, "get": 1}
    more = write(tmp_path, [20, 30], BOTH)
    counted.calls.clear()
    assert run.refresh() == [20, 30]
    assert counted.calls["names"] == 1
    assert counted.calls["_ranges"] == 0, "a layout that is known is not read again"
    assert more.attempt == 1
    counted.calls.clear()
    run.entries(20)
    run.layers(20)
    assert counted.calls == {"_ranges": 1}
    run.layers(20)
    assert counted.calls == {"_ranges": 1}


def test_a_listing_asks_only_for_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write(tmp_path, list(range(30)), close=False)
    until(lambda: len(open_trial(tmp_path).steps()) == 30)
    run = open_trial(tmp_path)
    run.refresh()
    sizes: list[int] = []
    real = Files.names

    def names(files: Files, after: str = "") -> list[tuple[str, int, str]]:
        found = real(files, after)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(Files, "names", names)
    run.refresh()
    assert sizes[-1] <= 3, "headscope.json, live.json and a time line"
    writer.close()


WRITE = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from golden.synthetic import Call, put, examples
from headscope.writer import Writer
writer = Writer(sys.argv[1], {}, print)
writer.put_probe(examples([6, 4], 6))
for step in range(150):
    put(writer, step, [Call(heads=4, kv_heads=4, dim=16)], tokens=32,
        outputs={"predictions": np.full(2, step, np.int32), "logits": np.full((2, 3), step, np.float32)})
    writer.log(step, {"loss": step})
writer.close()
"""


def test_no_torn_step_is_seen_while_another_process_writes(tmp_path: Path) -> None:
    run = open_trial(tmp_path)
    seen: list[int] = []
    with subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path), str(Path(__file__).parent)]) as writer:
        polls = 0
        while (state := run.state().state) != "ended" or not seen or seen[-1] != 149:
            assert state in ("waiting", "training", "ended")
            assert writer.poll() in (None, 0)
            new = run.refresh()
            polls += bool(new)
            fresh = [step for step in run.steps() if step not in seen]
            for step in fresh:
                assert run.predictions(step) == [step, step]
                assert run.header(step).metadata["step"] == str(step)
                layer = run.layers(step)[0]
                q, k = run.read(step, [(layer.key("q"), (0,)), (layer.key("k"), (0,))])
                assert layer.check.error is not None
                assert layer.check.error < 1e-5
                assert np.isfinite(q).all()
                assert np.isfinite(k).all()
            seen += fresh
            for steps, values in run.scalars().values():
                assert steps.tolist() == values.tolist() == list(range(len(steps)))
    assert seen == list(range(150))
    assert run.damaged == {}
    assert len(run.scalars()["loss"][0]) == 150


def test_one_trial_serves_many_threads(tmp_path: Path) -> None:
    writer = write(tmp_path, [0], BOTH, close=False)
    run = open_trial(tmp_path)
    run.wait(0, timeout=10)
    problems: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        try:
            while not done.is_set():
                for step in run.steps():
                    run.tensor("layer.1.weights").value(step)
                run.wait(0, timeout=1)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(1, 20):
        put(writer, step, BOTH)
        time.sleep(0.01)
    assert run.wait(19, timeout=10) == 19
    done.set()
    for thread in threads:
        thread.join()
    writer.close()
    assert problems == []


def test_wait_returns_the_first_step_from_there_on(tmp_path: Path) -> None:
    run = open_trial(tmp_path / "later")
    threading.Timer(0.15, lambda: write(tmp_path / "later", [0, 10, 20])).start()
    assert run.wait(5, timeout=20) in (10, 20)
    until(lambda: run.steps() == [0, 10, 20])
    assert run.wait(5) == 10
    assert run.wait(20, timeout=0) == 20


def test_wait_says_that_time_is_up(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError) as nothing:
        open_trial(tmp_path / "run").wait(5, timeout=0.01)
    assert str(nothing.value) == (
        f"no step 5 in {tmp_path / 'run'} after 0.01 s; it has steps none and is waiting. "
        f"Wait again, with a longer timeout."
    )
    writer = write(tmp_path / "run", [0], close=False)
    run = open_trial(tmp_path / "run")
    run.wait(0, timeout=10)
    with pytest.raises(TimeoutError, match=r"no step 5 in .* after 0 s; it has steps 0 and is training\. Wait again"):
        run.wait(5, timeout=0)
    writer.close()


@pytest.mark.parametrize(
    ("state", "message", "text"),
    [
        ("ended", "", "training ended; it has steps 0"),
        ("failed", "ValueError at step 3: bad", r"training failed \(ValueError at step 3: bad\); it has steps 0"),
        ("stopped", "KeyboardInterrupt at step 3", r"training stopped \(KeyboardInterrupt at step 3\); it has steps 0"),
    ],
)
def test_wait_says_that_the_trainer_is_gone(state: str, message: str, text: str, tmp_path: Path) -> None:
    write(tmp_path, [0], close=False).close(state, message)
    with pytest.raises(TrainerGone, match=rf"step 5 of .* will not come: {text}"):
        open_trial(tmp_path).wait(5)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def silent(path: Path, interval_s: float = 2.0) -> None:
    """A run whose trainer was killed."""
    write(path, [0])
    live = json.loads((path / "live.json").read_text())
    (path / "live.json").write_text(json.dumps({**live, "state": "training", "interval_s": interval_s}))


@pytest.mark.parametrize(("interval_s", "patience_s"), [(2.0, 10), (0.01, 10), (10.0, 50)])
def test_wait_gives_up_when_there_is_no_sign(
    interval_s: float, patience_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent(tmp_path, interval_s)
    clock = Clock()
    monkeypatch.setattr(history, "time", clock)
    run = open_trial(tmp_path)
    assert run.state() == State("training", 0, 0.0, True, "", 0)
    with pytest.raises(TrainerGone, match=rf"step 5 of .* will not come: no sign of the trainer for {patience_s} s; "):
        run.wait(5)
    assert patience_s <= clock.now_s - 100 < patience_s + 0.2
    assert not run.state().alive


def test_a_sign_of_the_trainer_is_a_counter_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(tmp_path)
    clock = Clock()
    monkeypatch.setattr(history, "time", clock)
    run = open_trial(tmp_path)
    run.state()
    live = json.loads((tmp_path / "live.json").read_text())
    clock.now_s += 9
    (tmp_path / "live.json").write_text(json.dumps({**live, "message": "the same counter, another text"}))
    assert run.state().age_s == 9
    assert run.state().message == "the same counter, another text"
    (tmp_path / "live.json").write_text(json.dumps({**live, "counter": live["counter"] + 1}))
    assert run.state().age_s == 0
    clock.now_s += 10
    assert not run.state().alive


# Attempts.


def stamped(path: Path, steps: Sequence[int], number: int, **more: Any) -> None:
    """An attempt whose predictions are its own number."""
    write(path, steps, outputs={"predictions": np.full(2, number, np.int32)}, seed=number, **more)


def whose(run: Trial) -> dict[int, int | None]:
    return {step: run.predictions(step)[0] for step in run.steps()}


def test_training_again_from_step_0_supersedes(tmp_path: Path) -> None:
    stamped(tmp_path, [0, 10, 20, 30], 0)
    run = open_trial(tmp_path)
    assert whose(run) == {0: 0, 10: 0, 20: 0, 30: 0}
    stamped(tmp_path, [0, 10], 1)
    assert run.refresh() == []
    assert whose(run) == {0: 1, 10: 1}
    assert run.attempt == 1
    assert whose(open_trial(tmp_path)) == {0: 1, 10: 1}
    assert whose(open_trial(tmp_path, attempt=0)) == {0: 0, 10: 0, 20: 0, 30: 0}
    assert open_trial(tmp_path, attempt=7).steps() == []


def test_going_on_at_a_later_step_joins_the_history(tmp_path: Path) -> None:
    stamped(tmp_path, [0, 10, 20, 30], 0)
    stamped(tmp_path, [20, 30, 40], 1)
    assert whose(open_trial(tmp_path)) == {0: 0, 10: 0, 20: 1, 30: 1, 40: 1}
    stamped(tmp_path, [30], 2)
    run = open_trial(tmp_path)
    assert whose(run) == {0: 0, 10: 0, 20: 1, 30: 2}
    assert run.attempt == 2


def test_an_attempt_without_a_step_changes_nothing(tmp_path: Path) -> None:
    stamped(tmp_path, [0, 10], 0)
    write(tmp_path, [])
    run = open_trial(tmp_path)
    assert whose(run) == {0: 0, 10: 0}
    assert run.attempt == 0


def test_an_attempt_with_other_examples_does_not_join(tmp_path: Path) -> None:
    stamped(tmp_path, [0, 10], 0)
    stamped(tmp_path, [20], 1, probe=examples([5, 6], 6))
    run = open_trial(tmp_path)
    assert whose(run) == {20: 1}
    assert [len(example.tokens) for example in run.examples()] == [5, 6]


def test_scalars_follow_the_newest_attempt(tmp_path: Path) -> None:
    for steps, value in ((range(0, 40), 0.0), (range(20, 30), 1.0)):
        writer = write(tmp_path, [steps[0]], close=False)
        for step in steps:
            writer.log(step, {"loss": value, **({"lr": 0.5} if step % 2 else {})})
        writer.close()
    run = open_trial(tmp_path)
    steps_, values = run.scalars()["loss"]
    assert steps_.tolist() == list(range(30))
    assert values.tolist() == [0.0] * 20 + [1.0] * 10
    assert run.scalars()["lr"][0].tolist() == list(range(1, 30, 2))
    assert open_trial(tmp_path, attempt=0).scalars()["loss"][0].tolist() == list(range(40))


def test_nan_that_was_logged_is_told_from_nothing_logged(tmp_path: Path) -> None:
    writer = write(tmp_path, [0], close=False)
    for step, values in enumerate([{"loss": 1.0}, {"loss": float("nan"), "lr": 0.5}, {"lr": 0.25}, {"loss": 2.0}]):
        writer.log(step, values)
    writer.close()
    found = open_trial(tmp_path).scalars()
    assert found.keys() == {"loss", "lr"}
    assert found["loss"][0].tolist() == [0, 1, 3]
    assert np.array_equal(found["loss"][1], [1, np.nan, 2], equal_nan=True)
    assert found["lr"][0].tolist() == [1, 2]


def test_a_folder_made_anew_is_noticed(tmp_path: Path) -> None:
    stamped(tmp_path / "run", [0, 10, 20], 3)
    run = open_trial(tmp_path / "run")
    assert whose(run) == {0: 3, 10: 3, 20: 3}
    shutil.rmtree(tmp_path / "run")
    stamped(tmp_path / "run", [0, 5], 4)
    assert whose(run) == {0: 4, 5: 4}
    assert run.state().step == 5


def test_a_folder_that_is_deleted_ends_reading_with_a_word(tmp_path: Path) -> None:
    write(tmp_path / "run", [0, 10])
    run = open_trial(tmp_path / "run")
    run.refresh()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(NoSuchName, match=r"no tensor 'layer.0.q' in .*run; it has none"):
        run.tensor("layer.0.q")
    assert run.steps() == [] and run.state().state == "waiting"


# Damage.


def steps_of(path: Path) -> list[Path]:
    return sorted((path / "a000" / "steps").iterdir())


def test_a_damaged_step_is_listed_and_the_others_are_read(tmp_path: Path) -> None:
    write(tmp_path, [0, 10, 20, 30])
    second, last = steps_of(tmp_path)[1], steps_of(tmp_path)[3]
    second.write_bytes(second.read_bytes()[:-1])
    last.write_bytes(b"")
    run = open_trial(tmp_path)
    assert run.steps() == [0, 20]
    names = [f"a000/steps/{path.name}" for path in (second, last)]
    size = steps_of(tmp_path)[0].stat().st_size
    assert run.damaged == {
        names[0]: f"{names[0]}: the file has {size - 1} bytes, its layout promises {size}; it is damaged",
        names[1]: f"{names[1]}: the file has 0 bytes, its layout promises {size}; it is damaged",
    }
    assert run.tensor("layer.0.weights").value(20).shape == (2, 2, 6, 6)
    with pytest.raises(StoreError, match=r"0000000010.*it is damaged"):
        run.entries(10)


def test_a_damaged_first_step_does_not_hide_the_others(tmp_path: Path) -> None:
    write(tmp_path, [0, 10])
    first = steps_of(tmp_path)[0]
    first.write_bytes(bytes(first.stat().st_size))
    run = open_trial(tmp_path)
    assert run.steps() == [10]
    assert list(run.damaged) == [f"a000/steps/{first.name}"]
    assert "is not JSON as it should be" in run.damaged[f"a000/steps/{first.name}"]


def test_a_damaged_time_line_is_listed(tmp_path: Path) -> None:
    writer = write(tmp_path, [0], close=False)
    for step in range(300):
        writer.log(step, {"loss": step})
    writer.close()
    block = tmp_path / "a000" / "timeline" / "r00000-00000.safetensors"
    block.write_bytes(block.read_bytes()[:-1])
    run = open_trial(tmp_path)
    assert run.scalars()["loss"][0].tolist() == list(range(256, 300))
    assert "its header promises" in run.damaged["a000/timeline/r00000-00000.safetensors"]
    assert run.steps() == [0]


def test_a_damaged_probe_of_an_older_attempt_hides_nothing(tmp_path: Path) -> None:
    stamped(tmp_path, [0, 10], 0)
    stamped(tmp_path, [20], 1)
    (tmp_path / "a000" / "probe.safetensors").write_bytes(b"")
    run = open_trial(tmp_path)
    assert whose(run) == {20: 1}
    assert "too few for a safetensors file" in run.damaged["a000/probe.safetensors"]


def test_calls_that_are_described_wrongly_are_a_store_error() -> None:
    raw = {"path": "a", "call": 0, "mode": "probe", "batch": 0, "route": "sdpa", "heads": 2, "kv_heads": 2}
    raw |= {"scale": 1, "causal": False, "offset": 0, "window": None, "softcap": None, "mask": None, "bias": None}
    raw |= {"sinks": False, "dropout": 0.0, "dtype": "float32", "kept": None, "named": True}
    layer = Layer.of(raw, "f")
    assert layer.check == Check()
    assert layer.check.passed
    assert Layer.of({**raw, "check": {"example": 0, "rows": [1], "error": 1.0, "limit": 0.1}}, "f").check.rows == (1,)
    for name, value in (("heads", "2"), ("heads", True), ("causal", 0), ("mask", 3), ("scale", None), ("window", 1.5)):
        with pytest.raises(StoreError, match=rf"^f: {name} of an attention call is {re.escape(repr(value))}$"):
            Layer.of({**raw, name: value}, "f")
    missing = {key: value for key, value in raw.items() if key != "dtype"}
    wrongs: list[Any] = [missing, {**raw, "check": {"unknown": 1}}, {**raw, "check": 5}, 7]
    for wrong in wrongs:
        with pytest.raises(StoreError, match=r"^f: an attention call is described wrongly: "):
            Layer.of(wrong, "f")


# The examples and what the model says of them.


@pytest.mark.parametrize("left", [False, True])
def test_examples_come_without_their_padding(left: bool, tmp_path: Path) -> None:
    write(tmp_path, [0], probe=examples([6, 3], 6, left=left, labels=[1, -100]))
    first, second = open_trial(tmp_path).examples()
    assert (first.index, first.batch, first.row, first.text, first.label) == (0, 0, 0, "text 0", 1)
    assert first.tokens == ("t1", "t10", "t11", "t12", "t13", "t2")
    assert first.special == (True, False, False, False, False, True)
    assert second.tokens == ("t1", "t20", "t2")
    assert second.positions.tolist() == ([3, 4, 5] if left else [0, 1, 2])
    assert second.label is None


def test_predictions_probabilities_and_loss(tmp_path: Path) -> None:
    logits = np.array([[0.0, np.log(3)], [5, 5]], np.float32)
    outputs = {"logits": logits, "predictions": logits.argmax(1).astype(np.int32), "loss": np.array(0.5, np.float32)}
    writer = write(tmp_path, [0], outputs=outputs, close=False)
    put(writer, 10)
    put(writer, 20, outputs={"logits": np.zeros((2, 6, 9), np.float32), "predictions": np.zeros((2, 6), np.int32)})
    writer.close()
    run = open_trial(tmp_path)
    assert run.predictions(0) == [1, 0]
    assert run.probabilities(0) == [pytest.approx([0.25, 0.75]), [0.5, 0.5]]
    assert run.loss(0) == 0.5
    for step in (10, 20):
        assert run.predictions(step) == [None, None]
        assert run.probabilities(step) == [None, None]
        assert run.loss(step) is None


def test_the_read_side_loads_no_torch(tmp_path: Path) -> None:
    write(tmp_path, [0, 10], BOTH)
    code = f"""
import sys
from headscope import open_trial
from headscope.answer import answer
run = open_trial({str(tmp_path)!r})
for ask in ("trial", "step", "first_look"):
    answer(run, {{"ask": ask, "step": 10}})
lines = {{"ask": "lines", "step": 10, "layer": 1, "example": 0, "heads": [0], "first": 0, "count": 3, "top": 2}}
answer(run, lines)
print(sorted(name for name in ("torch", "transformers", "starlette", "rich") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_nothing_warns_while_reading(tmp_path: Path) -> None:
    write(tmp_path, [0, 10], BOTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = open_trial(tmp_path)
        for name in run.tensor_names():
            run.tensor(name).value(10)
