"""The header reader agrees with the library on good files, and refuses all others with one kind of error."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_builder import raw_file
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from shmroute.errors import CheckpointError
from shmroute.sources.safetensors_header import MAX_HEADER_BYTES, TensorEntry, read_header

TINY_MIXTRAL = Path(__file__).parents[2] / "examples" / "tiny-mixtral" / "model.safetensors"


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refuses(tmp_path: Path, content: bytes, reason: str, tensor: str | None = None) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(str(path))
    assert caught.value.path == str(path)
    assert caught.value.tensor == tensor


def test_every_tensor_of_the_shipped_checkpoint_lies_where_the_library_finds_it() -> None:
    raw = TINY_MIXTRAL.read_bytes()
    ours = read_header(str(TINY_MIXTRAL)).tensors
    library = load_file(TINY_MIXTRAL)
    assert ours.keys() == library.keys()
    for name, tensor in library.items():
        assert ours[name].shape == tensor.shape
        assert raw[ours[name].begin : ours[name].end] == tensor.tobytes()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (np.bool_, "BOOL"),
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.int16, "I16"),
        (np.uint16, "U16"),
        (np.int32, "I32"),
        (np.uint32, "U32"),
        (np.int64, "I64"),
        (np.uint64, "U64"),
        (np.float16, "F16"),
        (ml_dtypes.bfloat16, "BF16"),
        (np.float32, "F32"),
        (np.float64, "F64"),
    ],
)
def test_each_dtype_that_the_library_writes_is_read(tmp_path: Path, dtype: Any, stored: str) -> None:
    path = tmp_path / "a.safetensors"
    array = np.arange(6).astype(dtype).reshape(2, 3)
    save_file({"a": array, "scalar": array[0, 0:1].reshape(()), "empty": array[:0]}, path)
    tensors = read_header(str(path)).tensors
    assert {(t.dtype, t.shape) for t in tensors.values()} == {(stored, s) for s in [(2, 3), (), (0, 3)]}
    assert path.read_bytes()[tensors["a"].begin : tensors["a"].end] == array.tobytes()


def test_an_unknown_dtype_is_recorded_without_a_size_check(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file(header := {"a": entry([5], 0, 3, "F4")}, b"abc"))
    begin = len(raw_file(header))
    assert read_header(str(path)).tensors == {"a": TensorEntry("F4", (5,), begin, begin + 3)}


def test_a_header_padded_with_spaces_and_metadata_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file(b'{"__metadata__":{"format":"pt"}}     '))
    assert read_header(str(path)).tensors == {}


@pytest.mark.parametrize(
    ("content", "reason", "tensor"),
    [
        (b"", "too few", None),
        (b"1234567", "too few", None),
        (raw_file(b"{}", length=3), "truncated", None),
        (raw_file(b"{}", length=MAX_HEADER_BYTES + 1), "allows", None),
        (raw_file(b"{}", length=2**64 - 1), "allows", None),
        (raw_file(b""), "begins with", None),
        (raw_file(b" {}"), "begins with", None),
        (raw_file(b"[]"), "begins with", None),
        (raw_file(b"{"), "not valid JSON", None),
        (raw_file(b'{"\xff": 1}'), "not valid JSON", None),
        (raw_file(b'{"\\ud800": 1}'), "not valid JSON", None),
        (raw_file(b'{"a":' + b"[" * 100_000), "not valid JSON", None),
        (raw_file(b'{"a":' + b"1" * 10_000 + b"}"), "not valid JSON", None),
        (raw_file(b'{"a":NaN}'), "not valid JSON", None),
        (raw_file(b'{"a":1,"a":2}'), "occurs twice", None),
        (raw_file({"__metadata__": {"a": 1}}), "__metadata__", None),
        (raw_file({"__metadata__": None}), "__metadata__", None),
        (raw_file({"a": 1}), "not a JSON object", "a"),
        (raw_file({"a": entry([1], 0, 1, dtype=8)}, b"x"), "dtype is 8", "a"),
        (raw_file({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "shape is None", "a"),
        (raw_file({"a": entry([-1], 0, 1)}, b"x"), "shape", "a"),
        (raw_file({"a": entry([2**63], 0, 1)}, b"x"), "shape", "a"),
        (raw_file({"a": entry([True], 0, 1)}, b"x"), "shape", "a"),
        (raw_file({"a": entry([1.0], 0, 1)}, b"x"), "shape", "a"),
        (raw_file({"a": entry([1] * 65, 0, 1)}, b"x"), "shape", "a"),
        (raw_file({"a": entry([2**62] * 64, 0, 1)}, b"x"), "does not take", "a"),
        (raw_file({"a": entry([1], 0, 1) | {"data_offsets": [0]}}, b"x"), "data_offsets", "a"),
        (raw_file({"a": entry([1], -1, 0)}, b"x"), "data_offsets", "a"),
        (raw_file({"a": entry([1], 1, 0)}, b"x"), "behind its end", "a"),
        (raw_file({"a": entry([2], 0, 2)}, b"x"), "truncated", "a"),
        (raw_file({"a": entry([2], 0, 2, "F16")}, b"xx"), "does not take", "a"),
        (raw_file({"a": entry([1], 0, 2, "F8_E4M3")}, b"xx"), "does not take", "a"),
        (raw_file({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, b"xxx"), "overlaps", "b"),
        (raw_file({"a": entry([1], 0, 1), "b": entry([1], 2, 3)}, b"xxx"), "belong to no tensor", "b"),
        (raw_file({"a": entry([1], 0, 1)}, b"xxx"), "2 bytes at the end belong to no tensor", None),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: bytes, reason: str, tensor: str | None) -> None:
    refuses(tmp_path, content, reason, tensor)


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.float16)}, path)
    content = path.read_bytes()
    for end in range(len(content)):
        refuses_any(tmp_path, content[:end])


def refuses_any(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(str(path))


def test_a_huge_header_length_is_refused_without_allocating_for_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**42)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="allows"):
            read_header(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(str(path))
    for name in (str(tmp_path / "absent"), "null\0byte"):
        with pytest.raises(CheckpointError):
            read_header(name)


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F32", "F4", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 20) | st.integers(), min_size=2, max_size=2) | json_values,
    }
)


def answers_or_refuses(path: Path) -> None:
    try:
        header = read_header(str(path))
    except CheckpointError:
        return
    size = path.stat().st_size
    assert all(0 < t.begin <= t.end <= size for t in header.tensors.values())
    assert sum(t.end - t.begin for t in header.tensors.values()) == size - 8 - len(header.raw)


@fuzz
@given(content=st.binary(max_size=200))
@example(content=b"\x02" + bytes(7) + b"{}")
def test_arbitrary_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    answers_or_refuses(path)


@fuzz
@given(
    header=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries | json_values, max_size=4),
    data=st.binary(max_size=24),
)
def test_arbitrary_headers_are_read_or_refused(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(raw_file(header, data))
    answers_or_refuses(path)


@fuzz
@given(data=st.data())
def test_whatever_we_accept_after_a_bit_flip_the_library_accepts_too(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "flipped.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.float16)}, path)
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header_end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        ours = read_header(str(path)).tensors
    except CheckpointError:
        return
    if all(t.dtype in ("F32", "F16") for t in ours.values()):
        with safe_open(path, "np") as library:
            assert set(library.keys()) == set(ours)
