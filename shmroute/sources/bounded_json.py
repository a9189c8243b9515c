"""JSON from files that nobody vouches for: size-capped, no duplicate keys, and one kind of error."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from typing import Any

from shmroute.errors import CheckpointError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120


def shown(value: object) -> str:
    """`value` as it may stand in a message: on one line, escaped and of bounded length."""
    return _SHORT.repr(value)


def open_regular(path: str) -> int:
    """Open a regular file for reading.

    Parameters
    ----------
    path : str

    Returns
    -------
    int
        A descriptor that the caller closes.

    Raises
    ------
    CheckpointError
        If there is no such file, it cannot be opened, or it is not a regular file.
    """
    try:
        # Opening a FIFO without O_NONBLOCK would wait for a writer that never comes.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointError(path, "the file does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(path, f"the file cannot be opened ({error})") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(path, "this is not a regular file")
    return fd


def read_exactly(fd: int, count: int, offset: int, path: str) -> bytes:
    """Read `count` bytes at `offset` of a descriptor.

    Raises
    ------
    CheckpointError
        If the file ends earlier, or the read fails.
    """
    parts: list[bytes] = []
    while count:
        try:
            part = os.pread(fd, count, offset)
        except OSError as error:
            raise CheckpointError(path, f"reading {count} bytes at offset {offset} failed ({error})") from error
        if not part:
            raise CheckpointError(path, f"the file is truncated: it ends at byte {offset}, {count} bytes too early")
        parts.append(part)
        offset += len(part)
        count -= len(part)
    return b"".join(parts)


def parse_json_object(raw: bytes, path: str) -> dict[str, Any]:
    """Parse bytes that must be one JSON object in UTF-8.

    Stricter than `json.loads`, which takes the last of several equal keys, takes ``NaN``, and guesses UTF-16
    and UTF-32.

    Parameters
    ----------
    raw : bytes
        Already capped in size by the caller: parsing takes up to some 25 times as much memory.
    path : str
        Named in errors.

    Raises
    ------
    CheckpointError
        If `raw` is anything else.
    """

    def refuse_constant(text: str) -> None:
        raise ValueError(f"{text} is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ValueError(f"the key {shown(key)} occurs twice")
                seen.add(key)
        for key in result:
            # An escaped lone surrogate gives a string that cannot be printed or written anywhere.
            key.encode("utf-8")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"this is not valid JSON ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"a JSON object is expected, not {type(value).__name__}")
    return value


def read_json_object(path: str, max_bytes: int) -> dict[str, Any]:
    """Read a file that must hold one JSON object of at most `max_bytes` bytes.

    Raises
    ------
    CheckpointError
        If the file is missing, larger, or anything else.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise CheckpointError(path, f"the file has {size} bytes, but at most {max_bytes} are accepted")
        return parse_json_object(read_exactly(fd, size, 0, path), path)
    finally:
        os.close(fd)
