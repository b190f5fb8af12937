from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from headscope import store
from headscope.blob import encode
from headscope.errors import NoSuchName, StoreError
from headscope.store import Files, StepFile
from test_blob import every_dtype, same

torch.set_num_threads(1)
Array = NDArray[Any]


def test_a_header_larger_than_one_read_is_read(tmp_path: Path) -> None:
    blob = encode({"a": np.arange(8, dtype=np.uint8)}, {"calls": "x" * 100_000})
    (tmp_path / "x.safetensors").write_bytes(blob)
    header = Files(tmp_path).header("x.safetensors", len(blob))
    assert len(header.metadata["calls"]) == 100_000
    assert Files(tmp_path).read("x.safetensors", header, [("a", ())])[0].tolist() == list(range(8))


def test_parts_of_tensors_are_read_by_leading_indices(tmp_path: Path) -> None:
    tensors = every_dtype()
    blob = encode(tensors, {})
    (tmp_path / "x.safetensors").write_bytes(blob)
    files = Files(tmp_path)
    header = files.header("x.safetensors", len(blob))
    wants: list[tuple[str, tuple[int, ...]]] = []
    for key in tensors:
        wants.append((key, ()))
        if key.endswith(".q"):
            wants += [(key, (1,)), (key, (1, 2)), (key, (0, 1, 4))]
    for (key, lead), found in zip(wants, files.read("x.safetensors", header, wants), strict=True):
        assert same(found, np.asarray(tensors[key][lead])), (key, lead)


def test_parts_that_are_not_there_are_named(tmp_path: Path) -> None:
    blob = encode({"probe/0/a.q": np.zeros((2, 3))}, {})
    (tmp_path / "x.safetensors").write_bytes(blob)
    files = Files(tmp_path)
    header = files.header("x.safetensors", len(blob))
    with pytest.raises(NoSuchName, match=r"no tensor 'probe/0/a.k' in x.safetensors; nearest is 'probe/0/a.q'"):
        files.read("x.safetensors", header, [("probe/0/a.k", ())])
    for lead in ((2,), (-1,), (1, 3)):
        with pytest.raises(NoSuchName, match=r"index -?\d in 'probe/0/a.q' of x.safetensors, whose axis has [23]"):
            files.read("x.safetensors", header, [("probe/0/a.q", lead)])


def test_a_file_that_shrank_or_went_away_is_a_store_error(tmp_path: Path) -> None:
    blob = encode({"a": np.zeros(100)}, {})
    (tmp_path / "x.safetensors").write_bytes(blob)
    files = Files(tmp_path)
    header = files.header("x.safetensors", len(blob))
    (tmp_path / "x.safetensors").write_bytes(blob[:-80])
    with pytest.raises(StoreError, match=r"x\.safetensors"):
        files.read("x.safetensors", header, [("a", ())])
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(StoreError, match=r"cannot read x\.safetensors in .*"):
        files.read("x.safetensors", header, [("a", ())])


def test_files_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    files = Files(tmp_path / "later")
    assert files.names() == []
    assert files.get("live.json") is None
    assert files.json("live.json") is None
    with pytest.raises(StoreError, match=r"cannot read x: .*later is gone"):
        files.header("x", 100)
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "live.json").write_text('{"counter": 1}')
    assert files.json("live.json") == {"counter": 1}
    assert [name for name, _, _ in files.names()] == ["live.json"]
    assert files.names("live.json") == []


def test_json_that_is_none_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(StoreError, match=r"a\.json in .* is not JSON: "):
        Files(tmp_path).json("a.json")
    with pytest.raises(StoreError, match=r"b\.json in .* is list, not an object"):
        Files(tmp_path).json("b.json")


def test_names_tell_what_a_file_is() -> None:
    name = "a012/steps/0000000100-r00001-of-00002-5f0c22d1.safetensors"
    assert StepFile.of(name, 9) == StepFile(name, 9, 12, 100, 1, 2, "5f0c22d1")
    assert StepFile.of(name + "#1", 9) is None
    assert StepFile.of(name.replace("steps", "timeline"), 9) is None
    assert store.block_of("a003/timeline/r00001-00002.safetensors") == (3, 1, 2)
    assert store.block_of(name) is None
