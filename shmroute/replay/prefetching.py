"""Which experts a replay asks for ahead of demand.

A prefetcher looks at the accesses and says what it would ask for after each step; a prediction must of course look only
at what was before. The replay asks for what is not resident, in that order, after the step's own misses; when the
channel gets to it is for `timing`, what must go for it is for the eviction policy (`serving`).
"""

from __future__ import annotations

import itertools
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from shmroute.replay.accesses import Accesses


class Prefetcher(Protocol):
    """What a prefetcher is."""

    def __call__(self, accesses: Accesses) -> npt.NDArray[np.int64]:
        """What to ask for once each step is routed: int64 [steps, width] keys, best first, -1 for nothing."""
        ...


def nothing(accesses: Accesses) -> npt.NDArray[np.int64]:
    """Ask for nothing."""
    return np.zeros((len(accesses.layers), 0), np.int64)


def oracle(accesses: Accesses) -> npt.NDArray[np.int64]:
    """What the same worker will choose in its next layer: the most that one layer of foresight could do."""
    asked = np.full((len(accesses.layers), accesses.top_k), -1, np.int64)
    for worker in range(accesses.num_workers):
        steps = np.flatnonzero(accesses.workers == worker)
        for step, following in itertools.pairwise(steps):
            keys = accesses.keys[accesses.starts[following] : accesses.starts[following + 1]]
            asked[step, : len(keys)] = keys
    return asked


PREFETCHERS: Final[dict[str, Prefetcher]] = {"none": nothing, "oracle": oracle}
"""By the names of ``--prefetch``."""
