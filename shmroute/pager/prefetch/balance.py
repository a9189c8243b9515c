"""What each predictor's prefetches saved and cost, in seconds of loads.

A prefetch that is used saves its load. One that is under way when a demand comes makes that wait for the rest of it;
and if the expert that went for it is demanded again while the prefetched one is not used, or after it went unused, that
is a load more. Both are measured, not estimated, so it does not matter why they come about: long loads, bad guesses,
few slots.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from shmroute.shared.metrics import Predictor

MEMORY: Final = 64
"""Savings and costs over which the sums run, about: each fades with those that follow."""
GRACE: Final = 1.0
"""Loads by which the costs may exceed the savings."""


class Balance:
    """Savings and costs of all predictors."""

    def __init__(self) -> None:
        self._seconds = np.zeros(len(Predictor))
        self._load_seconds = 0.0

    def saved(self, predictor: int, load_seconds: float) -> None:
        """Note that a prefetch was used, whose load took so long."""
        self._load_seconds += (load_seconds - self._load_seconds) / MEMORY if self._load_seconds else load_seconds
        self._add(predictor, load_seconds)

    def cost(self, predictor: int, seconds: float) -> None:
        """Note that a demand waited so long because of a prefetch, or has to load again what went for one."""
        self._add(predictor, -seconds)

    def is_worth_it(self, predictor: int) -> bool:
        """Whether a predictor has saved what it cost, about."""
        return bool(self._seconds[predictor] >= -GRACE * self._load_seconds)

    def _add(self, predictor: int, seconds: float) -> None:
        self._seconds[predictor] += seconds - self._seconds[predictor] / MEMORY
