"""The pager as a process: taking the lock, serving until told otherwise, handing over, removing what nobody uses.

What a pager does when it is told to stop (SIGTERM, SIGINT, SIGHUP unless ignored, its owner's death):

- the segment is being destroyed: it finishes the loads under way and leaves;
- a standby waits for its lock: likewise, and the standby takes over a warm cache;
- another live process owns the segment: likewise, and the segment stays, without a pager;
- otherwise it goes on serving until no worker is left, then removes the segment. A second signal makes it leave at
  once, and the segment stays for another pager to adopt.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from shmroute.config import open_configured_source
from shmroute.errors import PagerStartError
from shmroute.pager.daemon import Pager
from shmroute.pager_lock import PagerLock
from shmroute.shared.atomic import WORD
from shmroute.shared.identity import DeathWatch, is_dead, own_identity, same_process
from shmroute.shared.lanes import live_lanes
from shmroute.shared.layout import HEADER_OWNER, HEADER_PAGER, HEADER_STANDBY
from shmroute.shared.metrics import PagerCounter
from shmroute.shared.removal import claim_destruction, claim_if_unused, is_published, unlink_segment
from shmroute.shared.segment import Segment
from shmroute.shared.words import NOBODY, identity_pid

POLL = 0.05
"""Seconds between looks at what another process will do: give up the lock, or finish a removal."""

LOCK_PATIENCE = 3.0
"""Seconds that a lock may be held by a process that is no pager."""

START_TIMEOUT = 60.0

SWITCH_INTERVAL = 50e-6
"""Seconds for which the pager's main thread keeps the GIL from an I/O thread that has read an expert: it has another
to read, and each millisecond's wait is ten megabytes."""


class Outcome(Enum):
    """How a pager's work ended."""

    CLOSED = "the segment was destroyed"
    HANDED_OVER = "a standby takes over"
    REMOVED = "no worker was left; the segment was removed"
    LEFT = "left; the segment stays for another pager"
    NOT_NEEDED = "stopped while standing by"


@dataclass
class StopRequests:
    """Signals and deaths that ask the pager to stop, as seen so far."""

    signals: int = 0
    owner_died: bool = False
    on_signal: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopRequests]:
        """Count SIGTERM, SIGINT, and SIGHUP unless it is ignored (nohup), for the length of a block."""

        def handle(number: int, frame: Any) -> None:
            self.signals += 1
            self.on_signal()

        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        former = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield self
        finally:
            for number, action in former.items():
                signal.signal(number, action)


def standby_alive(segment: Segment) -> bool:
    """Whether a living process waits to become the pager."""
    return not is_dead(segment.read(HEADER_STANDBY))


def pager_alive(segment: Segment) -> bool:
    """Whether the process that was last the pager is alive."""
    return not is_dead(segment.read(HEADER_PAGER))


def owned_by_another(segment: Segment) -> bool:
    """Whether a living process other than this one owns the segment, and will remove it."""
    owner = segment.read(HEADER_OWNER)
    return not same_process(owner, own_identity()) and not is_dead(owner)


def run_pager(
    segment: Segment,
    *,
    owner: int = NOBODY,
    standby: bool = False,
    announce: Callable[[str], None] = lambda message: None,
) -> Outcome:
    """Be a segment's pager until the end, in this process's main thread.

    Parameters
    ----------
    segment : Segment
    owner : int
        Identity word of the process whose death ends this one's work; 0 for none.
    standby : bool
        If another pager is at work, wait for its end instead of raising.
    announce : callable
        Gets a line at every change of role.

    Raises
    ------
    PagerStartError
        If another pager is at work and `standby` is off.
    CheckpointError, ConfigError
        If the source cannot be opened.
    """

    def tell(message: str) -> None:
        with contextlib.suppress(OSError):  # whoever listened may be gone
            announce(message)

    with StopRequests().installed() as requests, PagerLock(segment) as lock, _short_turns():
        if not _acquire(segment, lock, requests, standby, tell):
            return Outcome.CLOSED if segment.closing else Outcome.NOT_NEEDED
        pager = Pager(segment, open_configured_source(segment.config))
        requests.on_signal = pager.interrupt
        watch: DeathWatch[str] = DeathWatch()
        stop = _StopRule(segment, requests, watch, owner, tell)
        try:
            tell(f"serving {segment.name!r} (pid {os.getpid()})")
            pager.serve(stop, at_once=lambda: requests.signals > 1)
        finally:
            requests.on_signal = lambda: None
            watch.close()
            if pager.loading:
                lock.leave_to_death()  # until then, threads may write slots
            else:
                pager.close()
        if stop.outcome in (Outcome.REMOVED, Outcome.CLOSED):
            _see_removal_through(segment, requests)
        return stop.outcome


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Have threads take turns every `SWITCH_INTERVAL`, for the length of a block."""
    former = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(former)


def _see_removal_through(segment: Segment, requests: StopRequests) -> None:
    """Remove the files if that is this process's to do, or if whoever has claimed it dies before it is done."""
    while is_published(segment) and requests.signals < 2:
        if claim_destruction(segment):
            unlink_segment(segment)
            return
        time.sleep(POLL)


