"""Leases: how a worker gets an expert's weights, reads them safely, and waits for those that are not resident.

A lease is this process's bit in an expert's word. Threads of a process share the bit, so a count of their leases goes
with it; one mutex covers the count *and* the bit, since with a count alone a last release could clear the bit that a
new lease relies on.

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
from collections import deque
from collections.abc import Iterator, Sequence
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
from shmroute.shared.experts import BROKEN, QUEUE, lease, release
from shmroute.shared.identity import is_dead, is_stopped
from shmroute.shared.layout import HEADER_PAGER
from shmroute.shared.metrics import BUCKETS as HISTOGRAM_BUCKETS
from shmroute.shared.metrics import LANE_COUNTERS, LaneCounter, PagerCounter, add, count_duration
from shmroute.shared.pool import ExpertWeights
from shmroute.shared.requests import submit_request
from shmroute.shared.words import FAILED, HUNGRY, PREFETCH, URGENT, expert_state, identity_pid, pack_wait

RECHECK = 0.1
"""Longest sleep of a waiter, in seconds, before it looks again by itself."""

ExpertRows = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64], ExpertWeights]


class Holder:
    """A thread that took leases. Thread ids are used again after a thread's end, these are not."""


class Leases:
    """The leases of one process on one segment."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._segment = attachment.segment
        self._lane = attachment.lane()
        self._recorder = attachment.one(recorder_of)
        layout, base = self._segment.layout, self._segment.address
        self._words = base + layout.experts
        self._failures = base + layout.failures
        self._row_bytes = layout.row_bytes
        self._mutex = threading.RLock()
        self._changing = False
        self._ended: deque[tuple[int, Holder]] = deque()
        self._counts: dict[int, int] = {}
        self._held: dict[Holder, int] = {}
        self._here = threading.local()
        self._waiting = threading.Lock()
        attachment.before_close(self._close)

    def _offset(self, layer: int, expert: int) -> int:
        return layer * self._row_bytes + expert * WORD

    # ---------------------------------------------------------- one lease

    def holder(self) -> Holder:
        """This thread."""
        found: Holder | None = getattr(self._here, "holder", None)
        if found is None:
            found = self._here.holder = Holder()
        return found

    def try_lease(self, layer: int, expert: int) -> int:
        """Take a lease for this thread if the expert is resident: its slot, or -1."""
        offset = self._offset(layer, expert)
        holder = self.holder()
        with self._mutex:
            self._attachment.check_open()
            self._changing = True
            try:
                slot = int(lease(self._words + offset, self._lane.bit))
                if slot >= 0:
                    self._counts[offset] = self._counts.get(offset, 0) + 1
                    self._held[holder] = self._held.get(holder, 0) + 1
                    add(self._lane.counter(LaneCounter.LEASES), 1)
            finally:
                self._changing = False
            if self._ended:
                self._settle()
        return slot

    def release(self, layer: int, expert: int, holder: Holder) -> None:
        """Give back a lease that `holder` took. Does nothing once the attachment is closed, which gave back all."""
        if self._attachment.closed:
            return  # in a forked child too, where the mutex may belong to a thread that does not exist
        self._ended.append((self._offset(layer, expert), holder))
        with self._mutex:
            self._settle()

    def _settle(self) -> None:
        """Give back the leases that have ended, the mutex being held.

        Garbage collection may end a dropped `Runtime.experts` loop, and so a lease, in the middle of any change that
        its thread makes here; the change then goes first, and settles afterwards.
        """
        if self._changing or self._attachment.closed:
            return
        self._changing = True
        try:
            while self._ended:
                offset, holder = self._ended.popleft()
                self._held[holder] -= 1
                if self._held[holder] == 0:
                    del self._held[holder]
                self._counts[offset] -= 1
                if self._counts[offset] == 0:
                    del self._counts[offset]
                    release(self._words + offset, self._lane.bit)
                    self._attachment.ring_pager(only_hungry=HUNGRY)
        finally:
            self._changing = False

    def holds_any(self) -> bool:
        """Whether this thread holds a lease."""
        return self.holder() in self._held

    # ---------------------------------------------------------- requests

    def submit(self, layer: int, expert: int, priority: int) -> int:
        """Request an expert, and wake the pager if need be; a code of `shmroute.shared.experts`."""
        offset = self._offset(layer, expert)
        layout, base = self._segment.layout, self._segment.address
        with self._attachment.in_use():
            code = int(
                submit_request(
                    self._words + offset, self._failures + offset, base + layout.ring, layout.ring_bits,
                    self._lane.counters, layer, expert, priority, self._lane.number,
                )
            )  # fmt: skip
            if code == QUEUE:
                self._attachment.ring_pager()
        return code

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
        for expert in experts:
            slot = self.try_lease(layer, expert)
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
            return self._segment.read(self._segment.layout.experts + self._offset(layer, expert))

    def _pager_ticks(self) -> int:
        with self._attachment.in_use():
            return self._segment.read(self._segment.layout.pager + PagerCounter.TICKS * WORD)

    # ---------------------------------------------------------- errors

    def load_error(self, layer: int, expert: int) -> ExpertLoadError:
        """The error for an expert whose word says FAILED."""
        with self._attachment.in_use():
            add(self._lane.counter(LaneCounter.LOAD_ERRORS), 1)
            failure = self._segment.read(self._segment.layout.failures + self._offset(layer, expert))
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
            self._ended.clear()
            self._counts.clear()
            self._held.clear()


class ExpertLease:
    """One expert's weights for the length of a ``with`` block. Made by `Runtime.expert`."""

    __slots__ = ("_expert", "_holder", "_layer", "_leases", "_pool_weights", "_timeout")

    def __init__(self, leases: Leases, attachment: Attachment, layer: int, expert: int, timeout: float) -> None:
        self._leases, self._layer, self._expert, self._timeout = leases, layer, expert, timeout
        self._pool_weights = attachment.pool.weights
        self._holder = leases.holder()

    def __enter__(self) -> ExpertWeights:
        slot = self._leases.try_lease(self._layer, self._expert)
        if slot < 0:
            _, slot = self._leases.wait(self._layer, [self._expert], self._timeout)
        self._holder = self._leases.holder()
        try:
            return self._pool_weights(slot)
        except BaseException:
            self._leases.release(self._layer, self._expert, self._holder)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leases.release(self._layer, self._expert, self._holder)


