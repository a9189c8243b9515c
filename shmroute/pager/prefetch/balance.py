"""What each predictor's prefetches saved and cost.

Two things are counted that are not the same: seconds for which workers wait, and seconds of CPU time.

*Waiting.* A prefetch that is used saves its load: less what a worker still had to wait for its end, and only as far as
other loads that the same token waits for would not have run beside it. One that is under way when a demand comes makes
that wait for the rest of it; and if the expert that went for it is demanded again while the prefetched one is not used,
or after it went unused, that is a load more. Both are measured, not estimated, so it does not matter why they come
about: long loads, bad guesses, few slots.

*CPU time.* A load takes some, which a prefetch that is used gives back: it stands for the demand's load. Looking for
proposals takes some.

What either is worth depends on the cores (`usage`). Where none is idle, a worker that waits leaves its core to another,
so that nothing is lost by waiting, and all CPU time is taken from the workers. Where cores are idle it is the other way
round. Some time is lost whatever the cores do: workers that speculate do nothing else meanwhile, and loads that are
demanded wait while the pager thinks. A predictor pays as long as

    weight of CPU · CPU time + time lost ≤ weight of waiting · waiting saved, or one load.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from shmroute.pager.prefetch.usage import Usage
from shmroute.shared.metrics import Predictor

MEMORY: Final = 64
"""Savings and costs over which the sums run, about: each fades with those that follow."""
GRACE: Final = 1.0
"""Loads by which the costs may exceed the savings."""
DEBT: Final = 16.0
"""Loads by which the time lost may exceed what is saved: from there a predictor must be able to come back."""


class Balance:
    """Savings and costs of all predictors.

    Parameters
    ----------
    usage : Usage
        What they are worth.
    """

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._seconds = np.zeros(len(Predictor))  # of waiting, saved
        self._cpu = np.zeros(len(Predictor))  # seconds of the pager's CPU time, spent
        self._lost = np.zeros(len(Predictor))  # seconds, whatever the cores do
        self._load_seconds = 0.0

    def saved(self, predictor: int, load_seconds: float, seconds: float) -> None:
        """Note that a prefetch was used, whose load took so long, and what waiting that has saved."""
        self._load_seconds += (load_seconds - self._load_seconds) / MEMORY if self._load_seconds else load_seconds
        self._add(predictor, seconds)

    def cost(self, predictor: int, seconds: float) -> None:
        """Note that a demand waited so long because of a prefetch, or has to load again what went for one."""
        self._add(predictor, -seconds)

    def spent(self, predictor: int, cpu_seconds: float, load_seconds: float) -> None:
        """Note that a predictor took CPU time of the pager, or gave it back; a load takes so long.

        Time that nothing comes of is not faded by what follows, so it is bounded.
        """
        self._cpu[predictor] = min(max(self._cpu[predictor] + cpu_seconds, 0.0), MEMORY * load_seconds)

    def lost(self, predictor: int, seconds: float, load_seconds: float) -> None:
        """Note that workers have lost time by a predictor's thinking, whatever the cores do; a load takes so long."""
        most = self._worth_of_waiting(predictor) + DEBT * load_seconds
        self._lost[predictor] = min(self._lost[predictor] + seconds, most)

    def is_worth_it(self, predictor: int) -> bool:
        """Whether a predictor has saved what it cost, about, of waiting alone."""
        return bool(self._seconds[predictor] >= -GRACE * self._load_seconds)

    def pays(self, predictor: int, load_seconds: float) -> bool:
        """Whether a predictor's CPU time is worth what it saves, about; a load takes so long."""
        costs = self._usage.cpu_weight * self._cpu[predictor] + self._lost[predictor]
        return bool(costs <= max(self._worth_of_waiting(predictor), GRACE * load_seconds))

    def _worth_of_waiting(self, predictor: int) -> float:
        return max(self._usage.waiting_weight * float(self._seconds[predictor]), 0.0)

    def _add(self, predictor: int, seconds: float) -> None:
        for sums in (self._seconds, self._cpu, self._lost):
            sums[predictor] -= sums[predictor] / MEMORY
        self._seconds[predictor] += seconds
