"""Probabilities that a model gives to its experts, and how much of them a changed choice loses.

A *share* is a probability before it is divided by the sum of all: ``exp(logit - peak)`` for softmax, the sigmoid of the
logit (without correction bias) for sigmoid scoring; 0 if the logit is not finite. Each is good to 3e-7.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shmroute.routing import plan_words as p
from shmroute.routing.codes import SOFTMAX
from shmroute.routing.scoring import peak_of_row
from shmroute.routing.selection import ID
from shmroute.routing.vectors import (
    WIDTH,
    before,
    exp_under,
    id_at,
    larger,
    load_logits,
    logistic,
    logit_at,
    narrowed,
    plus,
    put_word,
    replaced,
    same,
    store_logits,
    total,
    widened,
    word_at,
)
from shmroute.shared.atomic import WORD
from shmroute.shared.bits import lowest_bit
from shmroute.shared.kernel import inner
from shmroute.shared.metrics import MASS_ONE


@inner
def fill_shares(words: npt.NDArray[np.int64], row_at: int) -> float:
    """Write all shares of a token to the plan's SHARES; their sum."""
    num_experts, shares_at = words[p.NUM_EXPERTS], words[p.SHARES]
    sums = same(0.0)
    if words[p.SCORING] == SOFTMAX:
        peak = peak_of_row(row_at, num_experts)
        for first in range(0, num_experts, WIDTH):
            logits = load_logits(row_at + first * 4, num_experts - first)
            shares = exp_under(logits, peak)
            sums = plus(sums, widened(shares))
            store_logits(shares, shares_at + first * 4)
    else:
        nothing = narrowed(same(0.0))
        for first in range(0, num_experts, WIDTH):
            shares = larger(logistic(load_logits(row_at + first * 4, num_experts - first)), nothing)
            sums = plus(sums, widened(shares))
            store_logits(shares, shares_at + first * 4)
    return total(sums)


@inner
def mass_of(words: npt.NDArray[np.int64], ids_at: int) -> float:
    """The sum of the shares of k experts."""
    mass = 0.0
    for rank in range(words[p.TOP_K]):
        mass += logit_at(words[p.SHARES] + id_at(ids_at + rank * ID) * 4)
    return mass


@inner
def mass_before(words: npt.NDArray[np.int64], scores_at: int, expert: int) -> float:
    """The sum of the shares of all experts that come before one by choosing score."""
    num_experts, shares_at = words[p.NUM_EXPERTS], words[p.SHARES]
    score = logit_at(scores_at + expert * 4)
    sums = same(0.0)
    for first in range(0, num_experts, WIDTH):
        scores = load_logits(scores_at + first * 4, num_experts - first)
        earlier = before(scores, score, min(max(expert - first, 0), WIDTH))
        shares = replaced(load_logits(shares_at + first * 4, num_experts - first), ~earlier, 0.0)
        sums = plus(sums, widened(shares))
    return total(sums)


@inner
def lost_mass(words: npt.NDArray[np.int64], row_at: int) -> int:
    """What the chosen experts' shares lack of the own ones', of all, in units of 1 / MASS_ONE.

    Never less than 0: with a correction bias the own experts need not be the most probable ones.
    """
    all_shares = fill_shares(words, row_at)
    lost = mass_of(words, words[p.OWN]) - mass_of(words, words[p.CHOSEN])
    return int(max(lost, 0.0) / all_shares * MASS_ONE + 0.5)


@inner
def lost_by_one(words: npt.NDArray[np.int64], row_at: int, last: int) -> int:
    """`lost_mass` with softmax scores when one expert was replaced: the one before the chosen `last`, not chosen.

    In one pass, since this comes often.
    """
    num_experts, marks_at = words[p.NUM_EXPERTS], words[p.PREFERRED]
    for block in range(0, num_experts, 64):
        put_word(marks_at + (block >> 6) * WORD, 0)
    for rank in range(words[p.TOP_K]):
        expert = id_at(words[p.CHOSEN] + rank * ID)
        mark_at = marks_at + (expert >> 6) * WORD
        put_word(mark_at, word_at(mark_at) | (1 << (expert & 63)))
    peak, bound = peak_of_row(row_at, num_experts), logit_at(row_at + last * 4)
    shares = narrowed(same(0.0))
    dropped = last
    for block in range(0, num_experts, 64):
        earlier = 0
        for first in range(block, min(block + 64, num_experts), WIDTH):
            logits = load_logits(row_at + first * 4, num_experts - first)
            shares = plus(shares, exp_under(logits, peak))
            earlier |= before(logits, bound, min(max(last - first, 0), WIDTH)) << (first - block)
        earlier &= ~word_at(marks_at + (block >> 6) * WORD)
        if earlier != 0:
            dropped = block + lowest_bit(earlier)
    lost = math.exp(logit_at(row_at + dropped * 4) - peak) - math.exp(bound - peak)
    return int(lost / total(widened(shares)) * MASS_ONE + 0.5)
