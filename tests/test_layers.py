import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

import headscope

SOURCE = Path(headscope.__file__).parent

RUNGS = [
    {"errors"},
    {"attention", "blob", "pace"},
    {"facts", "store"},
    {"boundary", "forwards", "ranks", "statistics", "history", "writer"},
    {"trial", "capture", "monitors", "record", "audit"},
    {"why", "answer"},
    {"watch", "notebook", "server", "export"},
    {"demo", "integrations", "smdebug"},
    {"replay"},
    {"cli"},
]
RUNG = {module: number for number, rung in enumerate(RUNGS) for module in rung}
# The package itself is the door: what it hands out it imports only when asked (see test_init).
RUNG["__init__"] = len(RUNGS)
RUNG["__main__"] = len(RUNGS) + 1

WRITE_SIDE = {
    "boundary",
    "forwards",
    "ranks",
    "statistics",
    "capture",
    "record",
    "watch",
    "why",
    "demo",
    "integrations",
    "replay",
}
READ_SIDE = {"facts", "history", "trial", "audit", "monitors", "answer", "notebook", "server", "export"}
ALLOWED = {
    "torch": WRITE_SIDE,
    "transformers": {"demo", "integrations", "replay"},
    "lightning": {"integrations"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "obstore": {"store", "writer"},
    "safetensors": set(),
    "crc32c": {"blob"},
    "anywidget": {"notebook"},
    "rich": {"cli", "demo"},
}


def module_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, depth: int = 0) -> Iterable[tuple[str, str]]:
    """(package, module of it) of every import; our own package is "headscope", whichever way it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield (*name.name.split("."), "")[:2]  # type: ignore[misc]
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level > depth + 1:
                raise AssertionError(f"an import leaves the package: line {node.lineno}")
            if node.level == depth + 1:
                parts = ["headscope", *parts]
            elif node.level:
                continue  # within a sub-package
            for name in node.names:
                yield parts[0], parts[1] if len(parts) > 1 else name.name


def wrongs(module: str, text: str, depth: int = 0) -> list[str]:
    """What in a module's imports breaks the house."""
    found = []
    for package, name in imported(ast.parse(text), depth):
        if package == "headscope":
            if module != "__init__" and name in RUNG and RUNG[name] >= RUNG[module]:
                found.append(f"{module} imports {name}, which is not on a lower rung")
            if module in READ_SIDE and name in WRITE_SIDE:
                found.append(f"{module} reads and imports {name}, which writes")
        elif package in ALLOWED and module not in ALLOWED[package]:
            found.append(f"{module} imports {package}; only {', '.join(sorted(ALLOWED[package])) or 'tests'} may")
    return found


SOURCES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert module_of(path) in RUNG, f"{path.name} stands on no rung of the ladder"
    assert wrongs(module_of(path), path.read_text(), len(path.relative_to(SOURCE).parts) - 1) == []


def test_there_is_something_to_look_at() -> None:
    assert {"errors", "attention", "store", "trial", "record", "answer", "watch"} <= set(map(module_of, SOURCES))
    assert ("headscope", "store") in set(imported(ast.parse((SOURCE / "trial.py").read_text())))
    assert ("torch", "nn") in set(imported(ast.parse((SOURCE / "watch.py").read_text())))


@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    [
        ("store", "from .trial import Trial", "store imports trial, which is not on a lower rung"),
        ("blob", "from . import attention", "blob imports attention, which is not on a lower rung"),
        ("capture", "from .record import Record", "capture imports record, which is not on a lower rung"),
        ("errors", "import headscope.store", "errors imports store, which is not on a lower rung"),
        ("attention", "from headscope.trial import Trial", "attention imports trial, which is not on a lower rung"),
        ("attention", "def f():\n    from headscope import cli", "attention imports cli, which is not on a lower rung"),
        ("answer", "from .record import Record", "answer reads and imports record, which writes"),
        ("server", "from .why import causes", "server reads and imports why, which writes"),
        ("trial", "def f():\n    import torch", "trial imports torch; only boundary, capture"),
        ("answer", "from torch.nn import Module", "answer imports torch; only boundary, capture"),
        ("answer", "import starlette.routing", "answer imports starlette; only server may"),
        ("cli", "import uvicorn as u", "cli imports uvicorn; only server may"),
        ("trial", "from obstore.store import LocalStore", "trial imports obstore; only store, writer may"),
        ("watch", "from safetensors import safe_open", "watch imports safetensors; only tests may"),
        ("answer", "import crc32c", "answer imports crc32c; only blob may"),
        ("server", "import anywidget", "server imports anywidget; only notebook may"),
        ("watch", "from rich.console import Console", "watch imports rich; only cli, demo may"),
        ("__init__", "import torch", "__init__ imports torch; only boundary, capture"),
    ],
)
def test_this_test_can_fail(module: str, text: str, wrong: str) -> None:
    assert len(found := wrongs(module, text)) == 1
    assert found[0].startswith(wrong)


@pytest.mark.parametrize(
    ("module", "text", "depth"),
    [
        ("record", "import torch\nfrom .boundary import Call\nfrom . import attention", 0),
        ("demo", "from headscope import open_trial, watch\nimport rich", 0),
        ("integrations", "from ..watch import Watch\nfrom .shared import x\nimport torch", 1),
        ("cli", "import numpy.typing, json\nfrom .server import serve", 0),
    ],
)
def test_what_is_allowed_passes(module: str, text: str, depth: int) -> None:
    expected = ["demo imports watch, which is not on a lower rung"] if RUNG["watch"] >= RUNG["demo"] else []
    assert wrongs(module, text, depth) == (expected if module == "demo" else [])
