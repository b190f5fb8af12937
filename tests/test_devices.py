"""Precision, compilation and several processes, as people train."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from headscope import open_trial, watch
from headscope.audit import audit
from headscope.cli import main
from headscope.errors import HeadscopeWarning, NotSupported
from headscope.trial import Trial
from test_watch import Tokenizer, batch, heard, kept, plain_loop, probe

torch.set_num_threads(1)
COMPILER = shutil.which("g++") or shutil.which("clang++")


def ids() -> dict[str, Tensor]:
    """A probe that every model takes."""
    return {name: t for name, t in probe().items() if name != "labels"}


def train(
    model: nn.Module,
    steps: int,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    each: Callable[[], None] = lambda: None,
) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        with around():
            logits = model(**{name: t for name, t in batch(step).items() if name != "labels"}).logits
            loss = logits.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        each()
    return losses


def clean(path: Path) -> Trial:
    """The run, after a check that found nothing."""
    found = audit(path)
    assert found.faults == []
    assert found.checked > 0
    assert found.unchecked == 0
    return open_trial(path)


# Precision.


@pytest.mark.parametrize("given", [True, False], ids=["probe", "no probe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("make", [models.bert, models.llama], ids=["bert", "llama"])
def test_under_autocast_the_record_says_what_the_kernel_saw(
    make: Callable[[], Any], dtype: torch.dtype, given: bool, tmp_path: Path
) -> None:
    model, name = make(), str(dtype).removeprefix("torch.")
    with watch(model, tmp_path, probe=ids() if given else None, every=2):
        train(model, 3, lambda: torch.autocast("cpu", dtype=dtype))
    run = clean(tmp_path)
    assert run.steps() == [0, 2, 3]
    # A probe that is given runs before training has shown what it runs under.
    for step in [2, 3] if given else run.steps():
        assert [layer.dtype for layer in run.layers(step)] == [name] * 2
        assert {kept.name for kept in kept(tmp_path, "q", step)} == {name}
        assert all(layer.check.passed and layer.check.limit == 2e-2 for layer in run.layers(step))
    if given:
        assert [layer.dtype for layer in run.layers(0)] == ["float32"] * 2


def test_a_watch_that_begins_within_autocast_probes_under_it(tmp_path: Path) -> None:
    model = models.llama()
    with torch.autocast("cpu", dtype=torch.bfloat16), watch(model, tmp_path, probe=ids(), every=1):
        train(model, 1)
    assert [[layer.dtype for layer in clean(tmp_path).layers(step)] for step in (0, 1)] == [["bfloat16"] * 2] * 2


@pytest.mark.parametrize("make", [models.bert, models.llama, models.gpt2], ids=["bert", "llama", "gpt2"])
def test_a_model_in_bfloat16(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make().bfloat16()
    with watch(model, tmp_path, probe=ids(), every=1):
        train(model, 2)
    run = clean(tmp_path)
    assert run.steps() == [0, 1, 2]
    assert {layer.dtype for step in run.steps() for layer in run.layers(step)} == {"bfloat16"}
    assert {layer.check.limit for layer in run.layers(2)} == {2e-2}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_the_grad_scaler_skips_is_none(fused: bool, tmp_path: Path) -> None:
    model = models.bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    counted = []
    with watch(model, tmp_path, probe=probe(), every=1) as watched:
        for step in range(4):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(**batch(step)).loss
            scaler.scale(loss).backward()
            if step == 1:
                model.classifier.weight.grad.fill_(torch.inf)
            before = model.classifier.weight.detach().clone()
            scaler.step(optimizer)
            assert torch.equal(before, model.classifier.weight) == (step == 1)
            scaler.update()
            optimizer.zero_grad()
            counted.append(watched._step)
    assert counted == [1, 1, 2, 3]
    assert clean(tmp_path).steps() == [0, 1, 2, 3]


# Loops.


@pytest.mark.parametrize("before", [True, False])
def test_an_optimizer_made_before_or_after_the_watch(before: bool, tmp_path: Path) -> None:
    model = models.bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3) if before else None
    with watch(model, tmp_path, probe=probe(), every=1):
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-3)
        model(**batch()).loss.backward()
        optimizer.step()
    assert clean(tmp_path).steps() == [0, 1]


def test_accumulated_gradients_are_one_step(tmp_path: Path) -> None:
    model = models.bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watch(model, tmp_path, probe=probe(), every=1):
        for step in range(6):
            (model(**batch(step)).loss / 3).backward()
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    run = clean(tmp_path)
    assert run.steps() == [0, 1, 2]
    assert [run.header(step).facts("forwards", dict)["train"] for step in run.steps()] == [0, 3, 6]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("given", [True, False], ids=["probe", "no probe"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_with_gradient_checkpointing_each_call_stands_once(reentrant: bool, given: bool, tmp_path: Path) -> None:
    def trained(path: Path | None) -> list[float]:
        model = models.bert(hidden_dropout_prob=0.1)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        torch.manual_seed(1)
        with nullcontext() if path is None else watch(model, path, probe=probe() if given else None, every=1):
            return train(model, 2)

    assert trained(tmp_path) == trained(None)
    run = clean(tmp_path)
    assert run.steps() == [0, 1, 2]
    assert [[layer.call for layer in run.layers(step)] for step in run.steps()] == [[0, 0]] * 3
    assert run.header(2).facts("forwards", dict) == {"train": 2, "eval": 0}


def test_a_model_that_is_checkpointed_as_a_whole_is_counted_once(tmp_path: Path) -> None:
    model = models.Plain().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watch(model, tmp_path, every=1):
        for step in range(2):
            run: Any = torch.utils.checkpoint.checkpoint(model, batch(step)["input_ids"], use_reentrant=False)
            run.sum().backward()
            optimizer.step()
    assert clean(tmp_path).steps() == [0, 1, 2]
    assert open_trial(tmp_path).header(2).facts("forwards", dict) == {"train": 2, "eval": 0}


# Compiled.


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo
    dynamo.reset()


def compiled_run(
    kind: str, path: Path | None, late: bool, given: bool, dynamo: Any, backend: str
) -> tuple[list[float], list[Counter[str]]]:
    """Losses of three steps, and after each what has been compiled so far."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    model: Any = models.bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()

    def compiled() -> Any:
        if kind == "module":
            model.compile(backend=backend)
            return model
        return torch.compile(model, backend=backend)

    seen: list[Counter[str]] = []

    def look() -> None:
        counters = dynamo.utils.counters
        seen.append(Counter({f"{kind}: {name}": n for kind in counters for name, n in counters[kind].items()}))

    run = model if late else compiled()
    torch.manual_seed(1)
    with nullcontext() if path is None else watch(run, path, probe=probe() if given else None, every=1):
        losses = train(compiled() if late else run, 3, each=look)
    return losses, seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("given", [True, False], ids=["probe", "no probe"])
