"""The pages are true: their code runs, their commands exist, and nothing public is left out."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import headscope
from headscope import cli
from models import bert

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
GUIDE = (ROOT / "docs" / "guide.md").read_text()
README = (ROOT / "README.md").read_text()


class Words:
    """A tokenizer of letters, enough for what the pages do."""

    all_special_ids = (1, 2)
    pad_token_id = 0
    model_max_length = 16

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids = [1, *(3 + ord(letter) % 20 for letter in text[:10]), 2]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"t{i}" for i in ids]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(self.convert_ids_to_tokens(ids))


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def training() -> dict[str, Any]:
    """The names that the pages' code takes for granted."""
    model = bert().train()
    batch = {"input_ids": torch.randint(3, 20, (4, 8)), "labels": torch.tensor([0, 1, 0, 1])}
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": [batch] * 3,
        "texts": ["a dull film", "a fine one"],
        "tokenizer": Words(),
        "train_set": [{"input_ids": list(range(3, 11)), "labels": 1}] * 4,
        "eval_set": [{"input_ids": list(range(3, 11)), "labels": 0}],
    }


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.parametrize("page", ["README", "guide"])
def test_code_of_the_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = training()
    found = blocks(README if page == "README" else GUIDE)
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)
    assert headscope.open_trial("runs/a").steps() == [0, 3]
    if page == "guide":
        assert names["weights"].shape[:2] == (2, names["layers"][0].heads)
        assert names["names"] and len(names["losses"]) == 3


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli._parser()
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_every_command_and_option_is_in_the_guide_and_only_those() -> None:
    for name, parser in commands().items():
        assert f"headscope {name}" in GUIDE
        for option in (o for a in parser._actions for o in a.option_strings if o.startswith("--") and o != "--help"):
            assert option in GUIDE, f"{option} of `headscope {name}` is not in docs/guide.md"
    for page in (README, GUIDE):
        for line in re.findall(r"^headscope [^#\n]*", page, re.MULTILINE):
            cli._parser().parse_args(shlex.split(line)[1:])


def test_every_public_name_is_in_the_pages() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name in headscope.__all__:
        assert re.search(rf"\b{name}\b", text), f"{name} is in no page"


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_that_the_pages_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"\bmake ([a-z][a-z-]*)\b(?=[`\s]*(?:#|$|`))", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name} names `make {target}`"


def test_readme_opens_with_the_two_commands_and_ten_lines_of_code() -> None:
    head = README.splitlines()[:18]
    assert head[2].startswith("    make demo") and head[3].startswith("    make test")
    assert len(blocks("\n".join(head))[0].splitlines()) <= 10


def test_the_version_is_the_changelogs() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == headscope.__version__


def test_no_page_names_a_path_of_one_machine() -> None:
    tracked = [*PAGES, *ROOT.glob("src/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("examples/*.py")]
    marks = [os.sep + word + os.sep for word in ("work", "root", "home")]
    for file in tracked:
        assert not any(mark in file.read_text() for mark in marks), file
