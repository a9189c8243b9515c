"""Any file under a segment's name is refused with a `SegmentError`, or is a segment that can be used."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzzing import HOSTILE_NUMBERS, bounded, damaged_bytes, damaged_json, fuzz, look_at_everything, planted, segment_of
from hypothesis import assume, example, given
from hypothesis import strategies as st
from runtimes import unique_name
from typer.testing import CliRunner

from shmroute.cli import app
from shmroute.cli.doctor import check_segments
from shmroute.cli.inspection import FOREIGN, UNREADABLE, look_at
from shmroute.config import RuntimeConfig
from shmroute.errors import (
    ConfigError,
    SegmentClosingError,
    SegmentError,
    SegmentExistsError,
    SegmentForeignError,
    SegmentLayoutError,
    SegmentNamespaceError,
    SegmentNotFoundError,
    SegmentPermissionError,
    SegmentTruncatedError,
    SegmentVersionError,
)
from shmroute.lifecycle import create_or_reclaim
from shmroute.pager.process import owned_by_another, pager_alive, standby_alive
from shmroute.shared import layout as at
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import Layout
from shmroute.shared.pool import Pool
from shmroute.shared.segment import SHM, Segment, attach_segment, segment_path
from shmroute.sources import SyntheticSource

DOCUMENTED = {
    SegmentNotFoundError, SegmentPermissionError, SegmentForeignError, SegmentVersionError, SegmentTruncatedError,
    SegmentNamespaceError, SegmentLayoutError, SegmentClosingError,
}  # fmt: skip
"""What `attach_segment` says it raises."""

DESTROY = importlib.import_module("shmroute.cli.destroy")
"""The module, which its package hides behind the command."""

CONFIG = RuntimeConfig.from_checkpoint(SyntheticSource(2, 4, 4, 5), "50%", max_workers=2)
SETTINGS = json.loads(CONFIG.to_json())
FIXED_FIELDS = (
    at.HEADER_MAGIC, at.HEADER_ABI, at.HEADER_TOTAL_BYTES, at.HEADER_FINGERPRINT, at.HEADER_UUID,
    at.HEADER_PID_NAMESPACE, at.HEADER_CONFIG_BYTES,
)  # fmt: skip
IDENTITIES = (at.HEADER_STATE, at.HEADER_OWNER, at.HEADER_PAGER, at.HEADER_STANDBY)


@pytest.fixture(scope="module")
def sound() -> bytes:
    """The bytes of a segment that this process made."""
    with segment_of(CONFIG) as segment:
        return bytes(segment.buffer)


def patched(image: bytes, changes: dict[int, int]) -> bytes:
    """`image` with words of any bits at some offsets."""
    copy = bytearray(image)
    for offset, value in changes.items():
        copy[offset : offset + WORD] = (value & (2**64 - 1)).to_bytes(WORD, "little")
    return bytes(copy)


def sealed(image: bytes, settings: bytes) -> bytes:
    """A file around any settings, with sizes and a fingerprint that fit them as far as they can be read."""
    size, words = len(image), {at.HEADER_CONFIG_BYTES: len(settings)}
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        config = RuntimeConfig.from_json(settings.decode())
        layout = Layout(
            config.num_layers, config.num_experts, config.max_workers, config.slots, config.slot_bytes, len(settings)
        )
        if layout.total_bytes < 1 << 22:
            size = layout.total_bytes
        words |= {at.HEADER_TOTAL_BYTES: layout.total_bytes, at.HEADER_FINGERPRINT: layout.fingerprint}
    return patched(image[: at.HEADER_CONFIG] + settings, words).ljust(size, b"\0")


def use(segment: Segment) -> None:
    """Everything in a segment that was accepted is where it says, and can be looked at."""
    size = segment_path(segment.name).stat().st_size
    assert len(segment.buffer) == segment.layout.total_bytes == size
    look_at_everything(segment)
    pool = Pool(segment)
    for slot in {0, segment.config.slots - 1}:
        weights = pool.weights(slot)
        assert weights.raw.nbytes == segment.config.expert_bytes
        first = segment.address + segment.layout.slot(slot)
        assert all(
            first <= tensor.ctypes.data <= first + len(weights.raw) - tensor.nbytes for tensor in weights.values()
        )
        del weights
    pool.forget()
    segment.config.pager_command(segment.name)


def attempt(content: bytes, *, closing: bool = False) -> SegmentError | None:
    """Attach to a file of this content and use what was attached to; the error, None if there was none."""
    name = unique_name()
    refusal = None
    with planted(segment_path(name), content), bounded(len(content)):
        try:
            with contextlib.closing(attach_segment(name, closing=closing)) as segment:
                use(segment)
        except SegmentError as error:
            refusal = error
        found = look_at(name)
        assert found is not None
        assert found.state not in (FOREIGN, UNREADABLE) or refusal is not None
    if refusal is not None:
        assert type(refusal) in DOCUMENTED
        assert len(str(refusal)) < 1000
    assert segment_path(name).name not in Path("/proc/self/maps").read_text()
    return refusal


# ------------------------------------------------------------------ content


def test_an_undamaged_copy_is_accepted(sound: bytes) -> None:
    assert attempt(sound) is None
    assert attempt(sealed(sound, to_bytes(SETTINGS))) is None


def to_bytes(settings: object) -> bytes:
    """Settings as they are written."""
    return json.dumps(settings, sort_keys=True).encode()


@fuzz()
@given(content=st.binary(max_size=500), magic=st.booleans())
def test_arbitrary_bytes_are_no_segment(content: bytes, magic: bool) -> None:
    assert attempt(at.MAGIC.to_bytes(WORD, "little") * magic + content) is not None


@fuzz()
@given(data=st.data(), closing=st.booleans())
def test_a_damaged_segment_is_refused_or_sound(sound: bytes, data: st.DataObject, closing: bool) -> None:
    attempt(data.draw(damaged_bytes(sound, focus=at.HEADER_CONFIG + len(to_bytes(SETTINGS)))), closing=closing)


def refuses_unless_only_the_uuid_differs(sound: bytes, content: bytes) -> None:
    if attempt(content) is None:
        assert content[: at.HEADER_UUID] == sound[: at.HEADER_UUID]
        assert content[at.HEADER_UUID + 16 :] == sound[at.HEADER_UUID + 16 :]


@pytest.mark.parametrize("field", FIXED_FIELDS)
def test_a_field_of_a_hostile_number_is_refused(sound: bytes, field: int) -> None:
    for number in HOSTILE_NUMBERS:
        refuses_unless_only_the_uuid_differs(sound, patched(sound, {field: number}))


@fuzz()
@given(
    changes=st.dictionaries(st.sampled_from(FIXED_FIELDS), st.integers(0, 2**64 - 1), max_size=2),
    size=st.none() | st.integers(0, 70_000),
)
def test_fields_of_any_numbers_in_a_file_of_any_size_are_refused(
    sound: bytes, changes: dict[int, int], size: int | None
) -> None:
    content = patched(sound, changes)
    refuses_unless_only_the_uuid_differs(sound, content if size is None else content[:size].ljust(size, b"\0"))


@fuzz(2)
@given(settings=damaged_json(SETTINGS) | damaged_bytes(to_bytes(SETTINGS)))
@example(settings=to_bytes(SETTINGS | {"source": {"factory": 5, "arguments": []}}))
@example(settings=to_bytes(SETTINGS | {"source": {"factory": "a:b", "arguments": {"path": "\udcff"}}}))
@example(settings=to_bytes(SETTINGS | {"tensors": [SETTINGS["tensors"][0] | {"shape": [-1, -4]}]}))
@example(settings=to_bytes(SETTINGS | {"tensors": [SETTINGS["tensors"][0] | {"shape": [1] * 1000}]}))
@example(settings=to_bytes(SETTINGS | {"source_fingerprint": "x" * (1 << 20)}))
def test_damaged_settings_are_refused_or_sound_even_if_all_sizes_fit_them(sound: bytes, settings: bytes) -> None:
    attempt(sealed(sound, settings))


@fuzz(0.5)
@given(slots=st.integers(1, 1 << 22), expert_bytes=st.sampled_from([1, 1 << 20, 1 << 34, 1 << 40]))
@example(slots=1, expert_bytes=1 << 40)
@example(slots=1 << 22, expert_bytes=1 << 40)
def test_a_file_with_less_memory_than_its_size_is_neither_mapped_nor_filled(
    sound: bytes, slots: int, expert_bytes: int
) -> None:
    """To touch a hole would take memory that may not be there, and that is a SIGBUS."""
    settings = SETTINGS | {"num_layers": 1024, "num_experts": 4096, "slots": slots, "expert_bytes": expert_bytes}
    content = sealed(sound, to_bytes(settings | {"layer_numbers": list(range(1024)), "tensors": []}))
    size = int.from_bytes(content[at.HEADER_TOTAL_BYTES : at.HEADER_TOTAL_BYTES + WORD], "little")
    assume(size < 2**63)
    name = unique_name()
    with planted(segment_path(name), content, stays=False):
        os.truncate(segment_path(name), size)
        before = segment_path(name).stat()
        with bounded(), pytest.raises(SegmentTruncatedError, match=f"has {size} bytes, but memory for"):
            attach_segment(name)
        assert segment_path(name).stat().st_blocks == before.st_blocks


# ------------------------------------------------------------------ identities


@fuzz()
@given(
    changes=st.dictionaries(st.sampled_from(IDENTITIES), st.integers(0, 2**64 - 1), min_size=1), closing=st.booleans()
)
def test_a_segment_may_name_any_process(sound: bytes, changes: dict[int, int], closing: bool) -> None:
    name = unique_name()
    with planted(segment_path(name), patched(sound, changes)), bounded(len(sound)):
        try:
            segment = attach_segment(name, closing=closing)
        except SegmentError as error:
            assert type(error) in DOCUMENTED
            return
        with contextlib.closing(segment):
            said = look_at_everything(segment)
            assert {said[role]["state"] for role in ("owner", "pager", "standby")} <= {
                "alive", "dead", "stopped", "none",
            }  # fmt: skip
            if not changes.keys() & {at.HEADER_OWNER}:
                assert said["owner"] == {"pid": os.getpid(), "state": "alive"}
            assert pager_alive(segment) == (said["pager"]["state"] in ("alive", "stopped"))
            assert standby_alive(segment) == (said["standby"]["state"] in ("alive", "stopped"))
            owned_by_another(segment)
        found = look_at(name)
        assert found is not None
        json.dumps(found.as_dict())


# ------------------------------------------------------------------ commands


def shmroute(*arguments: str) -> int:
    """Run a command in this process: its exit code. Any exception but an exit is a failure."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code


