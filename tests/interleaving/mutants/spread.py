"""Broken rules of the spread."""

from __future__ import annotations

from ..mutation import Mutant

SPREAD = (
    Mutant(
        "spreads stored, not swapped",
        "a mean is replaced only if it is still the one that was added to",
        "routing.spread:add_spreads",
        (
            (
                "        if cas(address, word, pack_spread(",
                "        if cas(address, load(address), pack_spread(",
            ),
        ),
        ("spread",),
    ),
)
