"""This process's one attachment to a segment, shared by every `Runtime` that was attached to it.

A process has one mapping and one worker lane per segment, however often it attaches. The attachment claims the lane
when it is first needed, keeps the mapping in place while anything uses it, and lets go of everything at the end.

A forked child inherits the objects but not the lane, which names its parent: it is detached at once, and attaches
anew if it wants to.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shmroute.budget import too_few_for_workers
from shmroute.config import open_configured_source
from shmroute.errors import CheckpointError, ConfigError, NoWorkerLane, RuntimeClosedError, SmallBudgetWarning
from shmroute.pager_lock import PagerLock
from shmroute.shared import lanes
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD
from shmroute.shared.bell import Semaphore, listen, mark, unlink_semaphore
from shmroute.shared.identity import own_identity
from shmroute.shared.layout import HEADER_BELL, LANE_BELL, LANE_IDENTITY, LANE_SHARD, LANE_WAIT
from shmroute.shared.pool import Pool
from shmroute.shared.segment import Segment
from shmroute.shared.successors import new_trail
from shmroute.sources import ExpertSource

T = TypeVar("T")

REAP_PATIENCE = 1.0
"""Seconds, beyond two ticks of a pager, to wait until the lanes of the dead are free."""

SLEEPER_LEAVES = 1.0
"""Seconds within which a thread that sleeps on the lane's bell has noticed that the attachment is closed."""

_registry: dict[str, Attachment] = {}
_registry_mutex = threading.RLock()


class Lane:
    """The worker lane that this process holds.

    Attributes
    ----------
    number : int
    bit : int
        Its bit in lease masks.
    address : int
    wait, bell, counters : int
        Addresses of its wait word, bell word and metrics shard.
    semaphore : Semaphore
        Of its bell.
    """

    def __init__(self, segment: Segment, number: int) -> None:
        self.number = number
        self.bit = 1 << number
        self.address = segment.address + segment.layout.lane(number)
        self.wait = self.address + LANE_WAIT
        self.bell = self.address + LANE_BELL
        self.counters = self.address + LANE_SHARD
        self.semaphore = Semaphore(segment.semaphore_name(number))
        self.semaphore.drain()
        self._sleeping = threading.Lock()
        self._closed = False

    def counter(self, index: int) -> int:
        """Address of one of its counters."""
        return self.counters + index * WORD

    def sleep(self, timeout: float) -> None:
        """Wait for its bell; returns at once when closed."""
        with self._sleeping:
            if not self._closed:
                self.semaphore.sleep(timeout)

    def close(self) -> None:
        """Wake whoever sleeps, then close the semaphore: closed under a sleeper, its memory would be gone."""
        self.semaphore.post()
        # If the sleeper is this very thread (in a signal handler), the semaphore stays open until the process ends.
        if self._sleeping.acquire(timeout=SLEEPER_LEAVES):
            self._closed = True
            self.semaphore.close()
            self._sleeping.release()


class _Use:
    """The context manager of `Attachment.in_use`.

    A thread counts its blocks itself, and nobody else changes its count, so that takes no mutex. Whoever enters counts,
    then looks whether all is closed; whoever closes says so, then looks at the counts: one of the two sees the other.
    (count / closed)
    """

    __slots__ = ("_attachment",)

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def __enter__(self) -> Segment:
        attachment, thread = self._attachment, threading.get_ident()
        counts = attachment._in_use
        counts[thread] = counts.get(thread, 0) + 1
        if attachment.closed is not None:  # (count / closed)
            self.__exit__(None, None, None)
            attachment.check_open()
        return attachment.segment

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        attachment, thread = self._attachment, threading.get_ident()
        counts = attachment._in_use
        if counts[thread] > 1:
            counts[thread] -= 1
            return
        del counts[thread]
        if attachment.closed is not None:
            with attachment._mutex:  # free once the closer waits
                attachment._idle.notify_all()


