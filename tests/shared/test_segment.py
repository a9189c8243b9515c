"""Segments: made in one act, checked before use, removed by one process, and gone without a trace."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import stat
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import posix_ipc
import pytest
from runtimes import run_python, small_config, unique_name

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
    SharedMemoryFullError,
)
from shmroute.lifecycle import attach, create, destroy
from shmroute.runtime import Runtime
from shmroute.shared import layout as at
from shmroute.shared import removal
from shmroute.shared.atomic import WORD
from shmroute.shared.identity import own_identity, process_stat
from shmroute.shared.pool import Pool
from shmroute.shared.removal import claim_destruction, claim_if_unused, orphans, segment_names, unlink_segment
from shmroute.shared.segment import (
    MAX_CONFIG_BYTES,
    SHM,
    Segment,
    attach_segment,
    create_segment,
    pid_namespace,
    segment_path,
)
from shmroute.shared.words import DESTROYING, LIVE, identity_pid, identity_start, pack_identity

DEAD = pack_identity(DESTROYING, 0, identity_start(own_identity()) - 1, os.getpid())


@pytest.fixture
def segment(name: str) -> Iterator[Segment]:
    """A segment of this process, removed at the end."""
    made = create_segment(name, small_config())
    yield made
    segment_path(name).unlink(missing_ok=True)
    made.close()


# ------------------------------------------------------------------ create


def test_what_was_created_can_be_attached_to(segment: Segment) -> None:
    other = attach_segment(segment.name)
    assert (other.config, other.layout, other.uuid) == (segment.config, segment.layout, segment.uuid)
    assert other.inode == segment.inode
    other.write(at.HEADER_BELL, -5)
    assert segment.read(at.HEADER_BELL) == -5
    assert other.swap(at.HEADER_BELL, -5, 6)
    assert not other.swap(at.HEADER_BELL, -5, 7)
    other.close()
    other.close()


def test_a_segment_is_this_users_alone_and_reserved_whole(segment: Segment) -> None:
    status = segment_path(segment.name).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == segment.layout.total_bytes
    assert status.st_blocks * 512 >= status.st_size


def test_a_new_segment_names_its_creator_and_has_an_empty_ring(segment: Segment) -> None:
    assert segment.read(at.HEADER_OWNER) == segment.read(at.HEADER_STATE) == own_identity(LIVE)
    assert segment.read(at.HEADER_PID_NAMESPACE) == pid_namespace()
    size = 1 << segment.layout.ring_bits
    assert [segment.read(segment.layout.ring + cursor) for cursor in (at.RING_HEAD, at.RING_TAIL)] == [size, size]
    tables = bytes(segment.buffer[segment.layout.uses : segment.layout.ring])
    assert not any(tables)


def test_a_name_that_is_taken_is_refused_and_nothing_is_left(segment: Segment) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SegmentExistsError, match="exists already: attach to it, choose another name, or remove it"):
        create_segment(segment.name, small_config())
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert attach_and_close(segment.name) == segment.uuid


def attach_and_close(name: str) -> str:
    """The uuid of what is there under a name."""
    found = attach_segment(name)
    found.close()
    return found.uuid


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "-dash", "a b", "x" * 101, "ü", "a\n", 7, None])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no name for a segment: 1 to 100 letters"):
        create_segment(name, small_config())


CREATOR = """
import sys
from shmroute.errors import SegmentExistsError
from shmroute.shared.kernel import load_kernels
from shmroute.shared.segment import create_segment
from shmroute.config import RuntimeConfig
load_kernels()
print("ready", flush=True)
sys.stdin.readline()
try:
    print(create_segment(sys.argv[1], RuntimeConfig(1, 8, 2, 4096, 4)).uuid)
except SegmentExistsError:
    print("exists")