@pytest.mark.parametrize("late", [False, True], ids=["compiled before", "compiled within"])
@pytest.mark.parametrize("kind", ["function", "module"])
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not COMPILER, reason="inductor needs a C++ compiler: g++, clang++"),
            ],
        ),
    ],
)
def test_a_compiled_model_stays_compiled(
    kind: str, late: bool, given: bool, backend: str, tmp_path: Path, dynamo: Any
) -> None:
    alone, _ = compiled_run(kind, None, late, given, dynamo, backend)
    losses, seen = compiled_run(kind, tmp_path, late, given, dynamo, backend)
    assert losses == alone
    assert seen[0]["stats: unique_graphs"] == 1
    assert seen[0] == seen[1] == seen[2], "a capture in between compiles nothing anew"
    assert not [name for name in seen[2] if name.startswith("graph_break")]
    run = clean(tmp_path)
    # Compiled within the watch, the first forward is seen while it is compiled, without values to make a probe of.
    assert run.steps() == ([1, 2, 3] if late and not given else [0, 1, 2, 3])
    assert [len(run.layers(step)) for step in run.steps()] == [2] * len(run.steps())
    assert run.header(3).facts("forwards", dict) == {"train": 3, "eval": 0}


def test_autocast_of_a_compiled_model_is_noted(tmp_path: Path, dynamo: Any) -> None:
    model = models.llama()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with watch(model, tmp_path, probe=ids(), every=1):
        train(compiled, 2, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    run = clean(tmp_path)
    assert [run.layers(step)[0].dtype for step in run.steps()] == ["float32", "bfloat16", "bfloat16"]


def test_a_compiled_step_without_a_probe_is_told(tmp_path: Path, dynamo: Any) -> None:
    model = models.Plain().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    @torch.compile(backend="aot_eager")
    def loss_of(inputs: Tensor) -> Any:
        return model(inputs).sum()

    def do(path: Path) -> None:
        with watch(model, path, every=1):
            for step in range(2):
                loss: Any = loss_of(batch(step)["input_ids"])
                loss.backward()
                optimizer.step()

    text = (
        "NO ATTENTION WAS CAUGHT in Plain: no probe was given, and its forward is part of a larger function that is "
        "compiled, so that its inputs are not seen; pass probe= to headscope.watch"
    )
    assert heard(tmp_path, do) == [text]
    assert open_trial(tmp_path).state().message == text


class Graph(nn.Module):
    """Like a CUDA graph: what runs is not what stands in the module."""

    def __init__(self) -> None:
        super().__init__()
        inner = models.Plain()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.replayed: Any = torch.jit.trace(inner, batch()["input_ids"])  # type: ignore[no-untyped-call]

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.replayed(ids)
        return out


def test_an_empty_capture_cannot_be_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Graph()

    def do(path: Path) -> None:
        with watch(model, path, every=1) as watched:
            plain_loop(model)
            watched.log(step=1)

    said = heard(tmp_path, do)
    assert said[0].startswith("NO ATTENTION WAS CAUGHT in Graph: Graph called neither an attention function of")
    assert said[0].endswith(
        "nor is what runs no Python (TorchScript, exported and CUDA graphs: watch the module that they were made of)"
    )
    assert len(said) == 2
    assert open_trial(tmp_path).state().message == said[0], "what is said later does not hide it"
    main(["info", str(tmp_path)])
    assert "NO ATTENTION WAS CAUGHT in Graph" in re.sub(r"\s+", " ", capsys.readouterr().out)
    path = tmp_path / "raised"
    with pytest.raises(ZeroDivisionError), pytest.warns(HeadscopeWarning), watch(model, path, every=1):
        plain_loop(model)
        raise ZeroDivisionError("later")
    state = open_trial(path).state()
    assert state.message.startswith("ZeroDivisionError at step 3: later; NO ATTENTION WAS CAUGHT in Graph")


# Several processes.


def test_data_parallel_is_heard_once(tmp_path: Path) -> None:
    model = nn.DataParallel(models.bert())
    with watch(model, tmp_path, every=1):
        train(model, 2)
    assert clean(tmp_path).steps() == [0, 1, 2]
    assert open_trial(tmp_path).header(2).facts("forwards", dict) == {"train": 2, "eval": 0}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two ranks saw; see two_ranks.py."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "two_ranks.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(out)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    for rank in ranks:
        try:
            _, errors = rank.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            for one in ranks:
                one.kill()
            raise AssertionError("a rank waits for another") from None
        assert rank.returncode == 0, errors
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def same_training(ranks: list[dict[str, Any]], name: str, alone: str) -> None:
    for rank in ranks:
        assert (rank[name]["losses"], rank[name]["state"]) == (rank[alone]["losses"], rank[alone]["state"])


@pytest.mark.parametrize("name", ["ddp", "ddp without a probe", "ddp talks"])
def test_ddp_trains_as_without(name: str, two: Any) -> None:
    same_training(two[1], name, "ddp alone")
    assert two[1][0]["ddp"]["losses"] != two[1][1]["ddp"]["losses"], "each rank has data of its own"


@pytest.mark.parametrize("name", ["ddp", "ddp2"])
def test_of_ddp_the_first_rank_writes(name: str, two: Any) -> None:
    out, ranks = two
    run = clean(out / name)
    assert run.steps() == [0, 1, 2, 3, 4]
    assert [len(run.layers(step)) for step in run.steps()] == [2] * 5
    assert [path.name for path in (out / name).iterdir() if path.is_dir()] == ["a000"]
    assert [rank["ddp"]["attempt"] for rank in ranks] == [0, -1]
    assert all(rank["ddp"]["said"] == [] for rank in ranks)


def test_a_folder_that_the_first_rank_cannot_open_leaves_no_rank_waiting(two: Any) -> None:
    first, second = (rank["ddp cannot open"] for rank in two[1])
    assert first["said"] == [
        "cannot write to '/proc/nowhere': No such file or directory (os error 2); choose a folder that can be written; "
        "training goes on, unwatched"
    ]
    assert second["said"] == []
    same_training(two[1], "ddp cannot open", "ddp alone")


def test_a_forward_that_talks_to_other_ranks_is_stopped(two: Any) -> None:
    assert [rank["ddp talks"]["said"] for rank in two[1]] == [
        [
            "the capture failed at step 0: NotSupported: the model talks to other ranks in its forward "
            "(c10d.allreduce_.default), and rank 0 runs the probe alone; look at its checkpoints with "
            "headscope.replay; training goes on, captures are off"
        ],
        [],
    ]


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        *((name, "fsdp alone") for name in ("fsdp", "fsdp without a probe", "fsdp fails", "fsdp too large")),
        ("fsdp paced", "fsdp alone"),
        ("fsdp mixed", "fsdp mixed alone"),
    ],
)
def test_fully_sharded_training_is_as_without(name: str, alone: str, two: Any) -> None:
    same_training(two[1], name, alone)