class Attachment:
    """See the file's head. Made by `attachment_to` only.

    Attributes
    ----------
    closed : str or None
        Why everything has been let go, or is about to be.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.pool = Pool(segment)
        self.powers: npt.NDArray[np.float64] = power_table(segment.config.affinity.decay)
        self.trail = new_trail()
        self.users = 0
        self.gone = threading.Event()
        self._identity = own_identity()  # now, while there is a descriptor to find it out with
        self._lane: Lane | None = None
        self._pager_semaphore: Semaphore | None = None
        self._mutex = threading.RLock()  # re-entrant, since a signal handler may come in the middle of anything
        self._idle = threading.Condition(self._mutex)
        self._in_use: dict[int, int] = {}
        self._use = _Use(self)
        self.closed: str | None = None
        self._before_close: list[Callable[[], None]] = []
        self._late_records: dict[int, Callable[[], None]] = {}
        self._source: ExpertSource | None = None
        self._source_mutex = threading.Lock()
        self._shared: dict[Any, Any] = {}
        self._shared_mutex = threading.RLock()  # what is made may need something else that is shared

    # ---------------------------------------------------------- use

    @property
    def trail_address(self) -> int:
        """Address of this worker's memory of what it chose last; 0 if nobody predicts by it."""
        settings = self.segment.config.pager
        return self.trail.ctypes.data if settings.prefetch and "transitions" in settings.predictors else 0

    def check_open(self) -> None:
        """Raise `RuntimeClosedError` once closed."""
        if self.closed is not None:
            raise RuntimeClosedError(self.closed)

    def in_use(self) -> _Use:
        """Keep the mapping in place for the length of a ``with`` block, which gives the segment.

        Raises
        ------
        RuntimeClosedError
            When entering the block, if the mapping is gone.
        """
        return self._use

    def check_idle_here(self) -> None:
        """Raise `RuntimeError` if this thread is in the middle of using it, so that closing would wait for itself."""
        if threading.get_ident() in self._in_use:
            raise RuntimeError(
                "close() was called by a signal handler in the middle of another call to the runtime, which it would "
                "wait for; raise an exception from the handler instead (sys.exit(), say) and close outside of it"
            )

    def before_close(self, action: Callable[[], None]) -> None:
        """Have `action` run when everything is let go, while the mapping is still there: the last one given first."""
        with self._mutex:
            self.check_open()
            self._before_close.append(action)

    def records_late(self, layer: int, action: Callable[[], None]) -> None:
        """Have `action` run before this process reads a layer's affinity: it records what was put off."""
        self._late_records[layer] = action

    def record_pending(self, layer: int) -> None:
        """Record what this process routed in a layer and put off."""
        action = self._late_records.get(layer)
        if action is not None:
            action()

    # ---------------------------------------------------------- lane

    def lane(self) -> Lane:
        """The lane of this process, claimed on first use.

        Warns
        -----
        SmallBudgetWarning
            If there are now as many workers as slots.

        Raises
        ------
        NoWorkerLane
            If all are taken by live processes.
        SegmentClosingError
            If the segment is being destroyed.
        """
        if self._lane is None:
            with self._mutex:
                self.check_open()
                if self._lane is None:
                    self._lane = self._claim_lane()
                    self._warn_of_small_budget(self._lane.number)
        return self._lane

    def _warn_of_small_budget(self, lane: int) -> None:
        """Lanes are taken from the first on, so with this worker there are at least lane + 1."""
        config = self.segment.config
        problem = config.source and too_few_for_workers(config.slots, lane + 1)
        if problem:
            warnings.warn(problem, SmallBudgetWarning, stacklevel=4)

    def _claim_lane(self) -> Lane:
        segment = self.segment
        segment.check_live()
        lanes.free_own_leftovers(segment, self._identity)
        number = self._try_claim(self._identity)
        deadline = time.monotonic() + 2 * segment.config.pager.tick + REAP_PATIENCE
        while number < 0 and len(lanes.live_lanes(segment)) < segment.config.max_workers:
            # The dead fill the lanes: they are reaped here, or by whoever holds the lock.
            segment.check_live()
            with PagerLock(segment) as lock:
                if lock.try_acquire():
                    lanes.reap(segment)
            number = self._try_claim(self._identity)
            if number < 0 and time.monotonic() > deadline:
                break
            time.sleep(0.01)
        if number < 0:
            raise NoWorkerLane(
                f"all {segment.config.max_workers} worker lanes of {segment.name!r} are taken by live processes; "
                f"stop one, or create the segment with a larger max_workers (at most 32)"
            )
        try:
            lane = Lane(segment, number)
        except BaseException:  # out of descriptors, say
            self._free_lane(number)
            raise
        if segment.closing:  # (lane claim / header state)
            self._free_lane(number)
            lane.semaphore.close()
            unlink_semaphore(lane.semaphore.name)
            segment.check_live()
        return lane

    def _free_lane(self, number: int) -> None:
        """Give back this process's own lane."""
        word = self.segment.read(self.segment.layout.lane(number) + LANE_IDENTITY)
        lanes.free_lane(self.segment, number, word)

    def _try_claim(self, identity: int) -> int:
        layout = self.segment.layout
        return int(
            lanes.claim(
                self.segment.address + layout.lanes, layout.lane_bytes, self.segment.config.max_workers, identity
            )
        )

    def one(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """What `make` makes of this attachment: once, then the same for all runtimes of this process."""
        key = (make, arguments)
        with self._shared_mutex:
            self.check_open()
            if key not in self._shared:
                self._shared[key] = make(self, *arguments)
            made: T = self._shared[key]
            return made

    # ---------------------------------------------------------- where the experts come from

    def source(self) -> ExpertSource:
        """The runtime's source, opened here on first use.

        Raises
        ------
        ConfigError
            If the runtime has none.
        CheckpointError
            If it cannot be opened here, or is not what the runtime was made for.
        """
        with self._source_mutex:
            if self._source is None:
                self._source = open_configured_source(self.segment.config)
            return self._source

    def location(self, layer: int, expert: int) -> str:
        """Where an expert's bytes are, for messages."""
        try:
            return self.source().location(layer, expert)
        except CheckpointError as error:
            return error.path  # of the file at fault; what is wrong with the load is the caller's to say
        except (ConfigError, OSError):
            spec = self.segment.config.source
            return "nowhere" if spec is None else str(spec.arguments.get("path", spec.factory))

    # ---------------------------------------------------------- the pager's bell

    def pager_semaphore(self) -> Semaphore:
        """The semaphore of the pager's bell."""
        if self._pager_semaphore is None:
            with _registry_mutex:
                if self._pager_semaphore is None:
                    semaphore = Semaphore(self.segment.semaphore_name(None))
                    if self.segment.closing:  # whoever destroys may have unlinked it before it was made
                        unlink_semaphore(semaphore.name)
                    self._pager_semaphore = semaphore
        return self._pager_semaphore

    def ring_pager(self, *, only_hungry: int = 0) -> None:
        """Wake the pager if it sleeps (and, with HUNGRY, if it waits for a slot)."""
        word = listen(self.segment.address + HEADER_BELL, only_hungry)
        if word:
            self.answer_bell(word)

    def answer_bell(self, word: int) -> None:
        """Post the pager's semaphore, then mark its bell; `word` is what a kernel heard."""
        self.pager_semaphore().post()
        mark(self.segment.address + HEADER_BELL, word)

    # ---------------------------------------------------------- end

    def begin_close(self) -> None:
        """Let nobody begin to use it any more."""
        self.closed = f"the runtime {self.segment.name!r} was closed in this process; attach to it again"

    def close(self) -> None:
        """After `begin_close`: wait for users, free the lane, unmap."""
        with self._mutex:
            while self._in_use:  # (count / closed)
                self._idle.wait()
        for action in reversed(self._before_close):
            action()
        if self._lane is not None:
            self._free_lane(self._lane.number)
            self._lane.close()
        if self._pager_semaphore is not None:
            self._pager_semaphore.close()
        if self._source is not None:
            self._source.close()
        self.pool.forget()
        self.segment.close()

    def abandon_in_child(self) -> None:
        """After a fork, in the child: forget the parent's lane without touching it."""
        self.closed = (
            f"the runtime {self.segment.name!r} belongs to the process that forked this one; attach to it again here"
        )
        self._lane = None
        self._mutex = threading.RLock()
        self._idle = threading.Condition(self._mutex)
        self._in_use = {}
        self.pool.forget()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the parent's open views are not the child's leak
            self.segment.close()


def attachment_to(segment: Segment) -> Attachment:
    """The attachment of this process to a segment; a second mapping of the same one is closed."""
    while True:
        with _registry_mutex:
            known = _registry.get(segment.uuid)
            if known is None:
                known = _registry[segment.uuid] = Attachment(segment)
            if known.users > 0 or not known.closed:
                if known.segment is not segment:
                    segment.close()
                known.users += 1
                return known
        # It is being closed by another thread: two attachments would take each other's lane for a leftover.
        known.gone.wait()


def leave(attachment: Attachment) -> None:
    """Undo one `attachment_to`; the last one closes."""
    with _registry_mutex:
        attachment.users -= 1
        if attachment.users > 0 or attachment.closed:
            return
        attachment.begin_close()
    try:
        attachment.close()
    finally:
        with _registry_mutex:
            if _registry.get(attachment.segment.uuid) is attachment:
                del _registry[attachment.segment.uuid]
        attachment.gone.set()


def _detach_in_child() -> None:
    global _registry_mutex  # noqa: PLW0603 - the parent's may be held by a thread that does not exist here
    _registry_mutex = threading.RLock()
    for attachment in _registry.values():
        attachment.abandon_in_child()
    _registry.clear()


os.register_at_fork(after_in_child=_detach_in_child)
