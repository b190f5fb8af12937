"""Real training processes for tests of faults, forked from one that has imported torch.

Run as a script it is that process: each line on its standard input is a JSON list (case, folder, options), for which
it forks a trainer and prints its process id; what the trainer prints goes to `<folder>.err`. For ("wait", process id,
{}) it waits and prints the exit code. An exception that leaves a trainer leaves the script, as in a script of its own.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Trainer:
    """One training process."""

    def __init__(self, owner: "Trainers", pid: int, out: Path) -> None:
        self.owner, self.pid, self.out = owner, pid, out

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, as subprocess counts."""
        return self.owner.ask("wait", str(self.pid), {})

    @property
    def errors(self) -> str:
        return Path(f"{self.out}.err").read_text()


class Trainers:
    """Starts them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "trainers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, *line: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, case: str, out: Path, **options: Any) -> Trainer:
        return Trainer(self, self.ask(case, str(out), options), out)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()


def until(true: Any, timeout_s: float = 30, pause_s: float = 0.002) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(pause_s)


# Below: what runs in a trainer.


def train(out: str, *, then: str = "", steps: int = 3, pause_s: float = 0.0, size: int = 4, **options: Any) -> None:
    """A plain loop under watch, that ends as `then` says."""
    import torch

    import models
    from headscope import watch

    tokens = options.pop("length", 12)
    model = Slow() if then == "interrupted capture" else models.Plain()
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    ids = torch.randint(5, models.VOCABULARY, (size, tokens), generator=torch.Generator().manual_seed(0))
    try:
        with watch(model, out, probe=ids, every=1, **options) as watched:
            for step in range(steps):
                loss = model(ids).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                watched.log(loss=loss)
                Path(f"{out}.step").write_text(str(step + 1))
                time.sleep(pause_s)
            end(then)
    except KeyboardInterrupt:
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        Path(f"{out}.state").write_text(f"{all(m.training for m in model.modules())} {hooks}")
        raise
    Path(f"{out}.done").write_text("")


def end(then: str) -> None:
    if then.startswith("exit"):
        sys.exit(int(then.split()[1]))
    if then == "_exit":
        os._exit(7)
    if then == "raise":
        raise ValueError("no data\nat all")
    if then == "fork":
        if os.fork() == 0:
            sys.exit(0)
        os.wait()


def Slow() -> Any:
    import models

    class Slow(models.Plain):
        """Takes its time in eval, and says that it does."""

        def forward(self, ids: Any, mask: Any = None) -> Any:
            if not self.training and Path(os.environ["CASE"] + ".step").exists():
                Path(os.environ["CASE"] + ".capturing").write_text("")
                time.sleep(0.5)
            return super().forward(ids, mask)

    return Slow()


def limited(out: str, kilobytes: int, **options: Any) -> None:
    """No file may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))
    train(out, **options)


def as_nobody(out: str, **options: Any) -> None:
    os.setgid(65534)
    os.setuid(65534)
    train(out, **options)


def without_memory(out: str, **options: Any) -> None:
    """The process has room for training and for no large probe."""
    import models

    class Large(models.Plain):
        def forward(self, ids: Any, mask: Any = None) -> Any:
            if not self.training:
                ids.new_zeros(1 << 30)
            return super().forward(ids, mask)

    models.Plain = Large  # type: ignore[misc]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
    train(out, **options)


def strict(out: str, **options: Any) -> None:
    """python -W error, and a capture that fails."""
    import models

    class Deaf(models.Plain):
        def forward(self, ids: Any, mask: Any = None) -> Any:
            if not self.training:
                warnings.warn("slow in eval", UserWarning, stacklevel=2)
            return super().forward(ids, mask)

    models.Plain = Deaf  # type: ignore[misc]
    warnings.simplefilter("error")
    train(out, **options)


def daemon(out: str, **options: Any) -> None:
    """Training in a daemon thread, which the interpreter leaves behind."""
    thread = threading.Thread(
        target=train, args=(out,), kwargs={**options, "steps": 10_000, "pause_s": 0.01}, daemon=True
    )
    thread.start()
    until(lambda: Path(f"{out}.step").exists())


def forked(out: str, **options: Any) -> None:
    """A run is open, and a process forked from this one opens another."""
    train(out, **options)
    if os.fork() == 0:
        train(f"{out}-2", **options)
    _, status = os.wait()
    sys.exit(os.waitstatus_to_exitcode(status))


def serve() -> None:
    """Forks a trainer for each line."""
    import torch
    import torch._dynamo  # Optimizers import it, which takes seconds.

    import headscope
    import models

    assert headscope.watch is not None
    assert models.VOCABULARY
    torch.set_num_threads(1)
    for line in sys.stdin:
        case, out, options = json.loads(line)
        if case == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(int(out), 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os.environ["CASE"] = out
            errors = os.open(f"{out}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
            os.dup2(errors, 1)
            os.dup2(errors, 2)
            globals()[case](out, **options)
            return
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