def test_of_a_sharded_model_all_heads_are_there(two: Any) -> None:
    out, ranks = two
    run = clean(out / "fsdp")
    assert run.steps() == [0, 1, 2, 3, 4]
    model, inputs = models.bert(), {name: t for name, t in batch(99).items() if name != "labels"}
    with watch(model, out / "whole", probe=batch(99), dtype="float32", every=1):
        model.train()(**batch()).loss.backward()
        watched = open_trial(out / "whole")
        watched.wait(0, timeout=20)
    for one, other in zip(run.layers(0), watched.layers(0), strict=True):
        assert one.path == other.path
        np.testing.assert_allclose(run.weights(0, one), watched.weights(0, other), atol=1e-6)
    assert inputs
    assert run.weights(4, run.layers(4)[0]).shape == (3, 4, 12, 12)
    assert open_trial(out / "fsdp2").steps() == [0, 2, 4]
    mixed = clean(out / "fsdp3")
    assert {layer.dtype for layer in mixed.layers(0)} == {"bfloat16"}
    assert all(rank["fsdp"]["said"] == [] for rank in ranks)


def test_an_error_on_one_rank_keeps_none_waiting(two: Any) -> None:
    out, (first, second) = two
    fails = "the capture failed at step 0: OutOfMemoryError: no memory left for the probe"
    smaller = "; training goes on, captures are off (examples= and tokens= of headscope.watch make them smaller)"
    assert first["fsdp fails"]["said"] == [fails + smaller]
    assert second["fsdp fails"]["said"] == []
    large = "the capture failed at step 1: MemoryError: no room for a whole layer more"
    assert second["fsdp too large"]["said"] == [large + smaller]
    assert first["fsdp too large"]["said"] == [f"captures are not made from step 2 on: {large}"]
    assert open_trial(out / "fsdp4").steps() == []
    assert clean(out / "fsdp5").steps() == [0, 1]


