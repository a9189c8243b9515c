"""Leases: how a worker gets an expert's weights, reads them safely, and waits for those that are not resident.

A lease is this process's bit in an expert's word. Threads of a process share the bit, so a count of their leases goes
with it; one mutex covers the count *and* the bit, since with a count alone a last release could clear the bit that a
new lease relies on. Both change in one kernel call (`shmroute.shared.lease_table`).

A process waits for one expert at a time (its lane has one wait word), so a second mutex admits one waiting thread;
queueing for it counts towards the timeout. The order of a wait is what makes it safe (`shmroute.shared.bell`):

1. store the wait word: from here on the pager does not evict that expert, and loads it first; (wait word / expert word)
2. arm the lane's bell; (lane bell / expert word)
3. try to lease, else request;
4. sleep, then from 2.

Giving up clears the wait word and rings a hungry pager.

Death windows: anywhere in here, a dead worker leaves a bit, a wait word or a requested expert; the reaper clears the
first two, and the load of the third is harmless.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from shmroute.attachment import Attachment
from shmroute.config import NO_SOURCE
from shmroute.errors import ConfigError, ExpertLoadError, ExpertTimeout, LeaseHeldError, PagerUnavailable
from shmroute.failures import failure_reason
from shmroute.recording.append import append_wait
from shmroute.recording.recorder import recorder_of
from shmroute.shared.affinity import checked_ids
from shmroute.shared.atomic import WORD
from shmroute.shared.bell import arm, disarm
from shmroute.shared.experts import BROKEN, QUEUE
from shmroute.shared.identity import is_dead, is_stopped
from shmroute.shared.layout import HEADER_PAGER
from shmroute.shared.lease_table import (
    CLOSED,
    IS_CLOSED,
    NOT_HELD,
    demand,
    demand_each,
    give_back,
    lease_table,
    take_lease,
)
from shmroute.shared.metrics import BUCKETS as HISTOGRAM_BUCKETS
from shmroute.shared.metrics import LANE_COUNTERS, LaneCounter, PagerCounter, add, count_duration
from shmroute.shared.pool import ExpertWeights
from shmroute.shared.words import FAILED, HUNGRY, PREFETCH, URGENT, expert_state, identity_pid, pack_wait

RECHECK = 0.1
"""Longest sleep of a waiter, in seconds, before it looks again by itself."""

ExpertRows = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64], ExpertWeights]


Groups = dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
"""expert -> rows and ranks."""

Holder = npt.NDArray[np.int64]
"""int64 [1]: how many leases a thread holds. Thread ids are used again after a thread's end, these are not."""


