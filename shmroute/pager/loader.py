"""Loads: a few threads that read experts straight into their slots.

The threads touch no shared word but the bell. They are threads of the pager, never processes, so that the release of
the pager's lock at its death proves that nobody writes a slot any more.
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

from shmroute.sources import ExpertSource


@dataclass
class Load:
    """One load, from its start to its end.

    Attributes
    ----------
    layer, expert, slot, priority : int
    buffer : memoryview
        The slot's bytes.
    began_ns, ended_ns : int
        CLOCK_MONOTONIC.
    checksum : int
        xxh3 of the bytes, as a signed 64-bit word that is never 0.
    error : BaseException or None
    """

    layer: int
    expert: int
    slot: int
    priority: int
    buffer: memoryview
    began_ns: int = 0
    ended_ns: int = 0
    checksum: int = 0
    error: BaseException | None = None


def checksum_word(buffer: memoryview) -> int:
    """xxh3-64 of some bytes as a signed word; 0 (which means "not known yet") is mapped to 1."""
    digest = xxhash.xxh3_64_intdigest(buffer) or 1
    return digest - (1 << 64) if digest >> 63 else digest


class Loader:
    """A pool of I/O threads.

    Parameters
    ----------
    source : ExpertSource
    threads : int
    drop_page_cache : bool
        After a load, drop the file pages it came from.
    when_done : callable
        Called in an I/O thread after each load has been put where `completed` finds it.
    """

    def __init__(
        self, source: ExpertSource, threads: int, drop_page_cache: bool, when_done: Callable[[], None]
    ) -> None:
        self._source = source
        self._drop_page_cache = drop_page_cache
        self._when_done = when_done
        self._jobs: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._done: deque[Load] = deque()
        self.in_flight = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"shmroute-io-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def idle(self) -> int:
        """Threads without a load. Loads that ended but were not collected count as under way."""
        return len(self._threads) - self.in_flight

    def submit(self, load: Load) -> None:
        """Start a load. The caller has seen `idle` above 0."""
        self.in_flight += 1
        load.began_ns = time.monotonic_ns()
        self._jobs.put(load)

    @property
    def has_completed(self) -> bool:
        """Whether `completed` would find one."""
        return bool(self._done)

    def completed(self) -> list[Load]:
        """Take all loads that have ended."""
        loads = []
        while self._done:
            loads.append(self._done.popleft())
        self.in_flight -= len(loads)
        return loads

    def close(self) -> None:
        """End the threads, after the loads that are under way."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (load := self._jobs.get()) is not None:
            try:
                self._source.read_into(load.layer, load.expert, load.buffer)
                load.checksum = checksum_word(load.buffer)
                if self._drop_page_cache:
                    with contextlib.suppress(OSError):  # advice that is not taken costs memory, not the load
                        self._source.drop_page_cache(load.layer, load.expert)
            except BaseException as error:  # noqa: BLE001 - whatever a source raises fails this expert, not the thread
                load.error = error
            load.ended_ns = time.monotonic_ns()
            self._done.append(load)
            self._when_done()
