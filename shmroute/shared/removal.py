"""Removing segments, and finding what is left of them.

Removal is a CAS of the state word to DESTROYING(identity). Only the winner unlinks, or whoever takes over from a dead
winner by the same CAS. What goes with a segment (semaphores, lock file) carries its uuid, so a successor of the same
name shares nothing with it. The segment's own file goes last: as long as it is there, a death in between can be
finished by the next who finds it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

from shmroute.shared.bell import unlink_semaphore
from shmroute.shared.identity import is_dead, own_identity, same_process
from shmroute.shared.layout import HEADER_STATE, HEADER_UUID
from shmroute.shared.segment import NAME_PATTERN, PREFIX, SHM, Segment, segment_path
from shmroute.shared.words import DESTROYING, identity_state


def claim_destruction(segment: Segment) -> bool:
    """Become the one who removes a segment: False if a live process is at it already.

    Linearization point: the CAS of the state word. From it on nobody attaches, and waiters give up.
    """
    me = own_identity(DESTROYING)
    while True:
        word = segment.read(HEADER_STATE)
        if identity_state(word) == DESTROYING:
            if same_process(word, me):
                return True
            if not is_dead(word):
                return False
        if segment.swap(HEADER_STATE, word, me):
            return True


def claim_if_unused(segment: Segment, in_use: Callable[[], bool]) -> bool:
    """`claim_destruction`, taken back if somebody came to use the segment meanwhile. (lane claim / header state)

    Only the holder of the pager's lock may call this: then no pager has left because of a claim that is taken back.

    Parameters
    ----------
    in_use : callable
        Whether anybody uses the segment; asked before and after the claim.
    """
    before = segment.read(HEADER_STATE)
    if in_use() or not claim_destruction(segment):
        return False
    if not in_use():
        return True
    segment.swap(HEADER_STATE, own_identity(DESTROYING), before)
    return False


def unlink_segment(segment: Segment) -> None:
    """Remove the files of a segment whose destruction this process has claimed; its own file last."""
    for lane in (None, *range(segment.config.max_workers)):
        unlink_semaphore(segment.semaphore_name(lane))
    segment.lock_path.unlink(missing_ok=True)
    path = segment_path(segment.name)
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        # The name may stand for a successor by now; nobody but the claimant unlinks this inode, so this is no race.
        if (status.st_dev, status.st_ino) == segment.inode:
            path.unlink()


def segment_names() -> list[str]:
    """Names of all files that claim to be segments."""
    names = (path.name.removeprefix(PREFIX) for path in SHM.glob(f"{PREFIX}*"))
    return sorted(name for name in names if NAME_PATTERN.fullmatch(name))


_COMPANION = re.compile(r"(?:sem\.)?shmroute-([0-9a-f]{32})(?:\.lock|-pager|-lane\d+)")


def orphans() -> list[Path]:
    """Lock files and semaphores in ``/dev/shm`` that belong to no segment.

    They are listed before the segments are, so what goes with a segment that is being published is never taken for
    an orphan.
    """
    companions = [(path, match[1]) for path in SHM.iterdir() if (match := _COMPANION.fullmatch(path.name))]
    alive = set()
    for name in segment_names():
        # Another user's has companions of that user. Any other error: one that cannot be read is none the less there.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            alive.add(_uuid_of(segment_path(name)))
    return sorted(path for path, uuid in companions if uuid not in alive and _is_own(path))


def _uuid_of(path: Path) -> str:
    """What a segment's header says its uuid is, "" if the file is no regular one; nothing else is checked."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return ""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # it may be a FIFO
    try:
        return os.pread(fd, 16, HEADER_UUID).hex()
    finally:
        os.close(fd)


def _is_own(path: Path) -> bool:
    """Whether a file is there and belongs to this user."""
    try:
        return path.stat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def wait_until_gone(name: str, timeout: float) -> bool:
    """Wait until no file of that name is there; whether it went."""
    deadline = time.monotonic() + timeout
    while segment_path(name).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_published(segment: Segment) -> bool:
    """Whether the segment's name still stands for it."""
    try:
        status = segment_path(segment.name).stat()
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == segment.inode
