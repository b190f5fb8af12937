"""The command line: headscope demo | serve | info | check | replay."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from . import __version__
from .answer import newest_layers
from .audit import audit
from .blob import Json
from .errors import HeadscopeError, Missing, shorten
from .store import Files
from .trial import Trial, open_trial


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 faults found, 2 not possible."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.command(args)
    except HeadscopeError as problem:
        print(f"headscope: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headscope", description="See what every attention head does while it trains."
    )
    parser.add_argument("--version", action="version", version=f"headscope {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small BERT, watched, with its page open")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="where the run is written (%(default)s)")
    demo.add_argument("--steps", type=_positive, default=300, metavar="N", help="optimiser steps (%(default)s)")
    demo.add_argument("--no-serve", action="store_true", help="train only, without the page")
    demo.add_argument("--port", type=_port, default=None, metavar="P", help="of the page")
    demo.add_argument("--no-browser", action="store_true", help="do not open a browser")
    demo.set_defaults(command=_demo)

    serve = commands.add_parser("serve", help="show a run in the browser, live; it need not exist yet")
    serve.add_argument("run", metavar="RUN")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s); elsewhere a token is needed")
    serve.add_argument("--port", type=_port, default=None, metavar="P", help="the first port to try; 0 takes any")
    serve.add_argument("--browser", action="store_true", help="open the page")
    serve.set_defaults(command=_serve)

    replay = commands.add_parser("replay", help="run examples through checkpoints that exist, into a run")
    replay.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINTS", help="checkpoint-* folders, or what they are in"
    )
    replay.add_argument(
        "--probe", required=True, metavar="FILE", help="a text per line, tab and label after it; or .jsonl"
    )
    replay.add_argument("--out", required=True, metavar="RUN", help="where the run is written")
    replay.add_argument("--tokenizer", metavar="DIR", help="of the model, where the checkpoints have none")
    replay.add_argument("--dtype", choices=["float16", "float32"], help="how q and k of a float32 model are kept")
    replay.set_defaults(command=_replay)

    info = commands.add_parser("info", help="what is in a run")
    check = commands.add_parser("check", help="read every file, every checksum, and repeat every self-check")
    for command, run in ((info, _info), (check, _check)):
        command.add_argument("run", metavar="RUN")
        command.add_argument("--json", action="store_true", help="as one JSON object")
        command.set_defaults(command=run)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"want a whole number from 1 on, not {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"want a port from 0 to 65535, not {text!r}")
    return int(text)


def _demo(args: argparse.Namespace) -> int:
    from .server import PORT

    try:
        from .demo import run
    except ModuleNotFoundError as problem:
        if problem.name not in ("torch", "transformers", "tokenizers"):
            raise
        raise Missing(
            f"the demo trains a model and needs {problem.name}, which is not installed: "
            f"pip install torch transformers (see 'Install' in the README for CPU and GPU builds)"
        ) from problem
    port = PORT if args.port is None else args.port
    run(args.out, steps=args.steps, serve=not args.no_serve, port=port, browser=not args.no_browser)
    return 0


def _serve(args: argparse.Namespace) -> int:
    from .server import PORT, serve

    port = PORT if args.port is None else args.port
    serve(args.run, host=args.host, port=port, browser=args.browser, say=lambda line: print(line, flush=True))
    return 0


def _replay(args: argparse.Namespace) -> int:
    from . import replay
    from .replay import load_tokenizer, read_examples

    probe = read_examples(args.probe)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("replaying", total=None)
        done = replay(
            args.checkpoints,
            args.out,
            probe=probe,
            tokenizer=tokenizer,
            dtype=args.dtype,
            progress=lambda number, total: progress.update(task, completed=number, total=total),
        )
    for name, reason in done.skipped.items():
        print(f"SKIPPED {name}: {reason}")
    print(
        f"{args.out}: {len(done.steps)} checkpoints replayed, steps {shorten(done.steps)}; {len(done.skipped)} skipped"
    )
    return 1 if done.skipped else 0


def facts(trial: Trial) -> Json:
    """What is in a run, as JSON values.

    Raises:
        NoSuchName: there is no run at that path.
    """
    files = Files(trial.path).run()
    state = trial.state()
    layers = newest_layers(trial)
    steps = trial.steps()
    errors = [layer.check.error for layer in layers if layer.check.error is not None]
    return {
        "run": trial.path,
        "state": state.state,
        "alive": state.alive,
        "message": state.message,
        "skipped": state.skipped,
        "attempt": trial.attempt,
        **{key: trial.facts().get(key) for key in ("model", "torch", "transformers", "every", "labels")},
        "steps": steps,
        "modes": trial.modes(),
        "layers": [
            {
                "path": layer.path,
                "call": layer.call,
                "heads": layer.heads,
                "kv_heads": layer.kv_heads,
                "route": layer.route,
                "dtype": layer.dtype,
                "check": layer.check.error,
                "passed": layer.check.passed,
            }
            for layer in layers
        ],
        "worst_check": max(errors, default=None),
        "examples": [{"text": e.text, "tokens": len(e.tokens), "label": e.label} for e in trial.examples()],
        "scalars": {name: float(values[-1]) for name, (_, values) in trial.scalars().items()},
        "files": len(files),
        "size_bytes": sum(size for _, size, _ in files),
        "damaged": trial.damaged,
    }


def _info(args: argparse.Namespace) -> int:
    found = facts(open_trial(args.run))
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    table = Table(show_header=False, box=None, pad_edge=False)
    steps, layers = found["steps"], found["layers"]
    routes = sorted({layer["route"] for layer in layers})
    heads = sorted({layer["heads"] for layer in layers})
    check = "none" if found["worst_check"] is None else f"{found['worst_check']:.1e} worst of step {steps[-1]}"
    for name, value in (
        ("run", found["run"]),
        ("state", found["state"] + (f": {found['message']}" if found["message"] else "")),
        ("model", f"{found['model']} (torch {found['torch']}, transformers {found['transformers']})"),
        ("steps", f"{shorten(steps)}; attempt {found['attempt']}"),
        ("layers", f"{len(layers)} of {shorten(heads)} heads, by {shorten(routes)}"),
        ("self-check", check),
        ("examples", str(len(found["examples"]))),
        ("scalars", shorten([f"{name} {value:.4g}" for name, value in found["scalars"].items()])),
        ("files", f"{found['files']}, {found['size_bytes'] / 1e6:.1f} MB"),
        ("damaged", shorten(found["damaged"].values(), 3)),
    ):
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    Console().print(table)
    return 0


def _check(args: argparse.Namespace) -> int:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=args.json) as progress:
        task = progress.add_task("checking", total=None)
        found = audit(args.run, lambda done, total: progress.update(task, completed=done, total=total))
    if args.json:
        print(json.dumps(found.facts(), indent=1))
    else:
        print(
            f"{found.run}: {found.files} files, {found.size_bytes / 1e6:.1f} MB, {found.tensors} tensors; "
            f"{found.checked} self-checks repeated, worst {found.worst:.1e}; {found.unchecked} without"
        )
        for fault in found.faults:
            print(f"FAULT {fault}")
        print(f"{len(found.faults)} faults")
    return 1 if found.faults else 0
