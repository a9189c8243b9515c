"""Choosing k of E experts by score, without comparing each with each.

Sixteen experts at a time (`shmroute.routing.vectors`). For more than sixteen the row is folded into sixteen maxima;
the k-th largest of these is a score that at least k experts reach, so the chosen ones are among those that do: some
eleven for k = 8, however many experts there are. Only they are then ordered, by counting for each how many are before
it, which takes no branch.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from shmroute.routing.vectors import (
    WIDTH,
    Logits,
    at_least,
    count_before,
    id_at,
    kth_largest,
    larger,
    load_logits,
    load_scores,
    logit_at,
    narrowed,
    put_id,
    put_score,
    raised,
    same,
    score_at,
    store_logits,
    store_scores,
    widened,
    word_at,
)
from shmroute.shared.atomic import WORD, f64_array, i32_array
from shmroute.shared.bits import count_bits, lowest_bit
from shmroute.shared.kernel import called, inlined, inner

LOWEST: Final = -float(np.finfo(np.float32).max)
"""The least finite logit. One that is not finite counts as -inf."""

ID: Final = 4
"""Bytes of an expert's id in scratch space, int32."""


@inlined
def bit_at(snapshot_at: int, expert: int) -> int:
    """An expert's bit of a bitmap: 1 if it is resident."""
    return (word_at(snapshot_at + (expert >> 6) * WORD) >> (expert & 63)) & 1


@inlined
def count_resident(snapshot_at: int, chosen_at: int, k: int) -> int:
    """How many of k chosen experts have their bit."""
    count = 0
    for rank in range(k):
        count += bit_at(snapshot_at, id_at(chosen_at + rank * ID))
    return count


@inlined
def last_by_logit(logits_at: int, chosen_at: int, k: int) -> int:
    """Which of k chosen experts comes last by logit alone."""
    last = id_at(chosen_at)
    least = logit_at(logits_at + last * 4)
    for rank in range(1, k):
        expert = id_at(chosen_at + rank * ID)
        logit = logit_at(logits_at + expert * 4)
        after = int(logit < least) | (int(logit == least) & int(expert > last))
        last = expert if after else last
        least = min(least, logit)
    return last


@inlined
def count_before_by_logit(logits_at: int, num_experts: int, expert: int) -> int:
    """How many experts come before one by logit alone."""
    logit = logit_at(logits_at + expert * 4)
    count = 0
    for first in range(0, num_experts, WIDTH):
        logits = load_logits(logits_at + first * 4, num_experts - first)
        count += count_before(logits, logit, min(max(expert - first, 0), WIDTH))
    return count


@inlined
def count_after(logits_at: int, chosen_at: int, k: int, last: int) -> int:
    """How many of k chosen experts come after expert `last` by logit alone."""
    bound = logit_at(logits_at + last * 4)
    count = 0
    for rank in range(k):
        expert = id_at(chosen_at + rank * ID)
        logit = logit_at(logits_at + expert * 4)
        count += int(logit < bound) | (int(logit == bound) & int(expert > last))
    return count


def scratch_length(num_experts: int) -> int:
    """How many elements each piece of `select_top_k`'s scratch space has."""
    return num_experts + WIDTH


@inlined
def _bound_of_k(logits_at: int, num_experts: int, k: int) -> float:
    """A logit that at least k experts reach, and hardly more."""
    maxima = narrowed(same(-math.inf))
    for first in range(0, num_experts, WIDTH):
        maxima = larger(maxima, load_logits(logits_at + first * 4, num_experts - first))
    return max(LOWEST, kth_largest(maxima, k))


@inner
def order_by_insertion(scores_at: int, ids_at: int, count: int, chosen_at: int, k: int) -> None:
    """Choose the k best of candidates, which come by ascending id; their scores are overwritten."""
    scores = f64_array(scores_at, count)
    ids = i32_array(ids_at, count)
    chosen = i32_array(chosen_at, k)
    filled = 0
    for i in range(count):
        score, expert = scores[i], ids[i]
        if filled < k:
            filled += 1
        elif score <= scores[k - 1]:
            continue
        rank = filled - 1
        while rank > 0 and scores[rank - 1] < score:
            scores[rank] = scores[rank - 1]
            chosen[rank] = chosen[rank - 1]
            rank -= 1
        scores[rank] = score
        chosen[rank] = expert


@inlined
def _order(scores_at: int, ids_at: int, count: int, chosen_at: int, k: int, wide: bool) -> None:
    """Choose the k best of candidates, which come by ascending id. `wide`: some scores are not float32's."""
    if count > WIDTH:
        order_by_insertion(scores_at, ids_at, count, chosen_at, k)
        return
    store_scores(same(-math.inf), scores_at + count * WORD)  # what is beyond the last one is before none
    scores = load_scores(scores_at)
    logits = narrowed(scores)
    for i in range(count):
        score = score_at(scores_at + i * WORD)
        rank = count_before(scores, score, i) if wide else count_before(logits, score, i)
        put_id(chosen_at + rank * ID, id_at(ids_at + i * ID))


@called
def _order_wide(scores_at: int, ids_at: int, count: int, chosen_at: int, k: int) -> None:
    """`_order` of scores that are not all float32's."""
    _order(scores_at, ids_at, count, chosen_at, k, True)