"""


def test_of_several_creators_one_succeeds(name: str) -> None:
    creators = [
        subprocess.Popen(
            [sys.executable, "-c", CREATOR, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for creator in creators:
        assert creator.stdout is not None
        assert creator.stdout.readline() == "ready\n"
    for creator in creators:
        assert creator.stdin is not None
        creator.stdin.write("go\n")
        creator.stdin.flush()
    said = sorted(creator.communicate()[0].strip() for creator in creators)
    winner = attach_segment(name)
    assert sorted([winner.uuid, "exists", "exists", "exists"]) == said
    winner.close()
    destroy(name)


def test_a_creator_killed_before_the_link_leaves_nothing(name: str) -> None:
    program = """
import os, signal, sys
from shmroute.config import RuntimeConfig
from shmroute.shared.segment import create_segment
os.link = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
create_segment(sys.argv[1], RuntimeConfig(1, 8, 2, 4096, 4))
"""
    before = set(os.listdir(SHM))
    assert run_python(program, name, check=False).returncode == -signal.SIGKILL
    assert not segment_path(name).exists()
    assert not [file for file in set(os.listdir(SHM)) - before if name in file]


def test_a_name_can_be_used_again_when_everybody_is_dead(name: str) -> None:
    program = "import os, sys, shmroute as r; from runtimes import small_config;"
    program += "r.create(sys.argv[1], small_config()).router(0); os._exit(0)"
    run_python(program, name, PYTHONPATH=str(Path(__file__).parent.parent))
    left = attach_segment(name)
    with create(name, small_config()) as runtime:
        assert runtime._attachment.segment.uuid != left.uuid
        assert not [path for path in SHM.iterdir() if left.uuid in path.name]
    left.close()


@pytest.mark.parametrize("excess", [1 << 30, 1 << 61])
def test_a_segment_that_does_not_fit_is_refused_with_the_numbers(name: str, excess: int) -> None:
    filesystem = os.statvfs(SHM)
    size = filesystem.f_blocks * filesystem.f_frsize + excess
    slots = 1 + size // (1 << 40) if size > 1 << 40 else 1
    config = small_config(num_layers=1024, num_experts=4096, expert_bytes=min(size, 1 << 40), slots=slots)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        SharedMemoryFullError, match=r"needs \d+ bytes, /dev/shm has \d+ free: give it a smaller"
    ) as full:
        create_segment(name, config)
    assert isinstance(full.value, OSError)
    needed = int(str(full.value).split("needs ")[1].split()[0])
    assert needed >= config.budget_bytes
    assert len(os.listdir("/proc/self/fd")) == before
    assert not segment_path(name).exists()


# ------------------------------------------------------------------ attach


@pytest.fixture
def forged(segment: Segment, name: str) -> Iterator[Callable[..., str]]:
    """Puts a file of any content under a fresh name; without content, a copy of a real segment to be patched."""
    made: list[Path] = []

    def forge(content: bytes | None = None, *, mode: int = 0o600, **words: int) -> str:
        fresh = unique_name()
        path = segment_path(fresh)
        made.append(path)
        image = bytearray(segment.buffer if content is None else content)
        for offset, value in words.items():
            start = getattr(at, offset)
            image[start : start + WORD] = value.to_bytes(WORD, "little", signed=True)
        path.write_bytes(image)
        path.chmod(mode)
        return fresh

    yield forge
    for path in made:
        path.unlink()


def refusal(name: str, error: type[SegmentError], message: str) -> None:
    """Attaching fails with this very error, and leaves no descriptor open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SegmentError, match=message) as refused:
        attach_segment(name)
    assert type(refused.value) is error
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_unpatched_copy_is_accepted(forged: Callable[..., str], segment: Segment) -> None:
    assert attach_and_close(forged()) == segment.uuid


def test_a_segment_that_is_not_there_is_not_found(name: str) -> None:
    refusal(name, SegmentNotFoundError, "no segment named")


def test_another_users_segment_is_refused(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    refusal(segment.name, SegmentPermissionError, r"belongs to user \d+, this process runs as \d+")


def test_a_segment_that_may_not_be_opened_is_refused(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(SegmentPermissionError, match="may not be opened by this user"):
            attach_segment(segment.name)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o640, 0o604, 0o666])
