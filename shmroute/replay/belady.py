"""Belady's rule: evict what will be wanted last. No policy that loads every miss hits more often.

L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5 (1966).
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from shmroute.replay.accesses import Accesses


def belady_hits(accesses: Accesses, slots: int) -> npt.NDArray[np.bool_]:
    """Which accesses, bool [accesses], find their expert resident, when the future is known."""
    keys = accesses.keys.tolist()
    following = [0] * len(keys)
    seen: dict[int, int] = {}
    for i in range(len(keys) - 1, -1, -1):
        following[i] = seen.get(keys[i], len(keys))
        seen[keys[i]] = i
    resident: dict[int, int] = {}  # when each is wanted next
    farthest: list[tuple[int, int]] = []  # some of it outdated
    hits = np.zeros(len(keys), np.bool_)
    for i, key in enumerate(keys):
        if key in resident:
            hits[i] = True
        elif len(resident) == slots:
            while True:
                negative, victim = heapq.heappop(farthest)
                if resident.get(victim) == -negative:
                    break
            del resident[victim]
        resident[key] = following[i]
        heapq.heappush(farthest, (-following[i], key))
    return hits
