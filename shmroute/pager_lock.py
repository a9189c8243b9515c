"""The lock that makes one process the pager, and reapers of lanes one at a time.

A POSIX record lock (`fcntl.lockf`) goes with the process that took it: the kernel releases it at death, even while a
grandchild lives on, and then it is certain that no thread of the dead pager writes a slot any more. The price: closing
*any* descriptor of the file drops the lock, so a process opens the file once, here.
"""

from __future__ import annotations

import fcntl
import os
import threading
from types import TracebackType

from shmroute.shared.segment import Segment

_held_here: set[str] = set()
_mutex = threading.Lock()


class PagerLock:
    """The lock of one segment. Leaving its ``with`` block releases it.

    Parameters
    ----------
    segment : Segment
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock without waiting; False if another process, or this one, holds it, or the segment is closing."""
        path = self._segment.lock_path
        with _mutex:
            if self._segment.uuid in _held_here or self._segment.closing:
                return False
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                if isinstance(error, BlockingIOError | PermissionError):  # either means: held by another process
                    return False
                raise
            # Whoever destroys unlinks the file after closing the segment: what is locked here may be its successor.
            if self._segment.closing:
                path.unlink(missing_ok=True)
                os.close(fd)
                return False
            self._fd = fd
            _held_here.add(self._segment.uuid)
            return True

    def release(self) -> None:
        """Give it up, if it is held."""
        with _mutex:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
                _held_here.discard(self._segment.uuid)

    def leave_to_death(self) -> None:
        """Hold it until this process has ended: for one that leaves while its threads still write slots."""
        self._fd = None

    def __enter__(self) -> PagerLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _forget_in_child() -> None:
    global _mutex  # noqa: PLW0603 - may be held by a thread that does not exist here
    _mutex = threading.Lock()
    _held_here.clear()  # record locks are not inherited


os.register_at_fork(after_in_child=_forget_in_child)
