"""What became of each predictor's prefetches, and how far it can be trusted.

Each prefetch has one predictor. What it is worth shows later:

| outcome | when | counts as right |
|---|---|---|
| useful | its expert was used after it was asked for, and before it was evicted | yes |
| wasted | it was evicted without | no |
| overtaken | a demand came before its load began: right, and too late | yes |
| cancelled | it grew stale, or there was no room, before its load began | says nothing |

*Precision* is the moving average of right and wrong, for each predictor and layer; a layer without any outcome yet
takes after the others. *Punctuality* is that of whether the very next token of each worker in that layer used the
expert, which is what a prediction for a token says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shmroute.shared.metrics import Predictor, PrefetchOutcome

Waits = tuple[tuple[int, float], ...]
"""Lanes that wait for a load, and the seconds of waiting that each had counted before."""

RATE: Final = 1 / 16
"""What one outcome weighs in an average."""
PRIOR: Final = 0.5
"""Every average to start with."""


@dataclass
class Prefetched:
    """One prefetch under way, or loaded and not used yet.

    Attributes
    ----------
    predictor : int
    total, clock : int
        Its expert's activations, and its layer's clock, when it was asked for.
    asked_at : float
        Monotonic seconds.
    load_seconds : float
        How long its load took, once that has ended; 0 before.
    load_cpu : float
        Likewise the CPU time that it is charged with.
    waiters : Waits
        Of each worker that waited for it when its load had ended.
    timed : bool
        Whether its punctuality is known.
    victim : int
        The key of the expert that went for it, -1 for none.
    """

    predictor: int
    total: int
    clock: int
    asked_at: float
    load_seconds: float = 0.0
    load_cpu: float = 0.0
    waiters: Waits = ()
    timed: bool = False
    victim: int = -1


class TrackRecord:
    """The outcomes of all predictors of one pager.

    Parameters
    ----------
    num_layers, num_experts : int
    count : callable
        Called as ``count(predictor, outcome)``.
    """

    def __init__(self, num_layers: int, num_experts: int, count: Callable[[int, PrefetchOutcome], None]) -> None:
        self._num_experts = num_experts
        self._count = count
        self.pending: dict[int, Prefetched] = {}
        self.precision = np.full((len(Predictor), num_layers), PRIOR)
        self.punctuality = np.full((len(Predictor), num_layers), PRIOR)
        self._judged = np.zeros((len(Predictor), num_layers), np.bool_)

    def __contains__(self, key: int) -> bool:
        return key in self.pending

    @property
    def queued(self) -> int:
        """Prefetches whose load has not ended."""
        return sum(not prefetched.load_seconds for prefetched in self.pending.values())

    def asked(self, key: int, prefetched: Prefetched) -> None:
        """Note a new prefetch of an expert that is absent."""
        self.pending[key] = prefetched
        self._count(prefetched.predictor, PrefetchOutcome.ISSUED)

    def look(self, key: int, total: int, clock: int, workers: int) -> bool:
        """Note an expert's activations and its layer's clock, of now; whether the prefetch has proved useful.

        `workers` are under way.
        """
        prefetched = self.pending[key]
        used = total > prefetched.total
        if not prefetched.timed and (used or clock - prefetched.clock >= workers):
            prefetched.timed = True
            self._learn(self.punctuality, key, prefetched, used and clock - prefetched.clock <= workers)
        if not used or not prefetched.load_seconds:
            return False
        self._end(key, PrefetchOutcome.USEFUL)
        return True

    def loaded(self, key: int, seconds: float) -> None:
        """Note that a prefetch's load has ended, and how long it took."""
        self.pending[key].load_seconds = max(seconds, 1e-9)
        self._count(self.pending[key].predictor, PrefetchOutcome.COMPLETED)

    def overtaken(self, key: int) -> None:
        """Note that a demand came before the load began."""
        self._end(key, PrefetchOutcome.OVERTAKEN)

    def cancelled(self, key: int) -> None:
        """Note that the load will not be."""
        self._end(key, PrefetchOutcome.CANCELLED)

    def evicted(self, key: int) -> None:
        """Note that a prefetched expert went unused."""
        self._end(key, PrefetchOutcome.WASTED)

    def _end(self, key: int, outcome: PrefetchOutcome) -> None:
        prefetched = self.pending.pop(key)
        self._count(prefetched.predictor, outcome)
        if outcome != PrefetchOutcome.CANCELLED:
            self._judge(key, prefetched.predictor, outcome != PrefetchOutcome.WASTED)
            if not prefetched.timed and outcome == PrefetchOutcome.OVERTAKEN:
                self._learn(self.punctuality, key, prefetched, True)

    def _judge(self, key: int, predictor: int, right: bool) -> None:
        """Count one prefetch for its predictor's precision, in its layer and in those of which nothing is known."""
        layer = key // self._num_experts
        self._judged[predictor, layer] = True
        of_layers = ~self._judged[predictor]
        of_layers[layer] = True
        self.precision[predictor, of_layers] += (right - self.precision[predictor, of_layers]) * RATE

    def _learn(self, averages: npt.NDArray[np.float64], key: int, prefetched: Prefetched, right: bool) -> None:
        at = prefetched.predictor, key // self._num_experts
        averages[at] += (right - averages[at]) * RATE