@pytest.fixture
def no_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies about on this machine is not the tests' to remove."""
    monkeypatch.setattr(DESTROY, "orphans", list)


@fuzz(0.15)
@given(data=st.data())
def test_every_command_refuses_a_damaged_segment_and_leaves_it_alone(
    sound: bytes, no_orphans: None, data: st.DataObject
) -> None:
    content = data.draw(
        damaged_bytes(sound, focus=at.HEADER_CONFIG)
        | damaged_json(SETTINGS).map(lambda settings: sealed(sound, settings))
    )
    assume(attempt(content, closing=True) is not None)
    name = unique_name()
    with planted(segment_path(name), content), bounded(len(content), spare=8 << 20):
        assert shmroute("stat", name) == 1
        assert shmroute("destroy", name) == 1
        assert shmroute("ls", "--json") == 0
        assert any(name in check.detail for check in check_segments(fix=False))
        with pytest.raises(SegmentExistsError):
            create_or_reclaim(name, CONFIG)


@fuzz(0.3)
@given(data=st.data())
def test_destroy_removes_a_damaged_segment_by_force_and_nothing_else(
    sound: bytes, no_orphans: None, data: st.DataObject
) -> None:
    content = data.draw(damaged_bytes(sound, focus=at.HEADER_CONFIG))
    refusal = attempt(content, closing=True)
    assume(refusal is not None)
    name, other = unique_name(), unique_name()
    foreign = content[:WORD] != sound[:WORD]
    with planted(segment_path(other), sound), planted(segment_path(name), content, stays=foreign):
        assert shmroute("destroy", name, "--force") == (1 if foreign else 0)
        assert segment_path(name).exists() == foreign


