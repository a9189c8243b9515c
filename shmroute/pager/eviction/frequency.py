"""Policies by how often an expert was used."""

from __future__ import annotations

from shmroute.shared.kernel import inner


@inner
def least_frequently_used(total: int) -> float:
    """What an expert is worth by its activations since the segment was made; equals go in order of last use."""
    return float(total)


@inner
def least_frequently_and_recently_used(total: int, age: int) -> float:
    """Activations for each tick of the layer since the last use, that one included."""
    return total / (age + 1)


@inner
def decayed_frequency(fast: float) -> float:
    """What an expert is worth by its share of the latest tokens."""
    return fast
