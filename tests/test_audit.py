from __future__ import annotations

from pathlib import Path

import pytest

from headscope.audit import audit
from headscope.errors import NoSuchName
from runs import make, put_probe, put_step, writer


def only(path: Path, pattern: str) -> Path:
    found = sorted(path.glob(pattern))
    assert found
    return found[0]


def test_a_sound_run_has_no_faults(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = audit(make(tmp_path, [0, 1]), lambda done, total: seen.append((done, total)))
    assert found.faults == []
    assert (found.checked, found.unchecked) == (4, 0)
    assert 0 < found.worst < 1e-5
    assert seen[-1] == (found.files, found.files) and found.size_bytes == sum(
        file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()
    )


@pytest.mark.parametrize("pattern", ["a000/steps/*", "a000/probe.safetensors", "a000/timeline/*"])
def test_one_flipped_bit_is_found_anywhere(tmp_path: Path, pattern: str) -> None:
    file = only(make(tmp_path, [0]), pattern)
    blob = bytearray(file.read_bytes())
    blob[-3] ^= 16
    file.write_bytes(blob)
    (fault,) = audit(tmp_path).faults
    assert "does not match its checksum" in fault and file.name in fault


def test_a_cut_file_is_found(tmp_path: Path) -> None:
    file = only(make(tmp_path, [0]), "a000/steps/*")
    file.write_bytes(file.read_bytes()[:-1])
    (fault,) = audit(tmp_path).faults
    assert "it is damaged or unfinished" in fault


def test_a_file_under_another_steps_name_is_found(tmp_path: Path) -> None:
    file = only(make(tmp_path, [0]), "a000/steps/*")
    file.rename(file.with_name(file.name.replace("0000000000", "0000000009")))
    (fault,) = audit(tmp_path).faults
    assert fault.endswith("its step is '0' inside, '9' by name")


def test_a_failing_self_check_is_a_fault(tmp_path: Path) -> None:
    run = writer(tmp_path)
    put_probe(run)
    put_step(run, 0, break_layer=1)
    run.close()
    (fault,) = audit(tmp_path).faults
    assert "layer.1 fails its self-check" in fault


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(NoSuchName, match=r"which has no headscope\.json; give the folder that was passed to"):
        audit(tmp_path)