def test_a_segment_that_others_may_touch_is_refused(forged: Callable[..., str], mode: int) -> None:
    refusal(forged(mode=mode), SegmentPermissionError, f"has mode {mode:04o}.*expected 0600")


@pytest.mark.parametrize("content", [b"", b"\0", b"SHMROUT", b"\x7fELF" * 1000, b"\0" * 100_000])
def test_a_foreign_file_is_refused(forged: Callable[..., str], content: bytes) -> None:
    refusal(forged(content), SegmentForeignError, "is no segment of shmroute")


@pytest.mark.parametrize("size", [8, 100, at.HEADER_CONFIG - 1])
def test_a_file_shorter_than_a_header_is_truncated(forged: Callable[..., str], segment: Segment, size: int) -> None:
    refusal(forged(bytes(segment.buffer[:size])), SegmentTruncatedError, f"has {size} bytes, less than a header")


@pytest.mark.parametrize("change", [-1, -4096, 1, 4096])
def test_a_truncated_or_extended_segment_is_refused(forged: Callable[..., str], segment: Segment, change: int) -> None:
    image = bytes(segment.buffer) + b"\0" * max(change, 0)
    image = image[: len(segment.buffer) + change]
    refusal(forged(image), SegmentTruncatedError, f"has {len(image)} bytes, its header says {len(segment.buffer)}")


def test_a_directory_a_fifo_and_a_symlink_are_refused(segment: Segment, name: str) -> None:
    kinds: list[tuple[Callable[[Path], object], Callable[[Path], None]]] = [
        (Path.mkdir, Path.rmdir),
        (os.mkfifo, Path.unlink),
        (lambda path: path.symlink_to(segment_path(segment.name)), Path.unlink),
    ]
    for make, remove in kinds:
        fresh = unique_name()
        make(segment_path(fresh))
        try:
            refusal(fresh, SegmentForeignError, "cannot be a segment|is no regular file")
        finally:
            remove(segment_path(fresh))


def test_another_abi_is_refused(forged: Callable[..., str]) -> None:
    refusal(forged(HEADER_ABI=at.ABI + 1), SegmentVersionError, f"has ABI version {at.ABI + 1}, this process has")


def test_another_layout_is_refused(forged: Callable[..., str], segment: Segment) -> None:
    other = segment.layout.fingerprint ^ 1
    refusal(forged(HEADER_FINGERPRINT=other), SegmentLayoutError, f"fingerprint {other:x}, expected")


