"""The pager: one loop that drains the ring, publishes what was loaded, starts what is wanted, sweeps and sleeps.

Everything but reading files happens in the main thread, which alone writes slots' owners, the bitmap and the expert
words' LOADING, RESIDENT and FAILED states.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shmroute.failures import ChecksumMismatch, classify
from shmroute.pager.awaited import awaited_by_lane
from shmroute.pager.eviction import Eviction
from shmroute.pager.loader import Load, Loader
from shmroute.pager.prefetch import AffinityPrefetch
from shmroute.pager.queue import LoadQueue
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD
from shmroute.shared.bell import Semaphore, arm, disarm, ring, unlink_semaphore
from shmroute.shared.experts import (
    QUEUE,
    begin_load,
    cancel,
    evict,
    fail,
    publish,
    rebuild_bitmap,
    recover,
    request_expert_word,
    scan_table,
)
from shmroute.shared.identity import DeathWatch, own_identity, same_process
from shmroute.shared.lanes import free_lane, lane_identities
from shmroute.shared.layout import HEADER_BELL, HEADER_PAGER, LANE_BELL, LANE_SHARD
from shmroute.shared.metrics import PAGER_COUNTERS, LaneCounter, PagerCounter, add, count_duration
from shmroute.shared.pool import Pool
from shmroute.shared.ring import EMPTY, ring_has_work, ring_pop
from shmroute.shared.segment import Segment
from shmroute.shared.words import (
    HUNGRY,
    NO_LANE,
    NOBODY,
    PAGE_OUT,
    PREFETCH,
    REQUESTED,
    RESIDENT,
    URGENT,
    expert_priority,
    expert_slot,
    expert_state,
    identity_state,
    pack_failure,
    request_direction,
    request_expert,
    request_lane,
    request_layer,
)
from shmroute.sources import ExpertSource

LONGEST_RETRY = 30.0
"""Upper bound of the back-off after failed loads, in seconds."""


class Pager:
    """The pager of one segment. Whoever makes one holds the segment's `PagerLock`.

    Parameters
    ----------
    segment : Segment
    source : ExpertSource
        Stays open until `close`.
    """

    def __init__(self, segment: Segment, source: ExpertSource) -> None:
        self._segment = segment
        self._source = source
        self._settings = segment.config.pager
        self._layout = segment.layout
        self._num_experts = segment.config.num_experts
        self._bell = segment.address + HEADER_BELL
        self._semaphore = self._open_semaphore(None)
        self._lane_semaphores: dict[int, Semaphore] = {}
        self._pool = Pool(segment)
        self._powers = power_table(segment.config.affinity.decay)
        self._queue = LoadQueue()
        self._eviction = Eviction(segment, self._powers)
        self._prefetch = AffinityPrefetch(segment, self._powers)
        self._own_prefetches: dict[int, float] = {}
        self._evict_first: dict[int, None] = {}
        self._asked_by: dict[int, int] = {}
        self._free: list[int] = []
        self._evictions = 0
        self._failures: dict[int, int] = {}
        self._lane_watch: DeathWatch[int] = DeathWatch()
        self._requested = np.zeros(segment.config.num_layers * self._num_experts, np.int64)
        self._next_sweep = 0.0
        self._loader = Loader(source, self._settings.io_threads, self._settings.drop_page_cache, self.wake)
        self._take_over()

    # ---------------------------------------------------------- the loop

    def serve(self, should_stop: Callable[[], bool], at_once: Callable[[], bool] = lambda: False) -> None:
        """Serve until `should_stop` says so, once a round; then finish the loads under way, unless `at_once`."""
        while not should_stop():
            self._count(PagerCounter.TICKS)
            wanted = self._awaited_keys()  # before the ring: what a waiter pushed before it waited counts first
            self._drain_ring()
            self._collect()
            if time.monotonic() >= self._next_sweep:
                self._sweep()
            hungry = self._dispatch(wanted)
            self._segment.write(self._layout.pager + PagerCounter.QUEUED * WORD, len(self._queue))
            self._sleep(hungry)
        while self._loader.in_flight and not at_once():
            self._collect()
            time.sleep(0.001)

    @property
    def loading(self) -> bool:
        """Whether I/O threads may be writing slots."""
        return self._loader.in_flight > 0

    def wake(self) -> None:
        """End a sleep of the main thread; from any thread."""
        ring(self._bell, self._semaphore)

    def interrupt(self) -> None:
        """End a sleep of the main thread; from a signal handler, which may have come in the middle of anything."""
        self._semaphore.post()

    def close(self) -> None:
        """End the I/O threads and let go of everything but the segment."""
        self._loader.close()
        self._lane_watch.close()
        for semaphore in (self._semaphore, *self._lane_semaphores.values()):
            semaphore.close()
        self._source.close()

    def _sleep(self, hungry: bool) -> None:
        arm(self._bell, HUNGRY if hungry else 0)  # (bell-A)
        if not self._has_work(hungry):
            if hungry:
                self._count(PagerCounter.HUNGRY_SLEEPS)
            self._semaphore.sleep(max(self._next_sweep - time.monotonic(), 0.001))
        disarm(self._bell)
        self._semaphore.drain()

    def _has_work(self, hungry: bool) -> bool:
        """Whether there is something to do, looked at once more after arming."""
        return bool(
            self._loader.has_completed
            or ring_has_work(self._segment.address + self._layout.ring, self._layout.ring_bits)
            or (hungry and self._loader.idle and self._eviction.victim(self._awaited_keys()) is not None)
        )

    # ---------------------------------------------------------- taking over

    def _take_over(self) -> None:
        """Make the table that a former pager left, if there was one, this pager's own."""
        segment, layout = self._segment, self._layout
        if identity_state(segment.read(HEADER_PAGER)) != NOBODY:
            self._count(PagerCounter.TAKEOVERS)
        segment.write(HEADER_PAGER, own_identity())
        arm(self._bell, 0)  # a new epoch: a late mark by a ringer of the former pager misses
        disarm(self._bell)
        recover(segment.address + layout.experts, layout.row_bytes, layout.num_layers)
        self._scan()
        self._free = [slot for slot in range(segment.config.slots) if self._eviction.owners[slot] < 0][::-1]
        self._sweep()

    # ---------------------------------------------------------- requests

    def _drain_ring(self) -> None:
        ring_address, bits = self._segment.address + self._layout.ring, self._layout.ring_bits
        now = time.monotonic()
        # One lap at most, so that a flood of requests cannot keep loads from being published.
        for _ in range(1 << bits):
            request = ring_pop(ring_address, bits)
            if request == EMPTY:
                return
            layer, expert = request_layer(request), request_expert(request)
            if layer >= self._segment.config.num_layers or expert >= self._num_experts:
                self._count(PagerCounter.INVALID_REQUESTS)
                continue
            key = layer * self._num_experts + expert
            if request_direction(request) == PAGE_OUT:
                if expert_state(self._word(key)) == RESIDENT:
                    self._evict_first[key] = None
            else:
                self._enqueue(key, now)
                if key in self._queue:
                    self._asked_by.setdefault(key, request_lane(request))

    def _enqueue(self, key: int, now: float) -> bool:
        """Queue a requested expert at its word's priority, the one that counts; whether it was not queued before."""
        word = self._word(key)
        if expert_state(word) != REQUESTED:
            return False
        known = key in self._queue
        if self._queue.push(key, expert_priority(word), now):
            self._count(PagerCounter.UPGRADES)
        if expert_priority(word) > PREFETCH:
            self._own_prefetches.pop(key, None)
        return not known

    # ---------------------------------------------------------- loads

    def _dispatch(self, wanted: npt.NDArray[np.int64]) -> bool:
        """Start loads while there are threads for them, `wanted` keys first; whether a demand found no slot."""
        awaited = self._awaited_keys()
        while self._loader.idle > 0:
            chosen = self._next_load(wanted)
            if chosen is None:
                return False
            key, priority = chosen
            evictions = self._evictions
            slot = self._take_slot(key, priority, awaited)
            if slot is None:
                if priority > PREFETCH:
                    return True
                self._drop_prefetch(key)
                continue
            self._queue.remove(key)
            self._own_prefetches.pop(key, None)
            if not begin_load(self._word_address(key), slot):
                self._free.append(slot)
                continue
            self._eviction.owners[slot] = key
            self._charge(key, self._evictions - evictions)
            layer, expert = divmod(key, self._num_experts)
            self._loader.submit(Load(layer, expert, slot, priority, self._pool.writable(slot)))
        return False

    def _charge(self, key: int, evictions: int) -> None:
        """Count a load, and what was evicted for it, for the worker that asked for it."""
        lane = self._asked_by.pop(key, NO_LANE)
        if lane >= self._segment.config.max_workers:
            waiting = np.flatnonzero(awaited_by_lane(self._segment) == key)
            if not len(waiting):
                return  # found by the sweep, or this pager's own idea
            lane = int(waiting[0])
        counters = self._segment.address + self._layout.lane(lane) + LANE_SHARD
        add(counters + LaneCounter.LOADS * WORD, 1)
        add(counters + LaneCounter.EVICTIONS * WORD, evictions)

    def _next_load(self, wanted: npt.NDArray[np.int64]) -> tuple[int, int] | None:
        """What to load next: experts that workers wait for, then the queue."""
        for key in wanted.tolist():
            if expert_state(self._word(key)) == REQUESTED:
                return key, URGENT
        while (head := self._queue.peek()) is not None:
            key, priority = head
            word = self._word(key)
            if expert_state(word) != REQUESTED:
                self._queue.remove(key)
                continue
            if expert_priority(word) > priority:
                self._enqueue(key, time.monotonic())
                continue
            if priority == PREFETCH and self._loader.idle == 1 and self._settings.io_threads > 1:
                return None  # the last thread is kept for demands
            return head
        return None

    def _take_slot(self, key: int, priority: int, awaited: npt.NDArray[np.int64]) -> int | None:
        """A free slot, by eviction if need be."""
        if self._free:
            return self._free.pop()
        for candidate in list(self._evict_first):
            del self._evict_first[candidate]
            if candidate not in awaited and (slot := self._evict_key(candidate)) is not None:
                self._count(PagerCounter.PAGE_OUTS)
                return slot
        while (found := self._eviction.victim(awaited)) is not None:
            slot, score = found
            if priority == PREFETCH and self._own_prefetches.get(key, score + 1) <= score:
                return None
            if self._evict_key(int(self._eviction.owners[slot])) is not None:
                return slot
        return None

    def _evict_key(self, key: int) -> int | None:
        """Evict an expert: its slot, or None if it is leased or not resident."""
        word = self._word(key)
        slot = expert_slot(word)
        layer, expert = divmod(key, self._num_experts)
        if expert_state(word) != RESIDENT:
            return None
        if not evict(self._word_address(key), self._resident_row(layer), expert, slot):
            return None
        self._eviction.emptied(slot)
        self._evictions += 1
        self._count(PagerCounter.EVICTIONS)
        return slot

    def _collect(self) -> None:
        """Publish or fail every load that has ended, and wake who waits for it."""
        for load in self._loader.completed():
            key = load.layer * self._num_experts + load.expert
            if load.error is None:
                load.error = self._verify(key, load.checksum)
            if load.error is None:
                self._publish(key, load)
            else:
                self._fail(key, load)
            self._wake_waiters(key)

    def _verify(self, key: int, checksum: int) -> ChecksumMismatch | None:
        """Compare with the first load's checksum; the first one is trusted and kept."""
        offset = self._row_offset(self._layout.checksums, key)
        known = self._segment.read(offset)
        if known == 0:
            self._segment.write(offset, checksum)
        elif known != checksum:
            self._count(PagerCounter.CHECKSUM_MISMATCHES)
            return ChecksumMismatch(f"xxh3 {checksum & (1 << 64) - 1:016x}, first {known & (1 << 64) - 1:016x}")
        return None

    def _publish(self, key: int, load: Load) -> None:
        self._failures.pop(key, None)
        self._pool.describe(load.slot, load.layer, load.expert)
        self._eviction.loaded(load.slot, key)
        publish(self._word_address(key), self._resident_row(load.layer), load.expert, load.slot)
        self._count(PagerCounter.LOADS)
        self._count(PagerCounter.BYTES_READ, len(load.buffer))
        if load.priority == PREFETCH:
            self._count(PagerCounter.PREFETCHES)
        count_duration(
            self._segment.address + self._layout.pager + PAGER_COUNTERS * WORD, load.ended_ns - load.began_ns
        )

    def _fail(self, key: int, load: Load) -> None:
        assert load.error is not None
        attempts = self._failures[key] = self._failures.get(key, 0) + 1
        pause = min(self._settings.retry_after * 2.0 ** min(attempts - 1, 16), LONGEST_RETRY)
        not_before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000 + int(pause * 1000)
        failure = pack_failure(*classify(load.error), not_before)
        failure_address = self._segment.address + self._row_offset(self._layout.failures, key)
        fail(self._word_address(key), failure_address, load.slot, failure)
        self._eviction.emptied(load.slot)
        self._free.append(load.slot)
        self._count(PagerCounter.FAILURES)
        self._report(load, pause)

    def _report(self, load: Load, pause: float) -> None:
        """Tell why a load failed, if there is still somebody to tell: no fault of a message may end the pager."""
        with contextlib.suppress(Exception):
            print(
                f"shmroute pager: expert {load.expert} of layer {load.layer} failed to load from "
                f"{self._source.location(load.layer, load.expert)}: {type(load.error).__name__}: {load.error}; "
                f"demands are refused for {pause:g} s",
                file=sys.stderr,
                flush=True,
            )

    def _wake_waiters(self, key: int) -> None:
        """Ring the bell of every lane that waits for an expert. (wait word / expert word)"""
        for lane in np.flatnonzero(awaited_by_lane(self._segment) == key).tolist():
            semaphore = self._lane_semaphores.get(lane)
            if semaphore is None:
                semaphore = self._lane_semaphores[lane] = self._open_semaphore(lane)
            ring(self._segment.address + self._layout.lane(lane) + LANE_BELL, semaphore)

    # ---------------------------------------------------------- sweep

    def _sweep(self) -> None:
        """What no hint can be relied on for: lost requests, stale bits, stale prefetches, dead workers."""
        now = time.monotonic()
        self._next_sweep = now + self._settings.tick
        self._count(PagerCounter.SWEEPS)
        self._reap()
        for index in range(self._scan()):
            if self._enqueue(int(self._requested[index]), now):
                self._count(PagerCounter.SWEPT_REQUESTS)
        for layer in range(self._layout.num_layers):
            rebuild_bitmap(
                self._segment.address + self._layout.row(self._layout.experts, layer),
                self._resident_row(layer),
                self._num_experts,
            )
        for key in self._queue.stale_prefetches(now - self._settings.prefetch_stale):
            self._drop_prefetch(key)
        self._propose_prefetches(now)

    def _scan(self) -> int:
        """Read the whole table: owners of slots, and how many experts are requested (their keys in `_requested`)."""
        layout = self._layout
        return int(
            scan_table(
                self._segment.address + layout.experts, layout.row_bytes, layout.num_layers, self._num_experts,
                self._eviction.owners.ctypes.data, self._segment.config.slots, self._requested.ctypes.data,
            )
        )  # fmt: skip

    def _reap(self) -> None:
        """Free the lanes of workers that have died."""
        identities = lane_identities(self._segment)
        for lane, identity in identities.items():
            self._lane_watch.watch(lane, identity)
        for lane in range(self._segment.config.max_workers):
            if lane not in identities:
                self._lane_watch.forget(lane)
        for lane, identity in self._lane_watch.dead():
            if same_process(identities[lane], identity):
                free_lane(self._segment, lane)
                self._count(PagerCounter.REAPED_LANES)
            self._lane_watch.forget(lane)

    def _drop_prefetch(self, key: int) -> None:
        """Cancel a queued prefetch, unless somebody demands it by now."""
        if cancel(self._word_address(key)):
            self._queue.remove(key)
            self._own_prefetches.pop(key, None)
            self._asked_by.pop(key, None)
            self._count(PagerCounter.PREFETCHES_CANCELLED)
        else:
            self._queue.remove(key)
            self._enqueue(key, time.monotonic())

    def _propose_prefetches(self, now: float) -> None:
        """Queue prefetches by affinity, when nothing is demanded and within the budget."""
        if self._queue.peek() is not None:
            return
        for key, score in self._prefetch.proposals(self._prefetch.budget - len(self._own_prefetches)):
            failure = self._segment.address + self._row_offset(self._layout.failures, key)
            if request_expert_word(self._word_address(key), failure, PREFETCH) == QUEUE:
                self._own_prefetches[key] = score
                self._queue.push(key, PREFETCH, now)

    def _open_semaphore(self, lane: int | None) -> Semaphore:
        """The semaphore of a lane's bell, or with None of the pager's own."""
        semaphore = Semaphore(self._segment.semaphore_name(lane))
        if self._segment.closing:  # whoever destroys may have unlinked it before it was made
            unlink_semaphore(semaphore.name)
        return semaphore

    # ---------------------------------------------------------- addresses and counters

    def _row_offset(self, region: int, key: int) -> int:
        layer, expert = divmod(key, self._num_experts)
        return self._layout.row(region, layer) + expert * WORD

    def _word_address(self, key: int) -> int:
        return self._segment.address + self._row_offset(self._layout.experts, key)

    def _word(self, key: int) -> int:
        return self._segment.read(self._row_offset(self._layout.experts, key))

    def _resident_row(self, layer: int) -> int:
        return self._segment.address + self._layout.resident + layer * self._layout.resident_row_bytes

    def _awaited_keys(self) -> npt.NDArray[np.int64]:
        keys = awaited_by_lane(self._segment)
        return keys[keys >= 0]

    def _count(self, counter: PagerCounter, amount: int = 1) -> None:
        add(self._segment.address + self._layout.pager + counter * WORD, amount)
