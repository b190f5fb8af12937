"""A watch in a plain loop on Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

import headscope
import models
from headscope import open_trial

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_state_of_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in classes; the Trainers of other tests leave theirs."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(5, models.VOCABULARY, (16, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(ids)]


def train(path: Path | None, *, before: bool, given: bool = False, accumulate: int = 1, **settings: Any) -> Any:
    """The loop of Accelerate's tutorial over 8 batches; the watch is made before or after `prepare`."""
    torch.manual_seed(3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **settings)
    model = models.bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data: Any = torch.utils.data.DataLoader(rows(), batch_size=2)  # type: ignore[arg-type]

    def watched() -> Any:
        assert path is not None
        return headscope.watch(model, path, every=2, optimizer=optimizer if given else None).__enter__()

    watch = watched() if path and before else None
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    if path and not before:
        watch = watched()
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if watch:
                watch.log(loss=loss)
    if watch:
        watch.close()
    return accelerator.unwrap_model(model).state_dict()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("accumulate", "steps"), [(1, [0, 2, 4, 6, 8]), (3, [0, 2, 3])])
def test_steps_are_those_of_the_optimiser(
    accumulate: int, steps: list[int], before: bool, given: bool, tmp_path: Path
) -> None:
    train(tmp_path, before=before, given=given, accumulate=accumulate)
    run = open_trial(tmp_path)
    assert run.steps() == steps, "8 batches; the last one always steps"
    assert run.header(steps[-1]).facts("forwards", dict) == {"train": 8, "eval": 0}
    assert run.layers(0)[0].path == "bert.encoder.layer.0.attention.self"
    assert run.state().state == "ended"
    assert [e.label for e in run.examples()] == [0, 1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_is_bit_for_bit_as_without(precision: str, tmp_path: Path) -> None:
    alone = train(None, before=False, mixed_precision=precision)
    random = torch.get_rng_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    watched = train(tmp_path, before=False, mixed_precision=precision)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    assert {layer.dtype for layer in open_trial(tmp_path).layers(2)} == {"float32" if precision == "no" else "bfloat16"}
