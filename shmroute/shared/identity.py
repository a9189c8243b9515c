"""Who a process is, and whether it still lives.

A process is named by its pid and its start time, packed in one word (`shmroute.shared.words`), so that a recycled pid
is never taken for the process that had it before. A process is **dead** when the kernel says so, and only then: not
when it is slow, stopped, or when this process has run out of descriptors.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Hashable
from typing import Generic, TypeVar

from shmroute.shared.words import (
    LIVE,
    NOBODY,
    START_BITS,
    identity_pid,
    identity_start,
    identity_state,
    pack_identity,
)


def process_stat(pid: int) -> tuple[str, int]:
    """State letter and start time (clock ticks since boot) of a process, from ``/proc/PID/stat``.

    Raises
    ------
    OSError
        As reading the file gave it.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The command name is in parentheses and may hold anything, parentheses too.
        fields = file.read().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19])


def own_identity(state: int = LIVE, generation: int = 0) -> int:
    """The identity word of this process."""
    pid = os.getpid()
    return pack_identity(state, generation, process_stat(pid)[1], pid)


def same_process(one: int, other: int) -> bool:
    """Whether two identity words name the same process, whatever their states and generations."""
    return identity_pid(one) == identity_pid(other) and identity_start(one) == identity_start(other)


def _started_otherwise(identity: int) -> bool:
    """Whether the pid now belongs to a process (or thread) with another start time."""
    try:
        _, start = process_stat(identity_pid(identity))
    except OSError:
        return False
    return start & ((1 << START_BITS) - 1) != identity_start(identity)


def _open_pidfd(identity: int) -> int | None:
    """A pidfd of the process, None if it is dead.

    Raises
    ------
    OSError
        If the kernel says neither.
    """
    try:
        pidfd = os.pidfd_open(identity_pid(identity))
    except ProcessLookupError:
        return None
    except OSError as error:
        # The pid may be a thread of some other process by now, for which there is no pidfd.
        if error.errno in (errno.EINVAL, errno.ENOENT) and _started_otherwise(identity):
            return None
        raise
    if _started_otherwise(identity):
        os.close(pidfd)
        return None
    return pidfd


def is_dead(identity: int) -> bool:
    """Whether the process that an identity word names has ended. Nobody (state 0) counts as dead."""
    if identity_state(identity) == NOBODY:
        return True
    try:
        pidfd = _open_pidfd(identity)
    except OSError:
        return False
    if pidfd is None:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(pidfd)


def is_stopped(identity: int) -> bool:
    """Whether the process is stopped by a signal or a tracer."""
    try:
        return process_stat(identity_pid(identity))[0] in "Tt"
    except OSError:
        return False


Key = TypeVar("Key", bound=Hashable)


class DeathWatch(Generic[Key]):
    """Watches processes by pidfds that stay open: one poll tells of all of them."""

    def __init__(self) -> None:
        self._watched: dict[Key, tuple[int, int | None]] = {}
        self._poll = select.poll()

    def watch(self, key: Key, identity: int) -> None:
        """Watch a process under `key`, in place of whichever it stood for."""
        known = self._watched.get(key)
        if known is not None and known[0] == identity and known[1] is not None:
            return
        self.forget(key)
        try:
            pidfd = _open_pidfd(identity)
        except OSError:
            return  # unknown counts as alive; the next call tries again
        if pidfd is not None:
            self._poll.register(pidfd, select.POLLIN)
        self._watched[key] = (identity, pidfd)

    def forget(self, key: Key) -> None:
        """Stop watching."""
        if key in self._watched:
            _, pidfd = self._watched.pop(key)
            if pidfd is not None:
                self._poll.unregister(pidfd)
                os.close(pidfd)

    def dead(self) -> list[tuple[Key, int]]:
        """The (key, identity) of each watched process that has ended."""
        readable = {descriptor for descriptor, _ in self._poll.poll(0)}
        return [(key, who) for key, (who, fd) in self._watched.items() if fd is None or fd in readable]

    def close(self) -> None:
        """Stop watching all."""
        for key in list(self._watched):
            self.forget(key)
