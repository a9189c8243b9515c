"""A bell: waking a sleeper without a system call when nobody sleeps.

A bell is one word (epoch, state, HUNGRY) and one POSIX semaphore. Only the sleeper moves the epoch, once for each
sleep; a ringer may only turn ARMED into RUNG within the epoch that it read.

| who | calls | progress |
|---|---|---|
| the one sleeper | `arm`, looks for work once more, `Semaphore.sleep`, `disarm` | blocks, bounded by a timeout |
| any ringer | makes work visible, then `heard`; if that is not 0, `Semaphore.post`, then `mark` | lock-free |

Store-then-load pairs, sequentially consistent on both sides: (bell-A) the sleeper stores ARMED, then loads the work;
(bell-B) the ringer stores the work, then loads the bell. One of the two sees the other, so no wake-up is lost.

Death windows: a ringer dead before its post has rung nothing, and another ringer, or the sleeper's timeout, covers
it; a ringer dead between post and mark leaves the bell ARMED, so another posts once more: one spurious wake-up. The
mark comes *after* the post, since the other way round a death between them would silence all further ringers. The
epoch keeps a late mark out of the next sleep.

A semaphore is a bell, never a lock: its count means nothing, and the sleeper drains it.
"""

from __future__ import annotations

import time

import posix_ipc
from numba import types

from shmroute.shared.atomic import cas, load, store
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.words import ARMED, AWAKE, HUNGRY, RUNG, bell_epoch, bell_state, pack_bell

SLICE = 1.0
"""Longest single wait on a semaphore, in seconds: `posix_ipc` waits by the real-time clock, which may jump ahead. A
jump back lengthens the wait that is under way, and no other."""


@kernel(types.void(types.int64, types.int64))
def arm(bell: int, hungry: int) -> None:
    """Begin a sleep: a new epoch, ARMED. (bell-A)

    `hungry` (0 or HUNGRY) asks that released leases and cleared wait words ring too.
    """
    store(bell, pack_bell(bell_epoch(load(bell)) + 1, ARMED | hungry))


@kernel(types.void(types.int64))
def disarm(bell: int) -> None:
    """End a sleep."""
    store(bell, pack_bell(bell_epoch(load(bell)), AWAKE))


@inner
def heard(bell: int, only_hungry: int) -> int:
    """What to `mark` after a post, or 0 if nobody needs one. (bell-B)

    Parameters
    ----------
    bell : int
        Address of the word.
    only_hungry : int
        HUNGRY to ring only a sleeper that is hungry, 0 to ring any.
    """
    word = load(bell)
    if bell_state(word) != ARMED or (word & only_hungry) != only_hungry:
        return 0
    return word


@kernel(types.int64(types.int64, types.int64))
def listen(bell: int, only_hungry: int) -> int:
    """`heard`, from Python."""
    return heard(bell, only_hungry)


@kernel(types.void(types.int64, types.int64))
def mark(bell: int, word: int) -> None:
    """After a post: let no other ringer post in the same sleep. `word` is what `heard` returned."""
    cas(bell, word, pack_bell(bell_epoch(word), RUNG | (word & HUNGRY)))


class Semaphore:
    """A named semaphore that is made by whoever comes first.

    Parameters
    ----------
    name : str
        Without the leading slash.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._semaphore = posix_ipc.Semaphore(f"/{name}", posix_ipc.O_CREAT, mode=0o600, initial_value=0)

    def post(self) -> None:
        """Wake the sleeper, or keep it from its next sleep."""
        self._semaphore.release()

    def sleep(self, timeout: float) -> bool:
        """Wait for a post for at most `timeout` seconds, by the monotonic clock; whether one came."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._semaphore.acquire(min(left, SLICE))
            except (posix_ipc.BusyError, posix_ipc.SignalError):
                continue
            return True
        return False

    def drain(self) -> None:
        """Forget posts that nobody waited for."""
        while True:
            try:
                self._semaphore.acquire(0)
            except posix_ipc.BusyError:
                return
            except posix_ipc.SignalError:
                continue

    def close(self) -> None:
        """Close it here; it lives on until it is unlinked."""
        self._semaphore.close()


def unlink_semaphore(name: str) -> None:
    """Remove a named semaphore, if it is there."""
    try:
        posix_ipc.unlink_semaphore(f"/{name}")
    except posix_ipc.ExistentialError:
        return


def ring(bell: int, semaphore: Semaphore, *, only_hungry: int = 0) -> bool:
    """Ring a bell if its sleeper needs it; whether it did."""
    word = listen(bell, only_hungry)
    if not word:
        return False
    semaphore.post()
    mark(bell, word)
    return True
