"""The spread of a layer: by how much the choosing scores of a token differ, in the mean.

The rule ``cache-prior`` raises experts by a share of it, so that one strength means the same in every layer. A token's
spread is its largest minus its least choosing score; the layer's is the running mean over tokens, which after
SPREAD_COUNT_MAX of them forgets, each new one counting for 1 / SPREAD_COUNT_MAX.

It is one word per layer, shared, so that all workers go by the same value. A call loads it once, with its residency
snapshot, routes all its tokens by it, and leaves it in the plan for a trace: same logits, same snapshot and same spread
give the same choice (INV-6). After the last token it adds what it met, so a batch that is refused adds nothing. Before
the first token the mean is 0, and the rule raises nobody.

| who | may write | when |
|---|---|---|
| worker, in a routing call by the rule | the word, by CAS | after it has chosen for all tokens |
| anybody | nothing; loads it | always |

Linearization point: the CAS. Lock-free: a failed one means that another worker's succeeded. Death before it leaves the
call out of the mean; there is no other window.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shmroute.routing import plan_words as p
from shmroute.routing.codes import CACHE_PRIOR
from shmroute.routing.selection import LOWEST
from shmroute.routing.vectors import (
    WIDTH,
    at_least,
    larger,
    largest,
    least,
    load_logits,
    narrowed,
    replaced,
    same,
    smaller,
    widened,
)
from shmroute.shared.atomic import cas, f64_array, load
from shmroute.shared.kernel import inner
from shmroute.shared.words import SPREAD_COUNT_MAX, SPREAD_MAX, pack_spread, spread_count, spread_mean


@inner
def spread_of(scores_at: int, num_experts: int) -> float:
    """The largest minus the least of a token's choosing scores, float32 [E], those of -inf left out."""
    most = narrowed(same(-math.inf))
    lowest = narrowed(same(math.inf))
    for first in range(0, num_experts, WIDTH):
        scores = load_logits(scores_at + first * 4, num_experts - first)
        most = larger(most, scores)
        lowest = smaller(lowest, replaced(scores, ~at_least(scores, LOWEST), math.inf))
    return min(largest(widened(most)) - least(widened(lowest)), float(SPREAD_MAX))


@inner
def add_spreads(address: int, total: float, tokens: int) -> None:
    """Add the spreads of some tokens, whose sum is `total`, to the word at an address."""
    while True:
        word = load(address)
        count = spread_count(word)
        mean = spread_mean(word)
        mean += (total - tokens * mean) / (count + tokens)
        if cas(address, word, pack_spread(min(count + tokens, SPREAD_COUNT_MAX), mean)):  # linearization point
            return


@inner
def take_spread(words: npt.NDArray[np.int64]) -> float:
    """The spread by which a call routes; 0 if its rule has no use for one."""
    words[p.SPREAD_USED] = 0
    if words[p.RULE] != CACHE_PRIOR:
        return 0.0
    f64_array(words[p.PARAMETERS], p.PARAMETER_COUNT)[p.SPREAD_SUM] = 0.0
    words[p.SPREAD_USED] = load(words[p.SPREAD])
    return spread_mean(words[p.SPREAD_USED])


@inner
def give_spread(words: npt.NDArray[np.int64], tokens: int) -> None:
    """Add what a call's tokens had, once all of them were chosen for."""
    if words[p.RULE] == CACHE_PRIOR:
        add_spreads(words[p.SPREAD], f64_array(words[p.PARAMETERS], p.PARAMETER_COUNT)[p.SPREAD_SUM], tokens)
