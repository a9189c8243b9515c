"""The one channel of a replay with prefetching: which load takes which time.

Demands run one after the other, in the order of asking; what is loaded ahead of them begins when the channel is idle,
and is finished once it has begun. Steps come in the order of `Accesses`, and a worker's clock may be behind another's:
what began ahead of demand after a demand's time has not begun for that one, so it gives way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass
class Load:
    """One load.

    Attributes
    ----------
    begin, end : float
        Seconds; until it has begun by all clocks, a demand may still move them.
    key : int
    ahead : bool
        Of demand.
    """

    begin: float
    end: float
    key: int
    ahead: bool


class Channel:
    """All loads, of which a demand may still meet some.

    Parameters
    ----------
    experts : int
        Of all layers.
    load_time : float
        Seconds of one load.

    Attributes
    ----------
    ready : ndarray
        float64 [experts of all layers]: when the latest load of each ends; 0 before.
    """

    def __init__(self, experts: int, load_time: float) -> None:
        self.ready = np.zeros(experts)
        self._load_time = load_time
        self._demands_end = 0.0
        self._ahead: deque[Load] = deque()  # in order: those that a demand may meet
        self._unfinished: list[Load] = []

    @property
    def idle_from(self) -> float:
        """When the last load ends."""
        return max(self._demands_end, self._ahead[-1].end if self._ahead else 0.0)

    def under_way(self, now: float) -> Load | None:
        """The load ahead of demand that a demand of now would wait for."""
        start = max(self._demands_end, now)
        return next((load for load in reversed(self._ahead) if load.begin < start < load.end), None)

    def ended(self, now: float) -> list[Load]:
        """Take those that have ended by now, in order."""
        ended = sorted((load for load in self._unfinished if load.end <= now), key=lambda load: load.end)
        self._unfinished = [load for load in self._unfinished if load.end > now]
        return ended

    def finish_ahead(self) -> Load:
        """Take the one ahead of demand that has not ended."""
        found = next(load for load in self._unfinished if load.ahead)
        self._unfinished.remove(found)
        return found

    def load_ahead(self, key: int, begin: float) -> None:
        """Load when nothing else does."""
        load = Load(begin, begin + self._load_time, key, True)
        self.ready[key] = load.end
        self._ahead.append(load)
        self._unfinished.append(load)

    def demand(self, key: int, now: float) -> None:
        """Load after all demands, and what is under way."""
        before = self.under_way(now)
        begin = before.end if before is not None else max(self._demands_end, now)
        load = Load(begin, begin + self._load_time, key, False)
        self._put(load)
        self._unfinished.append(load)

    def pull(self, key: int, now: float) -> None:
        """Make a demand of a load ahead of it that, by the clock of who wants it now, has not begun."""
        load = next((load for load in reversed(self._ahead) if load.key == key), None)
        if load is None or load.begin <= now or load.end != self.ready[key]:
            return
        before = self.under_way(now)
        begin = before.end if before is not None else max(self._demands_end, now)
        if before is load or begin >= load.begin:
            return
        self._ahead.remove(load)
        load.begin, load.end = begin, begin + self._load_time
        self._put(load)

    def forget(self, now: float) -> None:
        """Forget what no demand from now on can meet."""
        while self._ahead and self._ahead[0].end <= max(now, self._demands_end):
            self._ahead.popleft()

    def _put(self, load: Load) -> None:
        """Give a demand its time; what began later, ahead of demand, gives way."""
        self._demands_end = taken = self.ready[load.key] = load.end
        for later in self._ahead:
            if later.begin >= load.begin and later.begin < taken:
                current = self.ready[later.key] == later.end
                later.begin, later.end = taken, taken + self._load_time
                if current:
                    self.ready[later.key] = later.end
                taken = later.end
