"""What is to be loaded, most wanted first."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from shmroute.shared.words import PREFETCH, URGENT

AWAITED = URGENT + 1
"""Above any priority of a word: a worker waits for this very expert."""

SLACK = 64
"""Places of removed or upgraded loads that may stay in the heap."""


class QueueEntry(NamedTuple):
    """A load's place in the queue."""

    priority: int
    queued_at: float
    arrival: int


class LoadQueue:
    """Experts waiting to be loaded: by priority, then in order of arrival. Each is in it once.

    Keys are ``layer * num_experts + expert``. This is the pager's private order of work; the truth about what is
    wanted is in the expert words.
    """

    def __init__(self) -> None:
        self._entries: dict[int, QueueEntry] = {}
        self._heap: list[tuple[int, int, int]] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: int) -> bool:
        return key in self._entries

    def push(self, key: int, priority: int, now: float) -> bool:
        """Queue a load, or raise the priority of one that is queued; whether that was an upgrade."""
        known = self._entries.get(key)
        if known is not None and known.priority >= priority:
            return False
        self._arrivals += 1
        self._entries[key] = QueueEntry(priority, now, self._arrivals)
        heapq.heappush(self._heap, (-priority, self._arrivals, key))
        if len(self._heap) > 2 * len(self._entries) + SLACK:
            self._heap = [(-entry.priority, entry.arrival, key) for key, entry in self._entries.items()]
            heapq.heapify(self._heap)
        return known is not None

    def peek(self) -> tuple[int, int] | None:
        """The (key, priority) to load next."""
        while self._heap:
            _, arrival, key = self._heap[0]
            entry = self._entries.get(key)
            if entry is not None and entry.arrival == arrival:
                return key, entry.priority
            heapq.heappop(self._heap)  # removed or upgraded since
        return None

    def demand_waits(self, now: float) -> float:
        """How long what would be loaded next has been waiting; 0 if nothing is demanded."""
        head = self.peek()
        if head is None or head[1] == PREFETCH:
            return 0.0
        return max(now - self._entries[head[0]].queued_at, 0.0)

    def remove(self, key: int) -> QueueEntry | None:
        """Take a load out, if it is there; what `put_back` needs to undo that."""
        return self._entries.pop(key, None)

    def put_back(self, key: int, entry: QueueEntry) -> None:
        """Undo a `remove`: the load has its former place."""
        self._entries[key] = entry
        heapq.heappush(self._heap, (-entry.priority, entry.arrival, key))

    def stale_prefetches(self, before: float) -> list[int]:
        """Prefetches queued before a time."""
        return [key for key, entry in self._entries.items() if entry.priority == PREFETCH and entry.queued_at < before]
