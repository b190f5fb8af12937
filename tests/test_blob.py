import json
import re
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray

from headscope import blob as blobs
from headscope.blob import Header, Image, decode, encode, faults, parse_header
from headscope.errors import StoreError
from headscope.store import Files

torch.set_num_threads(1)
Array = NDArray[Any]


def every_dtype() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {}
    for code, dtype in blobs.DTYPES.items():
        tensors[f"probe/0/{code.lower()}.q"] = (rng.random((2, 3, 5)) * 4 - 1).astype(dtype)
        tensors[f"probe/0/{code.lower()}.empty"] = np.zeros((2, 0, 3), dtype)
        tensors[f"probe/0/{code.lower()}.number"] = np.array(1, dtype)
    return tensors


def same(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def test_every_dtype_shape_and_string_comes_back() -> None:
    tensors = every_dtype()
    found, header = decode(encode(tensors, {"step": "7", "text": 'naïve "ü" \n'}))
    assert found.keys() == tensors.keys()
    assert all(same(found[key], tensors[key]) for key in tensors)
    assert header.metadata["step"] == "7"
    assert header.metadata["text"] == 'naïve "ü" \n'
    assert header.facts("crc32c", dict) == {key: blobs.checksum(tensor) for key, tensor in tensors.items()}


def test_no_tensor_at_all_comes_back() -> None:
    found, header = decode(encode({}, {"facts": "{}"}))
    assert found == {}
    assert header.metadata["facts"] == "{}"


def test_the_stock_package_opens_it(tmp_path: Path) -> None:
    tensors = every_dtype()
    blob = encode(tensors, {"step": "7"})
    path = tmp_path / "a.safetensors"
    path.write_bytes(blob)
    by_torch = safetensors.torch.load_file(path)
    assert by_torch.keys() == tensors.keys()
    for key, tensor in tensors.items():
        wide = tensor.astype(np.float64)
        assert by_torch[key].shape == tensor.shape
        assert np.array_equal(by_torch[key].double().numpy(), wide), key
    assert by_torch["probe/0/bf16.q"].dtype == torch.bfloat16
    by_numpy = safetensors.numpy.load_file(path)
    assert all(same(by_numpy[key], tensors[key]) for key in tensors if "bf16" not in key)
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata()["step"] == "7"
        assert json.loads(opened.metadata()["crc32c"]).keys() == tensors.keys()


def test_what_the_stock_package_writes_is_read(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {
        "probe/0/a.q": np.arange(6, dtype=np.float32).reshape(2, 3),
        "probe/0/b.k": np.ones(3, np.float16),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {"step": "3"})
    found, header = decode((tmp_path / "a.safetensors").read_bytes(), "a.safetensors")
    assert all(same(found[key], tensors[key]) for key in tensors)
    assert header.metadata == {"step": "3"}


def test_bfloat16_by_torch_is_the_same_bits() -> None:
    numbers = torch.randn(64, dtype=torch.bfloat16)
    blob = encode({"q": np.array(numbers.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)}, {})
    assert torch.equal(safetensors.torch.load(blob)["q"], numbers)


def filled(image: Image, number: int, *, shape: tuple[int, ...] = (2, 3)) -> dict[str, Array]:
    slots = {key: image.slot(key, np.dtype(dtype), shape) for key, dtype in (("b", "f2"), ("a", "f2"), ("c", "f4"))}
    for index, slot in enumerate(slots.values()):
        slot[...] = number + index
    return slots


def test_an_image_used_again_is_as_a_fresh_one_and_copies_nothing() -> None:
    image = Image()
    filled(image, 1)
    image.seal({"step": "1"})
    kept = {key: image[key] for key in "abc"}
    for number in (2, 3):
        image.again()
        slots = filled(image, number)
        assert all(slots[key] is kept[key] for key in kept)
        blob = image.seal({"step": str(number)})
        assert all(image[key] is kept[key] for key in kept), "sealing moved nothing"
        where = np.frombuffer(blob, np.uint8)
        assert all(np.shares_memory(where, kept[key]) for key in kept)
        fresh = Image()
        filled(fresh, number)
        assert bytes(blob) == bytes(fresh.seal({"step": str(number)}))


def test_an_image_used_again_with_other_slots_is_as_a_fresh_one() -> None:
    image = Image()
    filled(image, 1)
    image.seal({})
    for shape in ((4, 3), (2, 3), (1,)):
        image.again()
        filled(image, 5, shape=shape)
        fresh = Image()
        filled(fresh, 5, shape=shape)
        assert bytes(image.seal({"n": "1"})) == bytes(fresh.seal({"n": "1"}))
    image.again()
    image.slot("a", np.dtype("f2"), (1,))[...] = 9
    found, _ = decode(bytes(image.seal({})))
    assert list(found) == ["a"], "what is not filled is not in the file"
    assert found["a"] == 9


def test_an_image_survives_a_longer_header() -> None:
    image = Image()
    filled(image, 1)
    image.seal({})
    image.again()
    filled(image, 2)
    blob = bytes(image.seal({"calls": "x" * 9000}))
    found, header = decode(blob)
    assert faults(blob, "f") == [f"f: tensor '{key}' carries no checksum" for key in "cab"]
    assert [found[key][0, 0] for key in "bac"] == [2, 3, 4]
    assert header.metadata["calls"] == "x" * 9000


def test_slots_that_cannot_be_are_refused() -> None:
    image = Image()
    image.slot("a", np.dtype("f4"), (1,))
    with pytest.raises(StoreError, match="tensor 'a' stands twice in one file"):
        image.slot("a", np.dtype("f4"), (1,))
    with pytest.raises(StoreError, match="tensor 'b' has dtype complex64, the format knows F64, F32, F16, BF16"):
        image.slot("b", np.dtype("c8"), (1,))


def test_data_begins_at_a_page_and_falls_in_item_size_then_key() -> None:
    for metadata in ({}, {"a": "x" * 3400}, {"a": "x" * 3600}, {"a": "x" * 20000}):
        blob = encode(every_dtype(), metadata)
        length = struct.unpack("<Q", blob[:8])[0]
        assert (8 + length) % 4096 == 0
        header = parse_header(blob[: 8 + length], len(blob), "f")
        assert blob[8 + length - 1 : 8 + length] == b" "
        keys = sorted(header.entries, key=lambda key: (-header.entries[key].dtype.itemsize, key))
        at = 8 + length
        for key in keys:
            assert header.entries[key].start == at, key
            assert (at - 8 - length) % header.entries[key].dtype.itemsize == 0
            at = header.entries[key].end
        assert at == len(blob)


def test_the_layout_is_the_same_only_for_the_same_shape_and_calls() -> None:
    def layout(image: Image, calls: object, **metadata: str) -> str:
        found = image.layout(metadata, calls)
        image.seal(metadata)
        return found

    first, again = Image(), Image()
    filled(first, 1)
    one = layout(first, [{"scale": 1}], step="1")
    assert re.fullmatch("[0-9a-f]{8}", one)
    first.again()
    filled(first, 2)
    assert layout(first, [{"scale": 1}], step="2") == one
    filled(again, 2)
    assert layout(again, [{"scale": 1}], step="2") == one
    assert layout(again, [{"scale": 2}], step="2") != one
    other = Image()
    filled(other, 1, shape=(3, 2))
    assert layout(other, [{"scale": 1}], step="1") != one
    longer = Image()
    filled(longer, 1)
    assert layout(longer, [{"scale": 1}], step="1", note="x" * 5000) != one
    renamed = Image()
    for key, dtype in (("b", "f2"), ("a", "f2"), ("d", "f4")):
        renamed.slot(key, np.dtype(dtype), (2, 3))
    assert layout(renamed, [{"scale": 1}], step="1") != one


def test_one_flipped_bit_is_found() -> None:
    tensors: dict[str, Array] = {"probe/0/a.q": np.arange(6, dtype=np.float32), "probe/0/b.k": np.ones(4, np.float16)}
    blob = encode(tensors, {})
    assert faults(blob, "f.safetensors") == []
    _, header = decode(blob)
    for key, entry in header.entries.items():
        for at in (entry.start, entry.end - 1):
            bad = bytearray(blob)
            bad[at] ^= 16
            assert faults(bytes(bad), "f.safetensors") == [
                f"f.safetensors: tensor {key!r} from byte {entry.start} on does not match its checksum"
            ]


def test_a_tensor_without_a_checksum_is_a_fault() -> None:
    blob = safetensors.numpy.save({"a": np.zeros(3)})
    assert faults(blob, "f") == ["f: tensor 'a' carries no checksum"]
    assert faults(safetensors.numpy.save({"a": np.zeros(3)}, {"crc32c": "[]"}), "f") == [
        "f: metadata 'crc32c' is list, not dict"
    ]
    assert (
        "f: metadata 'crc32c' is not JSON"
        in faults(safetensors.numpy.save({"a": np.zeros(3)}, {"crc32c": "{"}), "f")[0]
    )


def test_one_flipped_bit_of_the_header_is_found() -> None:
    blob = encode({"probe/0/a.q": np.arange(6, dtype=np.float32)}, {"calls": "[]", "step": "7"})
    length = struct.unpack("<Q", blob[:8])[0]
    assert decode(blob)[1].sealed
    assert next(iter(decode(blob)[1].metadata)) == "header"
    for at in range(8, 8 + length, 7):
        bad = bytearray(blob)
        bad[at] ^= 1
        try:
            header = decode(bytes(bad), "f")[1]
        except StoreError as problem:
            assert str(problem).startswith("f: ")
        else:
            assert not header.sealed
            assert at < 8 + 27, "a seal that is not recognised is told"


def test_a_header_like_another_is_parsed_for_its_metadata_alone() -> None:
    one, two = (encode({"a": np.full(3, n, np.int8)}, {"step": str(n)}) for n in (1, 2))
    first = parse_header(one, len(one), "one")
    header = parse_header(two, len(two), "two", first)
    assert (header.entries, header.metadata["step"]) == (first.entries, "2")
    other = encode({"b": np.full(3, 2, np.int8)}, {"step": "2"})
    with pytest.raises(StoreError, match="other: its tensors are not those of one, which has the same layout id"):
        parse_header(other, len(other), "other", first)
    with pytest.raises(StoreError, match="two: the file has 4100 bytes, its header promises 4099"):
        parse_header(two, len(two) + 1, "two", first)


def test_whole_tensors_are_checked() -> None:
    blob = bytearray(encode({"a": np.arange(3.0), "b": np.array([True])}, {}))
    blob[-1] = 2
    with pytest.raises(StoreError, match="f: tensor 'b' from byte 4120 on does not match its checksum"):
        blobs.decode_sound(bytes(blob), "f")
    with pytest.raises(StoreError, match="f: tensor 'b' is BOOL but holds bytes other than 0 and 1; it is damaged"):
        blobs.truthful(decode(bytes(blob), "f")[0]["b"], "b", "f")


@pytest.mark.parametrize(
    ("text", "problem"),
    [('{"a":1,"a":2}', "a key stands twice"), ("[NaN]", "NaN is no JSON number"), ("[-Infinity]", "-Infinity is no")],
)
def test_json_is_strict(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        blobs.loads(text)


def test_half_a_surrogate_pair_is_a_question_mark() -> None:
    assert blobs.loads('["\\ud800", "\\ud83d\\ude00"]') == ["?", "\U0001f600"]


def test_a_header_that_no_reader_takes_is_not_written() -> None:
    image = Image()
    with pytest.raises(StoreError, match="is longer than the 33554432 that readers take"):
        image.seal({"tokens": "x" * (33 << 20)})


def forged(header: str | bytes, data: int = 8) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def one_tensor(dtype: str = '"U8"', shape: str = "[8]", offsets: str = "[0,8]", key: str = "a") -> bytes:
    return forged(f'{{"{key}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}')


GOOD = encode({"a": np.arange(8, dtype=np.uint8)}, {})
TWO = '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[%d,%d]}}'
DAMAGED = {
    "truncated": (GOOD[:-1], "the file has 4103 bytes, its header promises 4104; it is damaged or unfinished"),
    "extended": (GOOD + b"\0", "the file has 4105 bytes, its header promises 4104; it is damaged or unfinished"),
    "empty": (b"", "0 bytes are too few for a safetensors file; it is damaged or unfinished"),
    "seven bytes": (GOOD[:7], "7 bytes are too few for a safetensors file"),
    "zero-filled": (bytes(len(GOOD)), "the header, bytes 8 to 8, is not JSON as it should be"),
    "half a header": (GOOD[:2000], "byte 0 promises a header of 4088 bytes, the file has 2000; it is damaged"),
    "huge length": (b"\xff" * 8 + GOOD[8:], "byte 0 promises a header of 18446744073709551615 bytes"),
    "overlap": (forged(TWO % (3, 7)), "tensor 'b' begins at byte 116, but 117 is where the one before ends"),
    "hole": (forged(TWO % (5, 9), 9), "tensor 'b' begins at byte 118, but 117 is where the one before ends"),
    "hole before": (one_tensor(shape="[7]", offsets="[1,8]"), "tensor 'a' begins at byte"),
    "negative offset": (one_tensor(offsets="[-8,0]"), "tensor 'a' of shape (8,) does not fit its bytes -8 to 0"),
    "negative shape": (one_tensor(shape="[-2,-4]"), "tensor 'a' of shape (-2, -4) does not fit its bytes 0 to 8"),
    "shape too large": (one_tensor(shape="[9]"), "tensor 'a' of shape (9,) does not fit its bytes 0 to 8"),
    "huge shape": (one_tensor(shape=f"[{2**62},4]"), "does not fit its bytes 0 to 8"),
    "shape of floats": (one_tensor(shape="[8.0]"), "tensor 'a' of shape (8.0,) does not fit its bytes 0 to 8"),
    "shape of truth": (one_tensor(shape="[8,true]"), "tensor 'a' of shape (8, True) does not fit"),
    "shape a string": (one_tensor(shape='"8"'), "does not fit its bytes 0 to 8"),
    "unknown dtype": (one_tensor(dtype='"F8_E4M3"'), "tensor 'a' is described by {'dtype': 'F8_E4M3'"),
    "dtype a list": (one_tensor(dtype="[]"), "want a known dtype, shape and data_offsets"),
    "three offsets": (one_tensor(offsets="[0,8,9]"), "want a known dtype, shape and data_offsets"),
    "entry a number": (forged('{"a":1}'), "tensor 'a' is described by 1; want a known dtype, shape and data_offsets"),
    "key twice": (
        forged(
            '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
        ),
        "is not JSON as it should be: a key stands twice",
    ),
    "name with ..": (one_tensor(key="probe/../a"), "tensor 'probe/../a' of shape (8,) does not fit"),
    "name from the root": (one_tensor(key="/etc/a"), "tensor '/etc/a' of shape (8,) does not fit"),
    "name with a newline": (one_tensor(key="a\\n"), "tensor 'a\\n' of shape (8,) does not fit"),
    "a list": (forged("[]", 0), "the header at byte 8 is list, not an object"),
    "not text": (forged(b"\xff\xfe\x00{"), "is not JSON as it should be"),
    "deep": (forged("[" * 100_000), "is not JSON as it should be"),
    "metadata a number": (forged('{"__metadata__":{"step":1}}', 0), "__metadata__ must hold strings only"),
    "too many axes": (one_tensor(shape=str([1] * 40 + [8])), "tensor 'a' has 41 axes, at most 32 are allowed"),
    "huge and empty": (one_tensor(shape=f"[0,{2**40},{2**40}]", offsets="[0,0]"), "does not fit its bytes 0 to 0"),
    "metadata a list": (forged('{"__metadata__":[]}', 0), "__metadata__ must hold strings only"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_a_store_error_that_names_it(kind: str, tmp_path: Path) -> None:
    blob, message = DAMAGED[kind]
    with pytest.raises(StoreError, match=re.escape(message)) as problem:
        decode(blob, "a000/x.safetensors")
    assert str(problem.value).startswith("a000/x.safetensors: ")
    assert faults(blob, "a000/x.safetensors") == [str(problem.value)]
    (tmp_path / "x.safetensors").write_bytes(blob)
    with pytest.raises(StoreError, match=re.escape(message)):
        Files(tmp_path).header("x.safetensors", len(blob))


def test_metadata_that_is_not_what_it_should_be() -> None:
    header = Header("f", {}, {"calls": "[1]", "bad": "{"}, 0)
    assert header.facts("calls", list) == [1]
    assert header.facts("none", dict) == {}
    with pytest.raises(StoreError, match="f: metadata 'calls' is list, not dict"):
        header.facts("calls", dict)
    with pytest.raises(StoreError, match="f: metadata 'bad' is not JSON"):
        header.facts("bad", dict)


# Writing.
