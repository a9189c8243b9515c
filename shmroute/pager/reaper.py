"""Burying the dead: lanes whose worker has ended are freed, with everything they held."""

from __future__ import annotations

from shmroute.shared.identity import DeathWatch
from shmroute.shared.lanes import free_lane, lane_identities
from shmroute.shared.segment import Segment


class Reaper:
    """Watches the workers of a segment. Only the holder of the pager's lock may have one.

    Parameters
    ----------
    segment : Segment
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._watch: DeathWatch[int] = DeathWatch()

    def reap(self) -> int:
        """Free the lanes of workers that have died; how many."""
        identities = lane_identities(self._segment)
        for lane, identity in identities.items():
            self._watch.watch(lane, identity)
        for lane in range(self._segment.config.max_workers):
            if lane not in identities:
                self._watch.forget(lane)
        reaped = 0
        for lane, identity in self._watch.dead():
            reaped += free_lane(self._segment, lane, identity)
            self._watch.forget(lane)
        return reaped

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()
