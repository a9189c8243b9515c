"""The policy by expected next use: keep what will be wanted soonest.

A worker passes the layers in turn, so an expert of layer l can be wanted only when some worker comes to l: first in d
layers. If each token of the layer then chooses it with probability p, independently, (1 - p) / p tokens pass
it by on average before one does, and with W workers under way a token comes to the layer every L / W layers of one
worker's way. So its next use is

    d + (1 - p) / p · L / W

layers ahead, and the expert for which that is farthest goes: Belady's rule (1966) with an expectation in the place of
the future. d is the same for all experts of a layer, so `victims` adds it.

*The probability.* The odds are a product of powers, that is, linear in logarithms:

    p / (1 - p) = (fast · slow²)^a · e^c

with the expert's shares of the latest tokens and of many (`history`), and c > 0 if the layer's last token used it, less
if the one before did. The powers and rates were fitted on recorded routing of five models, on one half of each trace,
and judged on the other; results change little with them.
"""

from __future__ import annotations

import math
from typing import Final

from shmroute.shared.kernel import inner

SHARES_POWER: Final = 0.3
"""Power of the product ``fast · slow²`` in the odds."""
LAST_TOKEN: Final = 0.8
"""Logarithm by which the odds rise for an expert that the last token used."""
TOKEN_BEFORE: Final = 0.2
"""Likewise for the token before it."""
FLOOR: Final = 0.1
"""Added to both shares, in units of k / E: never seen is not impossible."""

LAST_TOKEN_FACTOR: Final = math.exp(LAST_TOKEN / SHARES_POWER)
TOKEN_BEFORE_FACTOR: Final = math.exp(TOKEN_BEFORE / SHARES_POWER)


@inner
def rank_by_odds(fast: float, slow: float, age: int, workers: int, prior: float) -> float:
    """A number that grows with the odds that a token uses an expert: these to the power of 1 / `SHARES_POWER`.

    Parameters
    ----------
    fast, slow : float
        Its shares of the latest tokens and of many.
    age : int
        Ticks of its layer since its last use.
    workers : int
        How many are under way: each one's last token counts as the last.
    prior : float
        k / E.
    """
    floor = FLOOR * prior
    rank = (fast + floor) * (slow + floor) * (slow + floor)
    if age < workers:
        rank *= LAST_TOKEN_FACTOR
    elif age < 2 * workers:
        rank *= TOKEN_BEFORE_FACTOR
    return rank


@inner
def tokens_until_use(rank: float, prior: float) -> float:
    """Tokens of its layer that will pass an expert by, on average, before one uses it: the odds against it."""
    whole = 1 + FLOOR * prior
    return float((rank / (whole * whole * whole)) ** -SHARES_POWER)