def test_kernels_of_other_constants_are_refused(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmroute.shared.segment.compiled_constants", lambda: at.CONSTANTS + 1)
    refusal(segment.name, SegmentLayoutError, "compiled kernels are not those of the Python code")


@pytest.mark.parametrize("length", [0, -1, MAX_CONFIG_BYTES + 1, 1 << 40, 2**63 - 1])
def test_an_absurd_length_of_the_settings_is_refused(forged: Callable[..., str], length: int) -> None:
    refusal(forged(HEADER_CONFIG_BYTES=length), SegmentLayoutError, f"settings of {length} bytes do not fit")


@pytest.mark.parametrize("junk", [b"{", b"\xff\xfe", b"[]", b"null", b'{"num_layers": 1}'])
def test_unreadable_settings_are_refused(forged: Callable[..., str], segment: Segment, junk: bytes) -> None:
    image = bytearray(segment.buffer)
    image[at.HEADER_CONFIG : at.HEADER_CONFIG + segment.layout.config_bytes] = junk.ljust(segment.layout.config_bytes)
    refusal(forged(bytes(image)), SegmentLayoutError, "the settings in its header cannot be read")


def test_settings_for_another_size_are_refused(forged: Callable[..., str], segment: Segment) -> None:
    image = bytes(segment.buffer).replace(b'"slots": 4', b'"slots": 5')
    refusal(forged(image), SegmentLayoutError, "was laid out otherwise")


def test_another_pid_namespace_is_refused(forged: Callable[..., str]) -> None:
    namespace = forged(HEADER_PID_NAMESPACE=pid_namespace() + 1)
    refusal(namespace, SegmentNamespaceError, "created in another pid namespace")


def test_a_segment_that_is_being_destroyed_is_refused_unless_to_finish_that(forged: Callable[..., str]) -> None:
    name = forged(HEADER_STATE=own_identity(DESTROYING))
    refusal(name, SegmentClosingError, f"is being destroyed by process {os.getpid()}")
    closing = attach_segment(name, closing=True)
    assert closing.closing
    with pytest.raises(SegmentClosingError, match="is being destroyed; attach again"):
        closing.check_live()
    closing.close()


@pytest.mark.parametrize("state", [0, -1])
def test_an_impossible_state_is_refused(forged: Callable[..., str], state: int) -> None:
    refusal(forged(HEADER_STATE=state), SegmentForeignError, "in no state that a segment can be in")


def test_every_public_way_in_refuses_alike(name: str) -> None:
    for way_in in (attach, destroy):
        with pytest.raises(SegmentNotFoundError):
            way_in(name)


# ------------------------------------------------------------------ destroy


def companions(segment: Segment) -> list[str]:
    """What else there is of a segment."""
    return [path.name for path in SHM.iterdir() if segment.uuid in path.name]


def test_destroying_removes_everything(name: str) -> None:
    runtime = create(name, small_config())
    segment = runtime._attachment.segment
    runtime.router(0)
    segment.lock_path.touch()
    assert len(companions(segment)) >= 2
    runtime.close()
    assert not segment_path(name).exists()
    assert companions(segment) == []


def test_an_attached_process_leaves_the_segment_to_its_owner(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    attach(runtime.name).close()
    assert segment_path(runtime.name).exists()


def test_of_two_destroyers_one_removes(segment: Segment) -> None:
    other = attach_segment(segment.name)
    assert claim_destruction(segment)
    assert claim_destruction(segment), "the same process may go on"
    parent = pack_identity(DESTROYING, 0, process_stat(os.getppid())[1], os.getppid())
    segment.write(at.HEADER_STATE, parent)
    assert not claim_destruction(other), "its parent is alive and at it"
    with pytest.raises(SegmentExistsError, match="is being destroyed by another process"):
        destroy(segment.name, timeout=0.1)
    assert segment_path(segment.name).exists()
    other.close()


def test_a_dead_destroyers_work_is_finished(segment: Segment) -> None:
    segment.write(at.HEADER_STATE, DEAD)
    segment.lock_path.touch()
    refusal(segment.name, SegmentClosingError, "is being destroyed")
    destroy(segment.name)
    assert not segment_path(segment.name).exists()
    assert identity_pid(segment.read(at.HEADER_STATE)) == os.getpid()
    assert companions(segment) == []


def test_creating_finishes_what_a_dead_destroyer_began(segment: Segment) -> None:
    segment.write(at.HEADER_STATE, DEAD)
    with create(segment.name, small_config()) as runtime:
        assert runtime._attachment.segment.uuid != segment.uuid


def test_a_late_destroyer_spares_the_successor(segment: Segment) -> None:
    assert claim_destruction(segment)
    segment_path(segment.name).unlink()
    successor = create_segment(segment.name, small_config())
    successor.lock_path.touch()
    unlink_segment(segment)
    assert attach_and_close(segment.name) == successor.uuid
    assert len(companions(successor)) == 1
    claim_destruction(successor)
    unlink_segment(successor)
    successor.close()


def test_removing_what_is_gone_is_no_error(segment: Segment) -> None:
    claim_destruction(segment)
    unlink_segment(segment)
    unlink_segment(segment)


def test_orphans_are_what_belongs_to_no_segment(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    runtime.router(0)
    live = runtime._attachment.segment
    live.lock_path.touch()
    vanished = uuid.uuid4().hex
    lock = SHM / f"shmroute-{vanished}.lock"
    lock.touch()
    names = [f"/shmroute-{vanished}-pager", f"/shmroute-{vanished}-lane31"]
    semaphores = [posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600) for name in names]
    try:
        found = orphans()
        assert [path for path in found if vanished in path.name] == sorted(
            [lock, *(SHM / f"sem.{name[1:]}" for name in names)]
        )
        assert not [path for path in found if live.uuid in path.name]
    finally:
        lock.unlink()
        for semaphore in semaphores:
            semaphore.unlink()
            semaphore.close()


def test_files_that_only_look_like_segments_disturb_nobody(segment: Segment) -> None:
    odd = SHM / f"{segment_path(unique_name()).name} with spaces"
    fifo, short = segment_path(unique_name()), segment_path(unique_name())
    odd.touch()
    short.touch()
    os.mkfifo(fifo)
    try:
        assert segment.name in segment_names()
        assert not any(" " in name for name in segment_names())
        orphans()
    finally:
        for path in (odd, fifo, short):
            path.unlink()


# ------------------------------------------------------------------ mappings


def test_live_views_keep_their_memory_and_are_warned_of(segment: Segment) -> None:
    other = attach_segment(segment.name)
    pool = Pool(other)
    pool.writable(1)[:] = bytes(range(256)) * 16
    weights = pool.weights(1).raw
    pool.forget()
    with pytest.warns(ResourceWarning, match="views of expert weights outlive"):
        other.close()
    assert weights.tolist() == list(range(256)) * 16
    assert not weights.flags.writeable
    mapped = Path("/proc/self/maps").read_text().count(segment_path(segment.name).name)
    del weights, pool
    gc.collect()
    assert Path("/proc/self/maps").read_text().count(segment_path(segment.name).name) == mapped - 1


def test_closing_without_views_warns_of_nothing_and_unmaps(segment: Segment) -> None:
    file = segment_path(segment.name).name
    mapped = Path("/proc/self/maps").read_text().count(file)
    other = attach_segment(segment.name)
    other.read(at.HEADER_STATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.close()
    assert Path("/proc/self/maps").read_text().count(file) == mapped


def test_slots_do_not_overlap_and_start_on_pages(segment: Segment) -> None:
    pool = Pool(segment)
    for slot in range(segment.config.slots):
        pool.writable(slot)[:] = bytes([slot + 1]) * segment.config.expert_bytes
    for slot in range(segment.config.slots):
        raw = pool.weights(slot).raw
        assert set(raw.tolist()) == {slot + 1}
        assert raw.ctypes.data % 4096 == 0
    del raw
    pool.forget()


def test_a_mapping_is_neither_pickled_nor_unlinked(segment: Segment) -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(segment.mapping)
    with pytest.raises(TypeError, match="does not unlink"):
        segment.mapping.unlink()


def test_a_process_that_attached_and_ended_unlinks_nothing(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    program = """
import sys
import numpy as np
import shmroute
runtime = shmroute.attach(sys.argv[1])
print(runtime.router(0).route(np.arange(8, dtype=np.float32)).experts.tolist())
"""
    ended = run_python(program, runtime.name)
    assert ended.stdout == "[7, 6]\n"
    assert ended.stderr == ""
    assert attach_and_close(runtime.name) == runtime._attachment.segment.uuid
    assert np.array_equal(runtime.affinity(0).activations(), [0, 0, 0, 0, 0, 0, 1, 1])


def test_a_claim_is_taken_back_if_somebody_came_meanwhile(segment: Segment) -> None:
    state = segment.read(at.HEADER_STATE)
    answers = iter([False, True])
    assert not claim_if_unused(segment, lambda: next(answers))
    assert segment.read(at.HEADER_STATE) == state
    assert not claim_if_unused(segment, lambda: True)
    assert not segment.closing
    assert claim_if_unused(segment, lambda: False)
    assert segment.closing


def test_a_segment_that_cannot_be_read_is_not_taken_for_gone(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(removal, "_uuid_of", refuse)
    with pytest.raises(OSError, match="too many"):
        orphans()
