"""The pager: one loop that drains the ring, starts what is wanted, takes note of what was loaded, sweeps and sleeps.

The main thread alone decides which slot an expert gets, what is evicted for it, and which failed. An I/O thread that
comes to a load sets LOADING: until then the expert is REQUESTED, and another may overtake it. When it has read the
expert it publishes it and wakes who waits for it, and only then tells the main thread, which is woken for that only if
there may be something for it to start: who waits for a load waits for no other thread than the one that reads it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shmroute.failures import ChecksumMismatch, classify
from shmroute.pager.loader import Load, Loader
from shmroute.pager.prefetch.arbiter import Arbiter
from shmroute.pager.prefetch.usage import MeasuredUsage
from shmroute.pager.publishing import DIFFERS, Publisher, charge
from shmroute.pager.queue import AWAITED, LoadQueue
from shmroute.pager.reaper import Reaper
from shmroute.pager.slots import Slots
from shmroute.pager.table import ExpertTable
from shmroute.pager.waiters import Waiters, each_lane, open_semaphore
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD
from shmroute.shared.bell import arm, disarm, ring
from shmroute.shared.experts import (
    QUEUE,
    begin_load,
    cancel,
    fail,
    request_expert_word,
)
from shmroute.shared.identity import own_identity
from shmroute.shared.layout import HEADER_BELL, HEADER_PAGER, HEADER_TURNED_DOWN
from shmroute.shared.metrics import PAGER_COUNTERS, PagerCounter, Predictor, PrefetchOutcome, add
from shmroute.shared.pool import Pool
from shmroute.shared.ring import EMPTY, ring_has_work, ring_pop
from shmroute.shared.segment import Segment
from shmroute.shared.turned_down import tell
from shmroute.shared.words import (
    HUNGRY,
    NO_LANE,
    NOBODY,
    PAGE_OUT,
    PREFETCH,
    REQUESTED,
    expert_priority,
    expert_state,
    identity_state,
    pack_failure,
    request_direction,
    request_expert,
    request_lane,
    request_layer,
    request_speculative,
)
from shmroute.sources import ExpertSource

LONGEST_RETRY = 30.0
"""Upper bound of the back-off after failed loads, in seconds."""

SHARE_AT_HAND = 4
"""Of so many slots at most one is under way or emptied ahead for a load that no thread has come to; but each thread has
one load under way and one ahead in any case."""


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
        self._bell = segment.address + HEADER_BELL
        self._semaphore = open_semaphore(segment, None)
        self._waiters = Waiters(segment)
        self._pool = Pool(segment)
        self._publisher = Publisher(segment)
        self._table = ExpertTable(segment)
        powers = power_table(segment.config.affinity.decay)
        self._slots = Slots(segment, self._table, powers)
        self._queue = LoadQueue()
        self._usage = MeasuredUsage(segment) if self._settings.prefetch else None
        self._prefetch = Arbiter(segment, self._slots.eviction, self._count_outcome, self._usage)
        self._slots.when_evicted = self._prefetch.evicted
        self._asked_by: dict[int, int] = {}
        self._failures: dict[int, int] = {}
        self._reaper = Reaper(segment)
        self._next_sweep = 0.0
        self._loader = Loader(
            source,
            self._settings.io_threads,
            segment.config.slots // SHARE_AT_HAND,
            self._settings.drop_page_cache,
            self._begin_load,
            self._publish,
            self._load_ended,
        )
        self._take_over()

    # ---------------------------------------------------------- the loop

    def serve(self, should_stop: Callable[[], bool], at_once: Callable[[], bool] = lambda: False) -> None:
        """Serve until `should_stop` says so, once a round; then finish the loads under way, unless `at_once`."""
        while not should_stop():
            self._count(PagerCounter.TICKS)
            wanted = self._waiters.in_turn()  # before the ring: what a waiter pushed before it waited counts first
            self._drain_ring()
            self._collect()
            if time.monotonic() >= self._next_sweep:
                self._sweep()
            hungry = self._dispatch(wanted)
            if not hungry and self._propose_prefetches():
                hungry = self._dispatch(wanted)
            self._segment.write(self._layout.pager + PagerCounter.QUEUED * WORD, len(self._queue))
            self._sleep(hungry)
        while self._loader.take_back(AWAITED + 1) is not None:
            pass  # another pager will do it, if it is still wanted
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
        self._reaper.close()
        self._waiters.close()
        self._semaphore.close()
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
        """Whether there is something to do, looked at once more after arming. (bell-A)"""
        return bool(
            (self._loader.has_completed and (self._wants_to_start_more() or self._loader.has_unpublished))
            or ring_has_work(self._segment.address + self._layout.ring, self._layout.ring_bits)
            or (hungry and self._loader.idle and self._slots.can_evict(self._waiters.keys()))
        )

    # ---------------------------------------------------------- taking over

    def _take_over(self) -> None:
        """Make the table that a former pager left, if there was one, this pager's own."""
        segment = self._segment
        if identity_state(segment.read(HEADER_PAGER)) != NOBODY:
            self._count(PagerCounter.TAKEOVERS)
        segment.write(HEADER_PAGER, own_identity())
        arm(self._bell, 0)  # a new epoch: a late mark by a ringer of the former pager misses
        disarm(self._bell)
        self._table.recover()
        self._slots.adopt()
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
            if layer >= self._segment.config.num_layers or expert >= self._segment.config.num_experts:
                self._count(PagerCounter.INVALID_REQUESTS)
                continue
            key = self._table.key(layer, expert)
            if request_direction(request) == PAGE_OUT:
                self._slots.evict_first(key)
            else:
                self._enqueue(key, now, Predictor.GATE if request_speculative(request) else Predictor.HINT)
                if key in self._queue or key in self._loader:
                    self._asked_by.setdefault(key, request_lane(request))

    def _enqueue(self, key: int, now: float, predictor: int = Predictor.HINT) -> bool:
        """Queue a requested expert at its word's priority, the one that counts; whether it was not queued before.

        `predictor` says whose idea a prefetch is; of one that only the sweep finds nobody knows.
        """
        word = self._table.word(key)
        if expert_state(word) != REQUESTED:
            return False
        if key in self._loader:
            self._promote(key, expert_priority(word))
            return False
        known = key in self._queue
        if self._queue.push(key, expert_priority(word), now):
            self._count(PagerCounter.UPGRADES)
        if expert_priority(word) > PREFETCH:
            self._prefetch.overtaken(key)
            if not known:
                self._prefetch.demanded(key)
        elif not known:
            if self._prefetch.trusts(predictor, self._table.split(key)[0], now):
                self._prefetch.asked(key, predictor, now)
            else:
                self._drop_prefetch(key)
        return not known

    # ---------------------------------------------------------- loads

    def _dispatch(self, wanted: dict[int, int]) -> bool:
        """Give loads to the I/O threads, `wanted` keys first; whether a thread is idle since a demand found no slot."""
        for key, lane in wanted.items():
            if key in self._loader:
                self._asked_by.setdefault(key, lane)
                self._promote(key, AWAITED)
        chosen = self._next_load(wanted)
        if chosen is None:
            return False
        awaited = self._waiters.keys()
        self._slots.eviction.observe()
        hungry = False
        while chosen is not None:
            key, priority = chosen
            if priority == PREFETCH and not self._prefetch.still_wanted(key):
                self._drop_prefetch(key)
            elif self._loader.room <= 0 and not self._make_way(priority):
                break
            elif not self._start(key, priority, awaited):
                if priority == PREFETCH:
                    self._drop_prefetch(key)
                elif not self._make_way(priority):
                    hungry = self._loader.idle > 0
                    break
            chosen = self._next_load(wanted)
        return hungry

    def _start(self, key: int, priority: int, awaited: npt.NDArray[np.int64]) -> bool:
        """Give one load to the I/O threads; False if there is no slot for it."""
        evictions, page_outs = self._slots.evictions, self._slots.page_outs
        slot = self._slots.take(
            awaited, functools.partial(self._prefetch.may_replace, key) if priority == PREFETCH else None
        )
        if slot is None:
            return False
        evicted = self._slots.evictions - evictions
        self._count(PagerCounter.EVICTIONS, evicted)  # before the load that they made room for can be seen
        self._count(PagerCounter.PAGE_OUTS, self._slots.page_outs - page_outs)
        entry = self._queue.remove(key)
        assert entry is not None, "what is chosen is queued"
        self._slots.loading(slot)
        layer, expert = self._table.split(key)
        buffer = self._pool.writable(slot)
        self._loader.submit(Load(key, layer, expert, slot, priority, buffer, entry, evicted))
        return True

    def _promote(self, key: int, priority: int) -> None:
        """Raise the priority of a load that no thread has come to yet."""
        if self._loader.promote(key, priority) and priority > PREFETCH:
            self._prefetch.overtaken(key)

    def _make_way(self, priority: int) -> bool:
        """Take back a load that no thread has come to yet, if it is less wanted; whether there was one."""
        load = self._loader.take_back(priority)
        if load is None:
            return False
        self._slots.give_back(load.slot)
        self._queue.put_back(load.key, load.entry)
        self._enqueue(load.key, time.monotonic())  # at its word's priority, should that have risen
        return True

    def _begin_load(self, load: Load) -> bool:
        """REQUESTED to LOADING, in an I/O thread; False if it is not REQUESTED any more."""
        return bool(begin_load(self._table.address(load.key), load.slot))

    def _publish(self, load: Load) -> None:
        """Make a load visible and wake who waits for it, in the I/O thread that has read it.

        Or note that its bytes are not those of the first one, which are trusted.
        """
        prefetched = load.priority == PREFETCH
        if prefetched:
            load.waiting = self._prefetch.waited(each_lane(self._waiters.lanes_in(load.layer)))
        woken = self._publisher.publish(load.key, load.slot, load.checksum, load.ended_ns - load.began_ns, prefetched)
        if woken == DIFFERS:
            first = self._publisher.first_checksum(load.key)
            self._count(PagerCounter.CHECKSUM_MISMATCHES)
            load.error = ChecksumMismatch(
                f"xxh3 {load.checksum & (1 << 64) - 1:016x}, first {first & (1 << 64) - 1:016x}"
            )
        elif woken:
            self._waiters.wake(woken)

    def _load_ended(self, load: Load) -> None:
        """Wake the main thread, in the I/O thread that has done a load, if there is something for it to do. (bell-B)

        Taking note of a load that was published can wait for whatever wakes it next: nobody waits for that.
        """
        if not load.good or self._wants_to_start_more():
            self.wake()

    def _wants_to_start_more(self) -> bool:
        """Whether the main thread, once it has taken note of a load's end, may have more for the I/O threads to do."""
        return self._loader.runs_low and (len(self._queue) > 0 or self._settings.prefetch > 0)

    def _charge(self, load: Load) -> None:
        """Count a load, and what was evicted for it, for the worker that asked for it."""
        lane = self._asked_by.pop(load.key, NO_LANE)
        if lane < self._segment.config.max_workers:  # else it was found by the sweep, or this pager's own idea
            charge(self._segment.address + self._layout.lane(lane), load.evictions)

    def _next_load(self, wanted: dict[int, int]) -> tuple[int, int] | None:
        """What to load next: experts that workers wait for, then the queue."""
        for key, lane in wanted.items():
            if key not in self._loader and expert_state(self._table.word(key)) == REQUESTED:
                self._asked_by.setdefault(key, lane)
                if key not in self._queue:
                    self._enqueue(key, time.monotonic())  # a place to come back to
                return key, AWAITED
        while (head := self._queue.peek()) is not None:
            key, priority = head
            word = self._table.word(key)
            if expert_state(word) != REQUESTED:
                self._queue.remove(key)
                continue
            if expert_priority(word) > priority:
                self._enqueue(key, time.monotonic())
                continue
            if priority == PREFETCH and self._loader.idle <= (self._settings.io_threads > 1):
                return None  # the last thread is kept for demands
            return head
        return None

    def _collect(self) -> None:
        """Take note of every load that has ended; whoever waits for one that failed is woken."""
        failed = set()
        for load in self._loader.completed():
            if load.refused:
                self._slots.give_back(load.slot)
                self._prefetch.cancelled(load.key)
                self._enqueue(load.key, time.monotonic())  # it may have been asked for again meanwhile
                continue
            self._charge(load)
            if load.error is None:
                self._loaded(load)
            else:
                self._fail(load)
                failed.add(load.layer)
        self._waiters.wake_layers(failed)

    def _loaded(self, load: Load) -> None:
        """Take note of a load that was published."""
        self._failures.pop(load.key, None)
        self._slots.loaded(load.slot, load.key)
        seconds, ended = (load.ended_ns - load.began_ns) / 1e9, load.ended_ns / 1e9
        prefetched = load.priority == PREFETCH
        self._prefetch.loaded(load.key, seconds, ended, demanded=not prefetched, waiting=load.waiting)
        if prefetched and (waited := self._demand_waits(load, ended)) > 0:
            self._prefetch.delayed(load.key, min(waited, seconds))

    def _demand_waits(self, load: Load, now: float) -> float:
        """How long the most wanted demand has been waiting that a load was before; 0 if there is none."""
        following = load.followed_by
        if following is None or following.priority == PREFETCH:
            return self._queue.demand_waits(now)
        return max(now - following.entry.queued_at, 0.0)

    def _fail(self, load: Load) -> None:
        assert load.error is not None
        key = load.key
        attempts = self._failures[key] = self._failures.get(key, 0) + 1
        pause = min(self._settings.retry_after * 2.0 ** min(attempts - 1, 16), LONGEST_RETRY)
        not_before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000 + int(pause * 1000)
        failure = pack_failure(*classify(load.error), not_before)
        fail(self._table.address(key), self._table.failure_address(key), load.slot, failure)
        self._slots.give_back(load.slot)
        self._prefetch.cancelled(key)
        self._count(PagerCounter.FAILURES)
        if attempts == 1:
            self._report(load, pause)

    def _report(self, load: Load, pause: float) -> None:
        """Tell why an expert's loads fail, once until it loads again, if there is still somebody to tell.

        No fault of a message may end the pager.
        """
        with contextlib.suppress(Exception):
            print(
                f"shmroute pager: expert {load.expert} of layer {load.layer} failed to load from "
                f"{self._source.location(load.layer, load.expert)}: {type(load.error).__name__}: {load.error}; "
                f"demands are refused for {pause:g} s",
                file=sys.stderr,
                flush=True,
            )

    # ---------------------------------------------------------- sweep

    def _sweep(self) -> None:
        """What no hint can be relied on for: lost requests, stale bits, stale prefetches, dead workers."""
        now = time.monotonic()
        self._next_sweep = now + self._settings.tick
        self._count(PagerCounter.SWEEPS)
        self._count(PagerCounter.REAPED_LANES, self._reaper.reap())
        for key in self._slots.scan():
            if self._enqueue(key, now):
                self._count(PagerCounter.SWEPT_REQUESTS)
        self._table.rebuild_bitmaps()
        for key in self._queue.stale_prefetches(now - self._settings.prefetch_stale):
            self._drop_prefetch(key)
        if self._usage is not None:
            self._prefetch.speculated(self._usage.look())
            tell(self._segment.address + HEADER_TURNED_DOWN, self._prefetch.turned_down())

    def _drop_prefetch(self, key: int) -> None:
        """Cancel a queued prefetch, unless somebody demands it by now."""
        if cancel(self._table.address(key)):
            self._queue.remove(key)
            self._prefetch.cancelled(key)
            self._asked_by.pop(key, None)
            self._count(PagerCounter.PREFETCHES_CANCELLED)
        else:
            self._queue.remove(key)
            self._enqueue(key, time.monotonic())

    def _propose_prefetches(self) -> bool:
        """Queue prefetches of the pager's own idea, when nothing is demanded; whether there are any."""
        self._slots.eviction.observe()
        self._prefetch.look()
        if self._queue.peek() is not None:
            return False
        now, any_queued = time.monotonic(), False
        for key, predictor in self._prefetch.proposals(now):
            code = request_expert_word(self._table.address(key), self._table.failure_address(key), PREFETCH)
            if code == QUEUE:
                self._prefetch.asked(key, predictor, now)
                self._queue.push(key, PREFETCH, now)
                any_queued = True
        return any_queued

    def _count_outcome(self, predictor: int, outcome: PrefetchOutcome) -> None:
        words = self._segment.address + self._layout.pager + PAGER_COUNTERS * WORD
        add(words + (predictor * len(PrefetchOutcome) + outcome) * WORD, 1)

    def _count(self, counter: PagerCounter, amount: int = 1) -> None:
        if amount:
            add(self._segment.address + self._layout.pager + counter * WORD, amount)
