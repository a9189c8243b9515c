"""Loads: a few threads that read experts straight into their slots, and publish them.

Of shared words the threads touch those that `begin` and `publish` tell of, and the bells of who waits. They are threads
of the pager, never processes, so that the release of the pager's lock at its death proves that nobody writes a slot, or
publishes one, any more.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from shmroute.pager.prefetch.record import Waits
from shmroute.pager.queue import QueueEntry
from shmroute.sources import ExpertSource

AT_HAND = 2e-3
"""Seconds' worth of loads that each thread has before it. Within that the main thread gets a core, even if I/O threads
keep all of them busy."""
MOST_AT_HAND = 16
"""How many that is at most; at least it is one."""


@dataclass(slots=True, eq=False)
class Load:
    """One load, from its request to its end.

    Attributes
    ----------
    key, layer, expert, slot : int
    priority : int
        As `LoadQueue` has it, or `AWAITED`.
    entry : QueueEntry
        Its place in the pager's queue, should it have to go back there.
    evictions : int
        Experts that were evicted for it.
    buffer : memoryview
        The slot's bytes.
    began_ns, ended_ns : int
        CLOCK_MONOTONIC; 0 before.
    refused : bool
        Its expert was not requested any more when a thread came to it.
    checksum : int
        xxh3 of the bytes in the order in which they were read, as a signed 64-bit word that is never 0.
    error : BaseException or None
        Why it was not published.
    followed_by : Load or None
        What was to be loaded next when this one ended.
    waiting : Waits
        Of a prefetch: who waited for it when it was about to be published.
    """

    key: int
    layer: int
    expert: int
    slot: int
    priority: int
    buffer: memoryview
    entry: QueueEntry
    evictions: int = 0
    began_ns: int = 0
    ended_ns: int = 0
    refused: bool = False
    checksum: int = 0
    error: BaseException | None = None
    followed_by: Load | None = None
    waiting: Waits = ()

    @property
    def good(self) -> bool:
        """Of a load that has ended: whether it was read, and nothing was found against it."""
        return self.error is None and not self.refused


class Checksum:
    """xxh3-64 of the parts of a buffer, taken as they are filled.

    Parameters
    ----------
    buffer : memoryview
    """

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._digest = xxhash.xxh3_64()
        self._length = 0

    def add(self, begin: int, end: int) -> None:
        """Take in a part."""
        self._digest.update(self._buffer[begin:end])
        self._length += end - begin

    def word(self) -> int:
        """The digest as a signed word; 0 (which means "not known yet") is mapped to 1.

        Raises
        ------
        ValueError
            If the parts do not make up the buffer.
        """
        if self._length != len(self._buffer):
            raise ValueError(f"the source told of {self._length} bytes of the {len(self._buffer)} that it filled")
        digest = self._digest.intdigest() or 1
        return digest - (1 << 64) if digest >> 63 else digest


class Loader:
    """A pool of I/O threads with some more loads at hand, so that they need not wait for the main thread in between.

    A load that no thread has come to yet can be overtaken, and taken back.

    Every load that was submitted is in `_waiting` until one thread, or the main thread with `promote` or `take_back`,
    removes it: each removal is one atomic operation of the deque. For each insertion there is a call in `_calls`, put
    there afterwards, so a load that waits is always followed by a call; a call too many finds nothing to do.

    Parameters
    ----------
    source : ExpertSource
    threads : int
    most : int
        Loads under way and at hand at most, if that is more than two for each thread: each has a slot already.
    drop_page_cache : bool
        After a load, drop the file pages it came from.
    begin : callable
        Called in an I/O thread that comes to a load; whether the load is still wanted.
    publish : callable
        Called in the I/O thread that has read a load, to make it visible, or to set its `error`.
    when_done : callable
        Called in an I/O thread with each load after it has been put where `completed` finds it, and before the file
        pages it came from are dropped: nobody waits for that.

    Whatever else than a source's `read_into` raises in a thread ends it, and is raised by the next `completed`.
    """

    def __init__(
        self,
        source: ExpertSource,
        threads: int,
        most: int,
        drop_page_cache: bool,
        begin: Callable[[Load], bool],
        publish: Callable[[Load], None],
        when_done: Callable[[Load], None],
    ) -> None:
        self._source = source
        self._drop_page_cache = drop_page_cache
        self._begin = begin
        self._publish = publish
        self._when_done = when_done
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._waiting: deque[Load] = deque()
        self._done: deque[Load] = deque()
        self._loads: dict[int, Load] = {}
        self._fault: BaseException | None = None
        self._most = max(most, 2 * threads)
        self._threads = [
            threading.Thread(target=self._serve, name=f"shmroute-io-{i}", daemon=True) for i in range(threads)
        ]
        self._pace(0.0)
        for thread in self._threads:
            thread.start()

    def __contains__(self, key: int) -> bool:
        return key in self._loads

    @property
    def in_flight(self) -> int:
        """Loads that were submitted and neither collected nor taken back."""
        return len(self._loads)

    @property
    def idle(self) -> int:
        """Threads without a load. Loads that ended but were not collected count as under way."""
        return max(len(self._threads) - len(self._loads), 0)

    @property
    def room(self) -> int:
        """How many more loads may be submitted."""
        return self._capacity - len(self._loads)

    @property
    def runs_low(self) -> bool:
        """Whether so few loads wait for a thread that it is time for more, if there are any."""
        return len(self._waiting) <= (self._capacity - len(self._threads)) // 2

    def _pace(self, seconds: float) -> None:
        """Have as many loads at hand as suits loads of some duration."""
        at_hand = min(max(int(AT_HAND / seconds), 1), MOST_AT_HAND) if seconds else 1
        self._capacity = min((1 + at_hand) * len(self._threads), self._most)

    def submit(self, load: Load) -> None:
        """Have a load done, before those of lower priority that no thread has come to. There is `room`."""
        self._loads[load.key] = load
        self._insert(load)

    def promote(self, key: int, priority: int) -> bool:
        """Raise the priority of a load that was submitted, unless a thread has come to it; whether it was raised."""
        load = self._loads[key]
        if load.priority >= priority:
            return False
        try:
            self._waiting.remove(load)
        except ValueError:
            return False
        load.priority = priority
        self._insert(load)
        return True

    def _insert(self, load: Load) -> None:
        less_wanted = 0
        for other in reversed(self._waiting.copy()):
            if other.priority >= load.priority:
                break
            less_wanted += 1
        if less_wanted:
            self._waiting.insert(-less_wanted, load)  # from the end, which threads that take loads do not move
        else:
            self._waiting.append(load)
        self._calls.put(True)

    def take_back(self, below: int) -> Load | None:
        """Undo the submission of the least wanted load that no thread has come to, if its priority is below a value."""
        try:
            if self._waiting[-1].priority >= below:
                return None
            load = self._waiting.pop()  # the same one: threads take from the other end
        except IndexError:
            return None
        del self._loads[load.key]
        return load

    @property
    def has_completed(self) -> bool:
        """Whether `completed` would find one."""
        return bool(self._done)

    @property
    def has_unpublished(self) -> bool:
        """Whether `completed` would find one that was refused, or has failed."""
        return bool(self._done) and not all(load.good for load in self._done.copy())

    def completed(self) -> list[Load]:
        """Take all loads that have ended."""
        if self._fault is not None:
            raise self._fault
        loads = []
        while self._done:
            loads.append(self._done.popleft())
        for load in loads:
            del self._loads[load.key]
        return loads

    def close(self) -> None:
        """End the threads, after the loads that they have come to: from then on nothing is published."""
        self._waiting.clear()
        for _ in self._threads:
            self._calls.put(False)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - a fault of the pager: its main thread ends it
            self._fault = error

    def _work(self) -> None:
        while self._calls.get():
            try:
                load = self._waiting.popleft()
            except IndexError:  # it was taken back
                continue
            load.began_ns = time.monotonic_ns()
            self._carry_out(load)
            load.ended_ns = time.monotonic_ns()
            with contextlib.suppress(IndexError):
                load.followed_by = self._waiting[0]
            if load.good:
                self._publish(load)
                self._pace((load.ended_ns - load.began_ns) / 1e9)
            self._done.append(load)
            self._when_done(load)
            if self._drop_page_cache and load.good:
                with contextlib.suppress(OSError):  # advice that is not taken costs memory, not the load
                    self._source.drop_page_cache(load.layer, load.expert)

    def _carry_out(self, load: Load) -> None:
        try:
            if self._begin(load):
                checksum = Checksum(load.buffer)
                self._source.read_into(load.layer, load.expert, load.buffer, checksum.add)
                load.checksum = checksum.word()
            else:
                load.refused = True
        except BaseException as error:  # noqa: BLE001 - whatever a source raises fails this expert, not the thread
            load.error = error
