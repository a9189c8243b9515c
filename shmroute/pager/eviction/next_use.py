"""The policy by expected next use: keep what will be wanted soonest.

A worker passes the layers in turn, so an expert of layer l can be wanted only when some worker comes to l: first in d
layers. If each token of the layer then chooses it with probability p, independently, (1 - p) / p tokens pass
it by on average before one does, and with W workers under way a token comes to the layer every L / W layers of one
worker's way. So its next use is

    d + (1 - p) / p · L / W

layers ahead, and the expert for which that is farthest goes: Belady's rule (1966) with an expectation in the place of
the future. d is the same for all experts of a layer, so `victims` adds it.

*The probability.* The odds are a product of powers, that is, linear in logarithms:

    p / (1 - p) = (fast · slow²)^a · (1 + c / W) · lift^2a

with the expert's shares of the latest tokens and of many (`history`); c > 0 if a worker's last token used it, less
if the one before did: the next token is that worker's once in W times; and the lift that the other experts of the
workers' last tokens give it (`next_token`). The numbers were fitted on recorded routing of five models: many settings
around them do as well, on either half of each trace.
"""

from __future__ import annotations

from typing import Final

from shmroute.shared.kernel import inner

SHARES_POWER: Final = 0.2
"""Power of the product ``fast · slow²`` in the odds."""
LAST_TOKEN_GAIN: Final = 0.5
"""By how much, in proportion, the odds rise for an expert that the last token used."""
TOKEN_BEFORE_GAIN: Final = 0.1
"""Likewise for the token before it."""
FLOOR: Final = 0.01
"""Added to both shares, in units of k / E: never seen is not impossible."""


@inner
def rank_factor(gain: float, workers: int) -> float:
    """By what the rank of an expert is multiplied whose odds rise by a gain in one of several workers' tokens.

    What a worker's last token used, that worker's next one is likelier to use; the other workers' next are not.
    """
    return float((1 + gain / workers) ** (1 / SHARES_POWER))


@inner
def rank_by_odds(
    fast: float, slow: float, age: int, lift: float, workers: int, prior: float, last_token: float, token_before: float
) -> float:
    """A number that grows with the odds that a token uses an expert: these to the power of 1 / `SHARES_POWER`.

    Parameters
    ----------
    fast, slow : float
        Its shares of the latest tokens and of many.
    age : int
        Ticks of its layer since its last use.
    lift : float
        By what the workers' last tokens multiply its probability.
    workers : int
        How many are under way: each one's last token counts as the last.
    prior : float
        k / E.
    last_token, token_before : float
        `rank_factor` of the gains.
    """
    floor = FLOOR * prior
    rank = (fast + floor) * (slow + floor) * (slow + floor) * lift * lift
    if age < workers:
        rank *= last_token
    elif age < 2 * workers:
        rank *= token_before
    return rank


@inner
def tokens_until_use(rank: float, prior: float) -> float:
    """Tokens of its layer that will pass an expert by, on average, before one uses it: the odds against it."""
    whole = 1 + FLOOR * prior
    return float((rank / (whole * whole * whole)) ** -SHARES_POWER)
