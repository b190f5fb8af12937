"""One rank of two that train together; what it saw is written as JSON. All cases in one process: starting is slow."""

import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import models
from headscope import ranks, watch
from headscope.errors import HeadscopeError

STEPS = 4


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(5, models.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(3) % 2}


def bert() -> Any:
    return models.bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()


def replicated() -> tuple[nn.Module, nn.Module]:
    model = bert()
    return model, DistributedDataParallel(model)


def sharded(policy: MixedPrecisionPolicy | None = None) -> tuple[nn.Module, nn.Module]:
    model = bert()
    named: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
    for layer in model.bert.encoder.layer:
        fully_shard(layer, **named)
    fully_shard(model, **named)
    return model, model


def state(model: nn.Module) -> str:
    """A digest of this rank's parameters and random numbers."""
    digest = hashlib.sha256()
    for t in model.state_dict().values():
        local = t.to_local() if hasattr(t, "to_local") else t
        digest.update(local.detach().float().contiguous().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def train(
    make: Callable[[], tuple[nn.Module, nn.Module]],
    out: Path | None,
    spoil: Callable[[nn.Module], None] = lambda model: None,
    each: Callable[[], None] = lambda: None,
    **options: Any,
) -> dict[str, Any]:
    rank = distributed.get_rank()
    torch.manual_seed(0)
    model, wrapped = make()
    spoil(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    torch.manual_seed(rank)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with nullcontext() if out is None else watch(wrapped, out, **{"every": 1, **options}) as watched:
            for step in range(STEPS):
                loss = wrapped(**batch(10 * step + rank)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                each()
                if watched is not None:
                    watched.log(loss=loss)
            attempt = None if watched is None else watched.attempt
    messages = [str(w.message) for w in said if "Headscope" in w.category.__name__]
    return {"losses": losses, "state": state(model), "attempt": attempt, "said": messages}


def refused(model: nn.Module, out: Path) -> str:
    try:
        with watch(model, out):
            return "nothing"
    except HeadscopeError as problem:
        return f"{type(problem).__name__}: {problem}"


def fails_in_eval(where: str, rank: int) -> Callable[[nn.Module], None]:
    """In the middle of a forward, where the other rank would be waiting for this one."""

    def spoil(model: nn.Module) -> None:
        def fail(module: nn.Module, *_: Any) -> None:
            if not module.training and distributed.get_rank() == rank:
                raise torch.OutOfMemoryError("no memory left for the probe")

        model.get_submodule(where).register_forward_pre_hook(fail)

    return spoil


def talks_in_forward(model: nn.Module) -> None:
    model.get_submodule("bert.pooler").register_forward_pre_hook(lambda *_: distributed.all_reduce(torch.ones(1)))


def too_large_on_rank_1(model: nn.Module) -> None:
    unit: Any = model.get_submodule("bert.encoder.layer.1")
    real, count = unit.unshard, iter(range(100))

    def unshard(async_op: bool = False) -> Any:
        if distributed.get_rank() == 1 and next(count) == 1:
            raise MemoryError("no room for a whole layer more")
        return real(async_op)

    unit.unshard = unshard


def cases(out: Path) -> dict[str, Any]:
    rank, probe = distributed.get_rank(), batch(99)
    found: dict[str, Any] = {}

    def case(name: str, run: Callable[[], Any]) -> None:
        began = time.monotonic()
        found[name] = run()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)

    case("ddp alone", lambda: train(replicated, None))
    case("ddp", lambda: train(replicated, out / "ddp", probe=probe))
    case("ddp without a probe", lambda: train(replicated, out / "ddp2"))
    case("ddp talks", lambda: train(replicated, out / "ddp3", talks_in_forward, probe=probe))
    case("ddp cannot open", lambda: train(replicated, Path("/proc/nowhere"), probe=probe))
    case("fsdp alone", lambda: train(sharded, None))
    case("fsdp", lambda: train(sharded, out / "fsdp", probe=probe, dtype="float32"))
    case("fsdp without a probe", lambda: train(sharded, out / "fsdp2", every=2))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    case("fsdp mixed alone", lambda: train(lambda: sharded(policy), None))
    case("fsdp mixed", lambda: train(lambda: sharded(policy), out / "fsdp3", probe=probe))
    fails = fails_in_eval("bert.encoder.layer.1", 0)
    case("fsdp fails", lambda: train(sharded, out / "fsdp4", fails, probe=probe))
    case("fsdp too large", lambda: train(sharded, out / "fsdp5", too_large_on_rank_1, probe=probe))
    case("fsdp paced", lambda: train(sharded, out / "fsdp6", probe=probe, overhead=0.0001))
    case("fsdp cannot open", lambda: refused(sharded()[1], Path("/proc/nowhere")))

    ranks.PATIENCE_S = 1.0
    case("fsdp one rank", lambda: refused(sharded()[1], out / "none") if rank == 0 else "")
    if rank == 1:
        next(ranks._watches)
    case("fsdp1", lambda: refused(FullyShardedDataParallel(bert(), device_id=torch.device("cpu")), out / "none"))
    mesh = init_device_mesh("cpu", (2,))
    split = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
    case("tensor parallel", lambda: refused(split, out / "none"))
    late = bert()

    def shard_late() -> None:
        if not isinstance(late, FSDPModule):
            fully_shard(late)

    case("sharded late", lambda: train(lambda: (late, late), out / "late", probe=probe, each=shard_late, every=2))
    return found


def main(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    where = f"file://{out}/rendezvous"
    distributed.init_process_group("gloo", where, timeout=timedelta(seconds=30), rank=rank, world_size=2)
    (out / f"rank{rank}.json").write_text(json.dumps(cases(out)))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