@pytest.mark.parametrize("size", [WORD, at.HEADER_UUID, at.HEADER_UUID + 1, at.HEADER_UUID + 15])
def test_destroying_a_stump_by_force_removes_no_orphan_of_another(
    sound: bytes, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    stump = sound[:size]
    name, orphan = unique_name(), SHM / f"shmroute-{stump[at.HEADER_UUID :].hex().ljust(32, '0')}.lock"
    monkeypatch.setattr(DESTROY, "orphans", lambda: [orphan])
    with planted(orphan, b""), planted(segment_path(name), stump, stays=False):
        assert shmroute("destroy", name, "--force") == 0
        assert not segment_path(name).exists()


# ------------------------------------------------------------------ what is no file


@contextlib.contextmanager
def a_socket(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        try:
            yield
        finally:
            path.unlink()


@contextlib.contextmanager
def made(make: Callable[[Path], object], remove: Callable[[Path], None], path: Path) -> Iterator[None]:
    make(path)
    try:
        yield
    finally:
        remove(path)


def a_link_to(target: str) -> Callable[[Path], contextlib.AbstractContextManager[None]]:
    return lambda path: made(lambda path: path.symlink_to(target), Path.unlink, path)


@pytest.mark.parametrize(
    "there",
    [
        lambda path: made(os.mkfifo, Path.unlink, path),
        lambda path: made(Path.mkdir, Path.rmdir, path),
        a_socket,
        a_link_to("/dev/zero"),
        a_link_to("/dev/shm"),
        a_link_to("nowhere"),
        lambda path: a_link_to(path.name)(path),
    ],
    ids=["fifo", "directory", "socket", "link to a device", "link to a directory", "dangling link", "link to itself"],
)
def test_what_is_no_regular_file_is_refused_by_every_command_without_waiting(
    no_orphans: None, there: Callable[[Path], contextlib.AbstractContextManager[None]]
) -> None:
    name = unique_name()
    with there(segment_path(name)):
        before = segment_path(name).lstat()
        with bounded(spare=8 << 20):
            with pytest.raises(SegmentForeignError):
                attach_segment(name)
            assert shmroute("stat", name) == shmroute("destroy", name) == shmroute("destroy", name, "--force") == 1
            assert shmroute("ls") == 0
            assert any(name in check.detail for check in check_segments(fix=False))
            with pytest.raises(SegmentExistsError):
                create_or_reclaim(name, CONFIG)
        after = segment_path(name).lstat()
        assert (before.st_ino, before.st_mode, before.st_size) == (after.st_ino, after.st_mode, after.st_size)


@pytest.mark.parametrize("size", [0, 1, 4096, 65_535, 1 << 20])
def test_a_segment_that_is_cut_or_grown_between_check_and_mapping_is_refused(
    sound: bytes, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    name = unique_name()

    def read_then_change(fd: int, count: int, offset: int) -> bytes:
        content = pread(fd, count, offset)
        if offset == at.HEADER_CONFIG:
            os.truncate(segment_path(name), size)
        return content

    pread = os.pread
    with planted(segment_path(name), sound, stays=False), bounded(len(sound)):
        monkeypatch.setattr(os, "pread", read_then_change)
        try:
            with contextlib.closing(attach_segment(name)) as segment:
                assert size >= len(sound)
                assert len(segment.buffer) == len(sound)
        except SegmentTruncatedError:
            assert size < len(sound)