class Leases:
    """The leases of one process on one segment."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._segment = attachment.segment
        self._lane = attachment.lane()
        self._table = lease_table(self._segment, self._lane.number)
        self._recorder = attachment.one(recorder_of)
        self._mutex = threading.RLock()
        self._here = threading.local()
        self._waiting = threading.Lock()
        self.weights = attachment.pool.weights
        attachment.before_close(self._close)

    # ---------------------------------------------------------- one lease

    def holder(self) -> Holder:
        """This thread."""
        try:
            found: Holder = self._here.holder
        except AttributeError:
            found = self._here.holder = np.zeros(1, np.int64)
        return found

    def try_lease(self, layer: int, expert: int, holder: Holder) -> int:
        """Take a lease for this thread, the `holder`, if the expert is resident: its slot, or a negative number."""
        if self._attachment.closed:  # in a forked child too, where the mutex may belong to a thread that does not exist
            self._attachment.check_open()
        with self._mutex:
            slot: int = take_lease(self._table, layer, expert, holder)
        if slot == CLOSED:
            self._attachment.check_open()
        return slot

    def release(self, layer: int, expert: int, holder: Holder) -> None:
        """Give back a lease that `holder` took. Does nothing once the attachment is closed, which gave back all.

        Garbage collection may end a dropped `Runtime.experts` loop, and so a lease, anywhere.
        """
        if self._attachment.closed:  # see `try_lease`
            return
        with self._mutex:
            bell = give_back(self._table, layer, expert, holder)
            if bell == NOT_HELD:
                raise RuntimeError(f"expert {expert} of layer {layer} is not leased: a lease was released twice")
            if bell:
                self._attachment.answer_bell(bell)

    def holds_any(self) -> bool:
        """Whether this thread holds a lease."""
        return bool(self.holder()[0] > 0)

    # ---------------------------------------------------------- requests

    def submit(self, layer: int, expert: int, priority: int) -> int:
        """Request an expert, and wake the pager if need be; a code of `shmroute.shared.experts`."""
        with self._attachment.in_use():
            code = int(demand(self._table, layer, expert, priority))
            if code == QUEUE:
                self._attachment.ring_pager()
        return code

    def submit_each(self, layer: int, experts: npt.NDArray[np.int64], priority: int) -> int:
        """Request some experts, int64 [n], and wake the pager if need be; how many requests that queued."""
        with self._attachment.in_use():
            queued = int(demand_each(self._table, layer, experts, priority))
            if queued:
                self._attachment.ring_pager()
        return queued

    # ---------------------------------------------------------- waiting

    def wait(self, layer: int, experts: Sequence[int], timeout: float) -> tuple[int, int]:
        """Wait until one of some experts of a layer can be leased, the first of them by preference.

        Returns
        -------
        tuple of int
            The expert and its slot.

        Raises
        ------
        LeaseHeldError, ExpertLoadError, ExpertTimeout, PagerUnavailable, SegmentClosingError, RuntimeClosedError
            See `Runtime.expert`.
        """
        began = time.monotonic_ns()
        deadline = time.monotonic() + timeout
        if self._segment.config.source is None:
            raise ConfigError(f"expert {experts[0]} of layer {layer} is not resident, and {NO_SOURCE}")
        if self.holds_any():
            raise LeaseHeldError(
                f"expert {experts[0]} of layer {layer} is not resident, and this thread holds a lease: waiting could "
                f"keep the pager from ever finding a slot. Release the lease first, or use Runtime.experts, which "
                f"hands experts out one at a time"
            )
        ticks = self._pager_ticks()
        # Another thread may be waiting: the load starts, and may end, while this one queues behind it.
        self.submit(layer, experts[0], URGENT)
        while not self._waiting.acquire(timeout=max(min(deadline - time.monotonic(), RECHECK), 0)):
            found = self.lease_any(layer, experts)
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                raise self._timed_out(layer, experts[0], timeout, ticks)
        try:
            self._set_wait_word(pack_wait(layer, experts[0]))
            try:
                found = self._wait_armed(layer, experts, timeout, deadline, ticks)
            finally:
                self._set_wait_word(0)
        finally:
            self._waiting.release()
        with self._attachment.in_use():
            waited = time.monotonic_ns() - began
            add(self._lane.counter(LaneCounter.WAITS), 1)
            add(self._lane.counter(LaneCounter.WAIT_NS), waited)
            count_duration(self._lane.counter(LANE_COUNTERS + HISTOGRAM_BUCKETS), waited)
            if self._recorder is not None:
                append_wait(self._recorder.address, layer, found[0], waited)
        return found

    def _wait_armed(
        self, layer: int, experts: Sequence[int], timeout: float, deadline: float, ticks: int
    ) -> tuple[int, int]:
        awaited = experts[0]
        requested = False
        while True:
            with self._attachment.in_use():
                self._segment.check_live()
                arm(self._lane.bell, 0)
            found = self.lease_any(layer, experts)
            if found is not None:
                return found
            if requested and expert_state(self._read_word(layer, awaited)) == FAILED:
                raise self.load_error(layer, awaited)  # this wait's own load failed
            if self.submit(layer, awaited, URGENT) == BROKEN:
                raise self.load_error(layer, awaited)
            requested = True
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._timed_out(layer, awaited, timeout, ticks)
            self._lane.sleep(min(left, RECHECK))

    def lease_any(self, layer: int, experts: Sequence[int]) -> tuple[int, int] | None:
        """Lease the first of some experts that is resident: (expert, slot)."""
        holder = self.holder()
        for expert in experts:
            slot = self.try_lease(layer, expert, holder)
            if slot >= 0:
                return expert, slot
        return None

    def _set_wait_word(self, value: int) -> None:
        with self._mutex:
            if self._attachment.closed:
                return
            self._segment.write(self._lane.wait - self._segment.address, value)
            if value == 0:
                disarm(self._lane.bell)
                self._attachment.ring_pager(only_hungry=HUNGRY)

    def _read_word(self, layer: int, expert: int) -> int:
        with self._attachment.in_use():
            return self._segment.read(self._segment.layout.row(self._segment.layout.experts, layer) + expert * WORD)

    def _pager_ticks(self) -> int:
        with self._attachment.in_use():
            return self._segment.read(self._segment.layout.pager + PagerCounter.TICKS * WORD)

    # ---------------------------------------------------------- errors

    def load_error(self, layer: int, expert: int) -> ExpertLoadError:
        """The error for an expert whose word says FAILED."""
        with self._attachment.in_use():
            add(self._lane.counter(LaneCounter.LOAD_ERRORS), 1)
            row = self._segment.layout.row(self._segment.layout.failures, layer)
            failure = self._segment.read(row + expert * WORD)
        return ExpertLoadError(layer, expert, self._attachment.location(layer, expert), failure_reason(failure))

    def _timed_out(self, layer: int, expert: int, timeout: float, ticks: int) -> ExpertTimeout | PagerUnavailable:
        with self._attachment.in_use():
            pager = self._segment.read(HEADER_PAGER)
        name, what = self._segment.name, f"expert {expert} of layer {layer} was not resident within {timeout:g} s"
        if is_dead(pager):
            return PagerUnavailable(
                f"{what}: {name!r} has no pager. Start one: {self._segment.config.pager_command(name)}"
            )
        pid = identity_pid(pager)
        if is_stopped(pager):
            return PagerUnavailable(
                f"{what}: the pager of {name!r} (pid {pid}) is stopped; continue it: kill -CONT {pid}"
            )
        if timeout >= 4 * self._segment.config.pager.tick and self._pager_ticks() == ticks:
            return PagerUnavailable(f"{what}: the pager of {name!r} (pid {pid}) made no progress in that time")
        return ExpertTimeout(
            f"{what}, although the pager of {name!r} (pid {pid}) is at work: allow more time, or give it more slots"
        )

    def _close(self) -> None:
        with self._mutex:  # no kernel of another thread is under way once this is held
            self._table[IS_CLOSED] = 1


class ExpertLease:
    """One expert's weights for the length of a ``with`` block. Made by `Runtime.expert`."""

    __slots__ = ("_expert", "_holder", "_layer", "_leases", "_timeout")
    _holder: Holder

    def __init__(self, leases: Leases, layer: int, expert: int, timeout: float) -> None:
        self._leases, self._layer, self._expert, self._timeout = leases, layer, expert, timeout

    def __enter__(self) -> ExpertWeights:
        leases = self._leases
        self._holder = leases.holder()
        slot = leases.try_lease(self._layer, self._expert, self._holder)
        if slot < 0:
            _, slot = leases.wait(self._layer, [self._expert], self._timeout)
        try:
            return leases.weights(slot)
        except BaseException:
            leases.release(self._layer, self._expert, self._holder)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leases.release(self._layer, self._expert, self._holder)


def hand_out(
    leases: Leases, layer: int, ids: npt.NDArray[np.int64], groups: Groups, timeout: float
) -> Generator[ExpertRows, None, None]:
    """Lease each expert of a choice (`group_by_expert`) once, as it becomes resident; one lease at a time.

    All that are missing are requested before the first is handed out, so they load while resident ones are used.
    """
    leases.submit_each(layer, ids, URGENT)
    return _hand_out(leases, layer, groups, timeout)


def _hand_out(leases: Leases, layer: int, groups: Groups, timeout: float) -> Generator[ExpertRows, None, None]:
    pending = list(groups)
    while pending:
        expert, slot = leases.lease_any(layer, pending) or leases.wait(layer, pending, timeout)
        holder = leases.holder()  # a generator may go on in another thread
        try:
            pending.remove(expert)
            rows, ranks = groups[expert]
            yield expert, rows, ranks, leases.weights(slot)
        finally:
            leases.release(layer, expert, holder)


def prefetch(leases: Leases, layer: int, experts: Sequence[int] | npt.NDArray[np.integer], num_experts: int) -> int:
    """Ask for experts that may be wanted soon; how many requests that queued."""
    return leases.submit_each(layer, checked_ids(experts, num_experts).ravel(), PREFETCH)