@inlined
def select_top_k(logits_at: int, num_experts: int, scores_at: int, ids_at: int, chosen_at: int, k: int) -> int:
    """The k best finite logits of one token, best first.

    Ties go to the lower id (INV-6). Experts whose logit is not finite are passed over.

    Parameters
    ----------
    logits_at : int
        Address of float32 [E].
    scores_at, ids_at : int
        Addresses of scratch space: float64 and int32, `scratch_length` of each.
    chosen_at : int
        Address of int32, as many again: the k experts are written, then rubbish.

    Returns
    -------
    int
        How many finite logits there were; entries from that rank on mean nothing.
    """
    if num_experts <= WIDTH:  # all are put in order
        logits = load_logits(logits_at, num_experts)
        store_logits(logits, scores_at)
        for expert in range(num_experts):
            put_id(chosen_at + count_before(logits, logit_at(scores_at + expert * 4), expert) * ID, expert)
        return count_bits(at_least(logits, LOWEST))
    bound = _bound_of_k(logits_at, num_experts, k) if k <= WIDTH else LOWEST
    finite = count = 0
    for block in range(0, num_experts, 64):
        bits = 0
        for first in range(block, min(block + 64, num_experts), WIDTH):
            logits = load_logits(logits_at + first * 4, num_experts - first)
            finite += count_bits(at_least(logits, LOWEST))
            bits |= at_least(logits, bound) << (first - block)
        while bits != 0:
            expert = block + lowest_bit(bits)
            bits &= bits - 1
            put_id(ids_at + count * ID, expert)
            put_score(scores_at + count * WORD, logit_at(logits_at + expert * 4))
            count += 1
    _order(scores_at, ids_at, count, chosen_at, k, False)
    return finite


@inlined
def _raised_logits(logits_at: int, first: int, num_experts: int, bonus: float, snapshot_at: int) -> Logits:
    """The logits from `first` on, a bonus added to those of resident experts: rounded to float32."""
    resident = word_at(snapshot_at + (first >> 6) * WORD) >> (first & 63)
    scores: Logits = raised(load_logits(logits_at + first * 4, num_experts - first), resident, bonus)
    return scores


@inlined
def _raised_bound_of_k(logits_at: int, num_experts: int, bonus: float, snapshot_at: int, k: int) -> float:
    """What `_raised_logits` gives for at least each of the k best."""
    maxima = narrowed(same(-math.inf))
    for first in range(0, num_experts, WIDTH):
        maxima = larger(maxima, _raised_logits(logits_at, first, num_experts, bonus, snapshot_at))
    bound = kth_largest(maxima, k)
    # The bonus and the sum are each rounded, to half a unit of float32 (2^-24), and so is this bound: four times as
    # much as they amount to for the expert that made the bound and for one just under it does no harm.
    return max(LOWEST, bound - (abs(bound) + bonus) * 2.0**-21)


@inlined
def select_raised(
    logits_at: int, num_experts: int, bonus: float, snapshot_at: int, scores_at: int, ids_at: int, chosen_at: int,
    k: int,
) -> int:  # fmt: skip
    """`select_top_k` by logit plus bonus: `bonus` is added to resident experts, in float64.

    Parameters
    ----------
    bonus : float
        At least 0.
    snapshot_at : int
        Address of int64 [⌈E/64⌉], residency.
    others
        As for `select_top_k`, and so is what is returned.
    """
    if num_experts <= WIDTH:  # all are put in order
        logits = load_logits(logits_at, num_experts)
        scores = raised(widened(logits), word_at(snapshot_at), bonus)
        store_scores(scores, scores_at)
        for expert in range(num_experts):
            put_id(chosen_at + count_before(scores, score_at(scores_at + expert * WORD), expert) * ID, expert)
        return count_bits(at_least(logits, LOWEST))
    bound = LOWEST
    if k <= WIDTH:
        bound = _raised_bound_of_k(logits_at, num_experts, bonus, snapshot_at, k)
    finite = count = 0
    for block in range(0, num_experts, 64):
        bits = 0
        for first in range(block, min(block + 64, num_experts), WIDTH):
            finite += count_bits(at_least(load_logits(logits_at + first * 4, num_experts - first), LOWEST))
            scores = _raised_logits(logits_at, first, num_experts, bonus, snapshot_at)
            bits |= at_least(scores, bound) << (first - block)
        resident = word_at(snapshot_at + (block >> 6) * WORD)
        while bits != 0:
            offset = lowest_bit(bits)
            bits &= bits - 1
            put_id(ids_at + count * ID, block + offset)
            score = logit_at(logits_at + (block + offset) * 4) + bonus * ((resident >> offset) & 1)
            put_score(scores_at + count * WORD, score)
            count += 1
    _order_wide(scores_at, ids_at, count, chosen_at, k)
    return finite


@inner
def choose_top_k(logits_at: int, num_experts: int, scores_at: int, ids_at: int, chosen_at: int, k: int) -> int:
    """`select_top_k` as one function for all that call it, not pasted into each: for what not every token needs."""
    return select_top_k(logits_at, num_experts, scores_at, ids_at, chosen_at, k)
