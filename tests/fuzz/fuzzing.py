"""What the fuzz tests share: hostile values, ways to damage what was sound, and bounds on time and memory."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from rich.console import Console
from runtimes import unique_name

from shmroute.cli.inspection import Users
from shmroute.cli.stat import render, snapshot
from shmroute.config import RuntimeConfig
from shmroute.shared.kernel import load_kernels
from shmroute.shared.removal import claim_destruction, unlink_segment
from shmroute.shared.segment import Segment, create_segment

report_to = 2
"""Descriptor for the stacks of a process that hangs."""

HANG = 60.0
"""Seconds after which what has not returned never will. It may be in a kernel, which no signal interrupts."""

Address = tuple[Any, ...]


def fuzz(share: float = 1.0) -> settings:
    """The settings of a fuzz test: its `share` of the profile's examples, according to what one costs."""
    profile = settings.get_profile("fuzz")
    return settings(profile, max_examples=max(int(profile.max_examples * share), 1))


# ------------------------------------------------------------------ bounds


_watched_since: list[float] = []


def _watch() -> None:
    """Have this process end with its stacks on `report_to` if nobody calls this, or `unwatch`, in `HANG` seconds."""
    now = time.monotonic()
    if _watched_since and now - _watched_since[0] < HANG / 3:
        return
    faulthandler.dump_traceback_later(HANG, exit=True, file=report_to)
    _watched_since[:] = [now]


def unwatch() -> None:
    """Nothing is under way that could hang."""
    faulthandler.cancel_dump_traceback_later()
    _watched_since.clear()


@contextlib.contextmanager
def in_time(seconds: float = 10.0) -> Iterator[None]:
    """A block that ends in time and leaves no descriptor open.

    The seconds are generous, for a busy machine: what is looked for takes minutes or for ever.
    """
    descriptors = os.listdir("/proc/self/fd")
    _watch()
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"{took:.1f} s"
    assert os.listdir("/proc/self/fd") == descriptors


@contextlib.contextmanager
def bounded(input_bytes: int = 0, *, spare: int = 4 << 20, per_byte: int = 60) -> Iterator[None]:
    """`in_time`, and no more memory than the input excuses.

    Not for blocks with threads at work: what those allocate would count too.

    Parameters
    ----------
    input_bytes : int
        Size of what the block reads.
    spare, per_byte : int
        The peak may be ``spare + per_byte * input_bytes``. Parsed JSON takes some 25 times its text, and the parser
        holds the text twice.
    """
    with in_time():
        tracemalloc.start()
        try:
            yield
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < spare + per_byte * input_bytes, f"{peak} bytes of memory for {input_bytes} bytes of input"


class Endless(AssertionError):
    """Something was done more often than it can be needed."""


class Steps:
    """Counts the calls of a function, and refuses those beyond a limit: a loop that never ends becomes a failure."""

    def __init__(self, function: Any, limit: int) -> None:
        self._function, self.left = function, limit

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Endless(f"{self._function.__name__} is called again and again")
        return self._function(*arguments)


# ------------------------------------------------------------------ hostile values

HOSTILE_NUMBERS = [
    0, 1, -1, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**400,
]  # fmt: skip

words = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]), st.integers(-(2**63), 2**63 - 1)
)
"""Shared words, of any bits."""

_RAW = "\N{PRIVATE USE ONE}"
_RAW_TEXTS = {
    f"{_RAW}{number}": text
    for number, text in enumerate(
        ["[" * 900 + "]" * 900, "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 5000, "1e999", "-0", "00", "}"]
    )
}
"""What `json.dumps` would never write, by the strings that stand for it until `to_text`."""

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(HOSTILE_NUMBERS)
    | st.floats()
    | st.sampled_from(["", "\0", "\ud800", "x" * 20_000, "../../etc/passwd", *_RAW_TEXTS])
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)
"""Values that are of the wrong type, out of range, or no JSON at all, as `to_text` writes them."""


def to_text(document: Any) -> bytes:
    """A document as (perhaps invalid) JSON."""
    text = json.dumps(document)
    for name, raw in _RAW_TEXTS.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


# ------------------------------------------------------------------ damage


def _addresses(document: Any, here: Address = ()) -> list[Address]:
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    found: list[Address] = []
    for key, value in inside:
        found.append((*here, key))
        if isinstance(value, dict | list):
            found += _addresses(value, (*here, key))
    return found


@st.composite
def damaged_json(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """The text of `document` with one to three values replaced, keys removed, added or given twice."""
    copy = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        addresses = _addresses(copy)
        if not addresses:
            break
        *path, last = draw(st.sampled_from(addresses))
        holder = copy
        for key in path:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "number", "remove", "add"]))
        if action == "remove":
            del holder[last]
        elif action == "number":
            holder[last] = draw(st.sampled_from(HOSTILE_NUMBERS))
        elif action == "replace":
            holder[last] = draw(json_values)
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=4))] = draw(json_values)
        else:
            holder.append(draw(json_values))
    text = to_text(copy)
    if copy and draw(st.integers(0, 9)) == 0:
        key = draw(st.sampled_from(sorted(copy)))
        text = b"{" + json.dumps(key).encode() + b": " + to_text(draw(json_values)) + b", " + text[1:]
    return text


@st.composite
def damaged_bytes(draw: st.DrawFn, original: bytes, focus: int | None = None) -> bytes:
    """`original`, one to three times flipped, overwritten, grown or cut somewhere (before `focus`, if it is given)."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(min(len(content), focus or len(content)) - 1, 0)))
        action = draw(st.sampled_from(["flip", "flip", "word", "insert", "remove", "cut", "grow"]))
        if action == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "word":
            at &= ~7
            content[at : at + 8] = (draw(st.sampled_from(HOSTILE_NUMBERS)) & (2**64 - 1)).to_bytes(8, "little")
        elif action == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif action == "remove":
            del content[at : at + draw(st.integers(1, 20))]
        elif action == "cut":
            del content[at:]
        elif action == "grow":
            content += bytes(draw(st.sampled_from([1, 8, 4096])))
    return bytes(content)


# ------------------------------------------------------------------ segments


@contextlib.contextmanager
def segment_of(config: RuntimeConfig) -> Iterator[Segment]:
    """A segment of this process's own, gone at the end."""
    load_kernels()
    segment = create_segment(unique_name(), config)
    try:
        yield segment
    finally:
        claim_destruction(segment)
        unlink_segment(segment)
        segment.close()


def look_at_everything(segment: Segment) -> dict[str, Any]:
    """Do all that ``shmroute stat`` does, down to the bytes that a terminal would get; what its JSON says."""
    assert Users.of(segment).living() is not None
    shot = snapshot(segment)
    with io.TextIOWrapper(io.BytesIO(), "utf-8") as terminal:
        Console(file=terminal, width=140).print(render(shot))
        terminal.flush()
    said: dict[str, Any] = json.loads(json.dumps(shot))
    return said


# ------------------------------------------------------------------ files


@contextlib.contextmanager
def planted(path: Path, content: bytes, *, stays: bool = True) -> Iterator[None]:
    """A file, for the length of a block; with `stays` the block must leave it as it was."""
    path.write_bytes(content)
    path.chmod(0o600)
    try:
        yield
        if stays:
            assert path.read_bytes() == content
    finally:
        path.unlink(missing_ok=True)