def group_by_expert(
    experts: npt.NDArray[np.int64],
) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Which tokens chose each expert.

    Parameters
    ----------
    experts : ndarray
        int64 [k] or [T, k].

    Returns
    -------
    dict
        expert -> (rows ascending, ranks), int64 of equal length; experts in order of first appearance.
    """
    if experts.size == 0:
        return {}
    flat = experts.ravel()
    order = np.argsort(flat, kind="stable")
    ids, first = np.unique(flat[order], return_index=True)
    groups = dict(zip(ids.tolist(), np.split(order, first[1:]), strict=True))
    by_appearance = sorted(groups.items(), key=lambda item: item[1][0])
    top_k = experts.shape[-1]
    return {expert: (pairs // top_k, pairs % top_k) for expert, pairs in by_appearance}


def hand_out(
    leases: Leases, attachment: Attachment, layer: int, experts: npt.NDArray[np.int64], timeout: float
) -> Iterator[ExpertRows]:
    """Lease each expert once, resident ones first, the others as they become resident; one lease at a time.

    All that are missing are requested before the first is handed out, so they load while resident ones are used.
    """
    groups = group_by_expert(experts)
    for expert in groups:
        leases.submit(layer, expert, URGENT)
    return _hand_out(leases, attachment, layer, groups, timeout)


def _hand_out(
    leases: Leases,
    attachment: Attachment,
    layer: int,
    groups: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    timeout: float,
) -> Iterator[ExpertRows]:
    pending = list(groups)
    while pending:
        expert, slot = leases.lease_any(layer, pending) or leases.wait(layer, pending, timeout)
        holder = leases.holder()
        pending.remove(expert)
        try:
            yield expert, *groups[expert], attachment.pool.weights(slot)
        finally:
            leases.release(layer, expert, holder)


def prefetch(leases: Leases, layer: int, experts: Sequence[int] | npt.NDArray[np.integer], num_experts: int) -> int:
    """Ask for experts that may be wanted soon; how many requests that queued."""
    ids = checked_ids(experts, num_experts).ravel()
    return sum(leases.submit(layer, int(expert), PREFETCH) == QUEUE for expert in ids)
