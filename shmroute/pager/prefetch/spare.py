"""How much of the loads' bandwidth demands leave: what a prefetch may use."""

from __future__ import annotations

import math
from typing import Final

LOADS: Final = 16
"""Loads over which the shares of time are averaged."""


class SpareBandwidth:
    """Shares of the I/O threads' time, as moving averages over some `LOADS` loads.

    Parameters
    ----------
    threads : int
        Loads that run at once.

    Attributes
    ----------
    load_seconds : float
        That a load takes, on average; 0 before the first.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.load_seconds = 0.0
        self._busy = [0.0, 0.0]  # by prefetches, by demands
        self._since = 0.0

    def loaded(self, seconds: float, now: float, *, demanded: bool) -> None:
        """Note that a load has ended."""
        self.load_seconds += (seconds - self.load_seconds) / LOADS if self.load_seconds else seconds
        self._pass(now)
        span = max(LOADS * self.load_seconds / self._threads, 1e-9)
        self._busy[demanded] += seconds / (span * self._threads)

    def demanded(self, now: float) -> float:
        """The share that demands take, 0 … 1."""
        self._pass(now)
        return min(self._busy[True], 1.0)

    def spare(self, now: float) -> float:
        """The share that neither demands nor prefetches take, 0 … 1."""
        self._pass(now)
        return max(1.0 - self._busy[True] - self._busy[False], 0.0)

    def _pass(self, now: float) -> None:
        span = max(LOADS * self.load_seconds / self._threads, 1e-9)
        if now > self._since:
            kept = math.exp((self._since - now) / span)
            self._busy = [busy * kept for busy in self._busy]
            self._since = now
