"""The slots as the pager hands them to loads: free ones first, then those that an eviction empties."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shmroute.pager.eviction.policy import Eviction
from shmroute.pager.table import ExpertTable
from shmroute.shared.experts import evict
from shmroute.shared.segment import Segment
from shmroute.shared.words import RESIDENT, expert_slot, expert_state


class Slots:
    """Which slots are free, and how others become so.

    The expert words are the truth about slots; this is the pager's own account of them, which `adopt` makes anew. It
    lags behind: an I/O thread publishes its load before the main thread hears of it (`loaded`). Until then the expert
    is nobody's to evict, even if it is RESIDENT, leased and released already: its load would be noted for a slot that
    is another's by then.

    Parameters
    ----------
    segment : Segment
    table : ExpertTable
    powers : ndarray
        The affinity's power table.

    Attributes
    ----------
    eviction : Eviction
        The policy.
    evictions, page_outs : int
        So far; the latter are those that somebody asked for.
    when_evicted : callable
        Called with the key of each expert that goes.
    """

    def __init__(self, segment: Segment, table: ExpertTable, powers: npt.NDArray[np.float64]) -> None:
        self._table = table
        self.eviction = Eviction(segment, powers)
        self.when_evicted: Callable[[int], None] = lambda key: None
        self._free: list[int] = []
        self._evict_first: dict[int, None] = {}
        self._being_filled: set[int] = set()
        self.evictions = 0
        self.page_outs = 0

    def adopt(self) -> None:
        """Take the table for the truth, as a former pager left it: every slot that no word names is free."""
        self.scan()
        self._free = np.flatnonzero(self.eviction.owners < 0)[::-1].tolist()

    def scan(self) -> list[int]:
        """Read the table once, for the owners of slots; the requested keys."""
        self.eviction.observe()
        requested = self._table.scan(self.eviction.owners)
        for slot in self._being_filled:
            self.eviction.emptied(slot)
        return requested

    def evict_first(self, key: int) -> None:
        """Take a hint that a resident expert will not be missed."""
        if expert_state(self._table.word(key)) == RESIDENT:
            self._evict_first[key] = None

    def take(self, awaited: npt.NDArray[np.int64], may_go: Callable[[int], bool] | None = None) -> int | None:
        """A slot for a load, or None if there is none to be had. To be called after `Eviction.observe`.

        Parameters
        ----------
        awaited : ndarray
            int64 keys that workers wait for; they are not evicted.
        may_go : callable, optional
            Whether the expert of a key, which is the first to go, may go for this load; any may by default.
        """
        if self._free:
            return self._free.pop()
        for key in list(self._evict_first):
            emptied = None if key in awaited else self._evict(key)
            self._evict_first.pop(key, None)
            if emptied is not None:
                self.page_outs += 1
                return emptied
        if may_go is None:
            evicted = self.eviction.evict(awaited)
            if evicted is None:
                return None
            key, slot = evicted
            self._note_eviction(key)
            return slot
        while (candidate := self.eviction.victim(awaited)) is not None:
            key = candidate[0]
            if not may_go(key):
                return None
            emptied = self._evict(key)
            if emptied is not None:
                return emptied
        return None

    def can_evict(self, awaited: npt.NDArray[np.int64]) -> bool:
        """Whether an eviction would find a slot now."""
        return self.eviction.victim(awaited) is not None

    def loading(self, slot: int) -> None:
        """Note that a slot is being filled: until `loaded` or `give_back` it is nobody's."""
        self._being_filled.add(slot)

    def loaded(self, slot: int, key: int) -> None:
        """Note that a slot has a new expert."""
        self._being_filled.discard(slot)
        self._evict_first.pop(key, None)
        self.eviction.loaded(slot, key)

    def give_back(self, slot: int) -> None:
        """Note that a slot holds nothing after all."""
        self._being_filled.discard(slot)
        self.eviction.emptied(slot)
        self._free.append(slot)

    def _evict(self, key: int) -> int | None:
        """Evict an expert: its slot, or None if it is leased or not resident."""
        word = self._table.word(key)
        slot = expert_slot(word)
        layer, expert = self._table.split(key)
        if expert_state(word) != RESIDENT or slot in self._being_filled:
            return None
        if not evict(self._table.address(key), self._table.resident_row(layer), expert, slot):
            return None
        self.eviction.emptied(slot)
        self._note_eviction(key)
        return slot

    def _note_eviction(self, key: int) -> None:
        self._evict_first.pop(key, None)
        self.evictions += 1
        self.when_evicted(key)