def test_what_only_the_first_rank_knows_is_agreed_on(two: Any) -> None:
    out, (first, second) = two
    assert second["fsdp paced"]["said"] == []
    assert len(first["fsdp paced"]["said"]) == 1
    assert clean(out / "fsdp6").steps()[0] == 0
    reason = "cannot write to '/proc/nowhere': No such file or directory"
    assert first["fsdp cannot open"].startswith(f"StoreError: {reason}")
    assert second["fsdp cannot open"].startswith(f"HeadscopeError: rank 0 cannot begin: {reason}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "fsdp one rank",
            "NotSupported: the model is sharded, so the watch is to be entered in every rank, and rank 1 did not come "
            "within 1 s: use headscope.watch alike in all 2 ranks",
        ),
        (
            "fsdp1",
            "NotSupported: FullyShardedDataParallel is sharded by FullyShardedDataParallel (FSDP1), and no rank can "
            "run it alone; shard it by torch.distributed.fsdp.fully_shard instead, or look at its checkpoints with "
            "headscope.replay",
        ),
        (
            "tensor parallel",
            "NotSupported: parameter '0.weight' of Sequential is split by tensor parallelism, so that no rank has all "
            "heads; look at its checkpoints with headscope.replay",
        ),
    ],
)
def test_what_no_rank_can_run_is_refused_at_the_door(name: str, text: str, two: Any) -> None:
    assert two[1][0][name] == text


def test_a_model_that_is_sharded_too_late_is_left_alone(two: Any) -> None:
    out, ranks = two
    assert ranks[0]["sharded late"]["said"] == [
        "the capture failed at step 2: NotSupported: FSDPBertForSequenceClassification was sharded after the watch "
        "began; shard it first, then watch it; training goes on, captures are off"
    ]
    assert clean(out / "late").steps() == [0]


def test_deepspeed_is_refused_at_the_door(tmp_path: Path) -> None:
    class DeepSpeedEngine(nn.Module):
        pass

    with pytest.raises(
        NotSupported, match=r"DeepSpeedEngine is an engine of DeepSpeed; pass its module: .*engine\.mod"
    ):
        watch(DeepSpeedEngine(), tmp_path).__enter__()
    model = models.Plain()
    model.head.weight.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(
        NotSupported, match="the parameters of Plain are sharded by DeepSpeed ZeRO stage 3; look at its"
    ):
        watch(model, tmp_path).__enter__()


def test_torchruns_rank_counts_before_the_ranks_have_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, attempt in (("1", -1), ("0", 0)):
        monkeypatch.setenv("RANK", rank)
        model = models.bert()
        with watch(model, tmp_path, probe=[("a bb", 1)], tokenizer=Tokenizer(), every=1) as watched:
            assert watched.attempt == attempt
            train(model, 1)
            watched.log(loss=1.0)
            watched.step(7)
        assert list(tmp_path.iterdir()) == [] or attempt == 0
    assert open_trial(tmp_path).steps() == [0, 1, 7]
