"""Where each tensor of a safetensors file lies.

The safetensors library hands out tensors, not file offsets; the pager needs the offsets, to read an expert
straight into its slot. The format is: a u64 (little-endian) N, then N bytes of JSON that map each tensor's
name to its dtype, shape and byte range, then the data, which the ranges tile without overlap or hole. Every
number is checked before it is used, so that a damaged or hostile file gives a `CheckpointError` and nothing
else.

Not for reading tensors: where a plain array is wanted, use the library.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from shmroute.errors import CheckpointError
from shmroute.sources.bounded_json import open_regular, parse_json_object, read_exactly, shown

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own cap."""
MAX_DIMENSIONS = 64
"""As many as NumPy has; it also keeps products of hostile shapes cheap."""
MAX_EXTENT = 2**63 - 1

ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes per element. A dtype that is not here is recorded with its range, its size unchecked."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes
    ----------
    dtype : str
        As the format spells it: ``"BF16"``, ``"F32"``.
    shape : tuple of int
    begin, end : int
        Its bytes in the file, counted from the file's start.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A file's header, checked.

    Attributes
    ----------
    tensors : dict
        `TensorEntry` by name, in the header's order.
    raw : bytes
        The header's JSON as it stands in the file.
    """

    tensors: dict[str, TensorEntry]
    raw: bytes


def read_header(path: str) -> SafetensorsHeader:
    """Read and check the header of the file at `path`.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated or damaged, or no safetensors file at all.
    """
    fd = open_regular(path)
    try:
        return read_header_of(fd, path)
    finally:
        os.close(fd)


def read_header_of(fd: int, path: str) -> SafetensorsHeader:
    """Read and check the header of an open file; see `read_header`.

    Parameters
    ----------
    fd : int
        A regular file; its position is neither used nor moved.
    path : str
        Named in errors.
    """
    file_bytes = os.fstat(fd).st_size
    if file_bytes < LENGTH_BYTES:
        raise CheckpointError(path, f"the file has {file_bytes} bytes: too few for a safetensors header")
    length = int.from_bytes(read_exactly(fd, LENGTH_BYTES, 0, path), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            path, f"the header's length is given as {length}, but the format allows {MAX_HEADER_BYTES} bytes"
        )
    if length > file_bytes - LENGTH_BYTES:
        raise CheckpointError(
            path,
            f"the header's length is given as {length}, but the file has {file_bytes} bytes: it is truncated",
        )
    raw = read_exactly(fd, length, LENGTH_BYTES, path)
    if raw[:1] != b"{":
        raise CheckpointError(path, f"a safetensors header begins with '{{', this one with {raw[:1]!r}")
    fields = parse_json_object(raw, path)
    _check_metadata(fields.pop("__metadata__", {}), path)

    data_begin = LENGTH_BYTES + length
    data_bytes = file_bytes - data_begin
    tensors = {name: _entry(name, info, data_begin, data_bytes, path) for name, info in fields.items()}
    _check_tiling(tensors, data_begin, file_bytes, path)
    return SafetensorsHeader(tensors, raw)


def _check_metadata(metadata: object, path: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(path, "__metadata__ is not a JSON object of strings")


def _is_count(value: object) -> bool:
    """Whether `value` is an integer that can be an extent or an offset; ``True`` is no integer here."""
    return type(value) is int and 0 <= value <= MAX_EXTENT


def _entry(name: str, info: Any, data_begin: int, data_bytes: int, path: str) -> TensorEntry:
    if not isinstance(info, dict):
        raise CheckpointError(path, f"its header entry is {shown(info)}, not a JSON object", name)
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str):
        raise CheckpointError(path, f"its dtype is {shown(dtype)}, not a string", name)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise CheckpointError(
            path, f"its shape is {shown(shape)}, not a list of at most {MAX_DIMENSIONS} extents from 0", name
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(path, f"its data_offsets are {shown(offsets)}, not two integers from 0", name)
    begin, end = offsets
    if begin > end:
        raise CheckpointError(path, f"its data begins at {begin}, behind its end {end}", name)
    if end > data_bytes:
        raise CheckpointError(
            path,
            f"its data ends at byte {end}, but the file has {data_bytes} bytes of data: it is truncated",
            name,
        )
    if dtype in ITEM_BYTES:
        expected = math.prod(shape) * ITEM_BYTES[dtype]
        if expected != end - begin:
            raise CheckpointError(
                path,
                f"its shape {shown(shape)} in {dtype} does not take the {end - begin} bytes that it has",
                name,
            )
    return TensorEntry(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _check_tiling(tensors: dict[str, TensorEntry], data_begin: int, file_bytes: int, path: str) -> None:
    position = data_begin
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise CheckpointError(path, f"its data overlaps that of another tensor at byte {entry.begin}", name)
        if entry.begin > position:
            raise CheckpointError(path, f"{entry.begin - position} bytes before its data belong to no tensor", name)
        position = entry.end
    if position != file_bytes:
        raise CheckpointError(path, f"{file_bytes - position} bytes at the end belong to no tensor")
