"""Policies by the time of the last use."""

from __future__ import annotations

from typing import Final

from shmroute.shared.kernel import inner

FRESH: Final = 1e6
"""More than any number of layers."""


@inner
def least_recently_used(last_used: int) -> float:
    """What an expert is worth by the observation that last saw it used."""
    return float(last_used)


@inner
def least_stale(age: int, workers: int) -> float:
    """What an expert is worth by whether the present pass through the layers has used it.

    Those that it has not used are stale and go first; of either kind, those of the layer that comes round last, which
    `victims` takes into account. After the idea of Least-Stale in SpecMD (arXiv 2602.03921); the rule is ours.

    Parameters
    ----------
    age : int
        Ticks of its layer since its last use.
    workers : int
        Each has a pass of its own, so a pass is as many ticks of a layer.
    """
    return FRESH if age < workers else 0.0