def _acquire(
    segment: Segment, lock: PagerLock, requests: StopRequests, standby: bool, announce: Callable[[str], None]
) -> bool:
    """Take the lock, at once or as a standby; False if there is nothing to be the pager of any more."""
    me = own_identity()
    announced = False
    deadline = time.monotonic() + LOCK_PATIENCE
    while not segment.closing and not requests.signals:
        if lock.try_acquire():
            word = segment.read(HEADER_STANDBY)
            if same_process(word, me):
                segment.swap(HEADER_STANDBY, word, NOBODY)
            return True
        if not standby and not segment.closing:
            if pager_alive(segment):
                raise PagerStartError(
                    f"{segment.name!r} has a pager already (pid {identity_pid(segment.read(HEADER_PAGER))}); "
                    f"use --standby to wait for its end"
                )
            if time.monotonic() > deadline:  # a process that reaps lanes holds the lock too, for a moment
                raise PagerStartError(f"another process holds {segment.lock_path} and does not become the pager")
            time.sleep(POLL)
            continue
        word = segment.read(HEADER_STANDBY)
        if not same_process(word, me) and is_dead(word):
            segment.swap(HEADER_STANDBY, word, me)
        if not announced:
            announce(f"standing by for {segment.name!r} (pid {os.getpid()})")
            announced = True
        time.sleep(POLL)
    word = segment.read(HEADER_STANDBY)
    if same_process(word, me):
        segment.swap(HEADER_STANDBY, word, NOBODY)
    return False


class _StopRule:
    """Asked by the pager once a round whether to stop; afterwards `outcome` says why."""

    def __init__(
        self,
        segment: Segment,
        requests: StopRequests,
        watch: DeathWatch[str],
        owner: int,
        announce: Callable[[str], None],
    ) -> None:
        self._segment, self._requests, self._watch = segment, requests, watch
        self._owner, self._announce = owner, announce
        self._draining = False
        self.outcome = Outcome.CLOSED

    def __call__(self) -> bool:
        if self._segment.closing:
            self.outcome = Outcome.CLOSED
            return True
        if self._owner != NOBODY:
            self._watch.watch("owner", self._owner)  # until it works: out of descriptors, it does not
        if not self._requests.owner_died and self._watch.dead():
            self._requests.owner_died = True
            self._announce("the owner died")
        if not self._requests.signals and not self._requests.owner_died:
            return False
        if self._requests.signals > 1:
            self.outcome = Outcome.LEFT
            return True
        if self._requests.signals and standby_alive(self._segment):
            self.outcome = Outcome.HANDED_OVER
            return True
        if owned_by_another(self._segment):
            self._announce("the owner lives on: leaving its segment to it")
            self.outcome = Outcome.LEFT
            return True
        workers = len(live_lanes(self._segment))
        if workers:
            if not self._draining:
                self._announce(f"{workers} workers are still attached; serving until they leave (signal again to go)")
                self._draining = True
            return False
        if not claim_if_unused(self._segment, lambda: bool(live_lanes(self._segment))):
            return self._segment.closing
        self.outcome = Outcome.REMOVED
        return True


# ------------------------------------------------------------------ starting one


def start_pager(segment: Segment, owner: int) -> subprocess.Popen[bytes]:
    """Start a pager for a segment as a program of its own, and wait until it serves.

    Parameters
    ----------
    segment : Segment
    owner : int
        Identity word of the owner.

    Raises
    ------
    PagerStartError
        If it ends first; its own message is on standard error.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "shmroute.pager", segment.name, "--uuid", segment.uuid, "--owner", str(owner)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # whoever reads the owner's output shall see its end when the owner ends
        start_new_session=True,  # Ctrl-C is for the owner, who then stops its pager
        env=environment,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not _serves(segment, process.pid):
            if process.poll() is not None:
                raise PagerStartError(
                    f"the pager of {segment.name!r} ended with code {process.returncode} before it served; "
                    f"its message is on standard error"
                )
            if time.monotonic() > deadline:
                raise PagerStartError(f"the pager of {segment.name!r} did not serve within {START_TIMEOUT:g} s")
            time.sleep(0.005)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def _serves(segment: Segment, pid: int) -> bool:
    return (
        identity_pid(segment.read(HEADER_PAGER)) == pid
        and segment.read(segment.layout.pager + PagerCounter.TICKS * WORD) > 0
    )


def stop_pager(process: subprocess.Popen[bytes], timeout: float = 2.0) -> None:
    """End a pager whose segment is being destroyed: nobody needs what it would still load, so it may be killed.

    Parameters
    ----------
    timeout : float
        Seconds that it has to leave by itself.
    """
    process.terminate()
    process.send_signal(signal.SIGCONT)  # a stopped process would not see the other signal
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
