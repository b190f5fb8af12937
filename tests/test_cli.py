from __future__ import annotations

import json
from pathlib import Path

import pytest

from headscope import __version__
from headscope.cli import main
from runs import make


def test_info_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(make(tmp_path, [0, 5]))]) == 0
    said = capsys.readouterr().out
    for words in ("Noise", "0, 5; attempt 0", "2 of 4 heads, by sdpa", "loss 0.1667", "ended"):
        assert words in said


def test_info_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(make(tmp_path, [0, 5])), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["steps"], facts["state"], facts["modes"]) == ([0, 5], "ended", ["probe"])
    assert facts["layers"][1] == {
        "path": "layer.1",
        "call": 0,
        "heads": 4,
        "kv_heads": 4,
        "route": "sdpa",
        "dtype": "float32",
        "check": facts["layers"][1]["check"],
        "passed": True,
    }


def test_check_exit_status_tells_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make(tmp_path, [0, 5]))
    assert main(["check", run]) == 0
    assert capsys.readouterr().out.endswith("\n0 faults\n")
    next(tmp_path.glob("a000/steps/*")).write_bytes(b"short")
    assert main(["check", run]) == 1
    assert "FAULT" in capsys.readouterr().out
    assert main(["check", run, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 1


def test_a_folder_above_runs_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", [0])
    make(tmp_path / "b", [0])
    for command in ("info", "check"):
        assert main([command, str(tmp_path)]) == 2
        assert "which has runs in it: a, b; give the folder" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "a" / "live.json")]) == 2
    assert "live.json, which is a file; give" in capsys.readouterr().err


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info", "check"):
        assert main([command, str(tmp_path / "none")]) == 2
        assert "give the folder that was passed to headscope.watch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["demo", "--steps", "0"], "want a whole number from 1 on, not '0'"),
        (["serve", "x", "--port", "99999"], "want a port from 0 to 65535, not '99999'"),
        ([], "COMMAND"),
    ],
)
def test_bad_arguments(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert says in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"headscope {__version__}\n"
