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
from shmroute.shared.kernel import inlined, inner

LOWEST: Final = -float(np.finfo(np.float32).max)
"""The least finite logit. One that is not finite counts as -inf."""

ID: Final = 4
"""Bytes of an expert's id in scratch space, int32."""


@inlined
def bit_at(snapshot_at: int, expert: int) -> int:
    """An expert's bit of a bitmap: 1 if it is resident."""
    return (word_at(snapshot_at + (expert >> 6) * WORD) >> (expert & 63)) & 1


@inlined
def resident_bits(snapshot_at: int, first: int) -> int:
    """The bits of a bitmap from expert `first` on, at least sixteen of them; `first` is a multiple of sixteen."""
    return word_at(snapshot_at + (first >> 6) * WORD) >> (first & 63)


@inlined
def count_resident(snapshot_at: int, chosen_at: int, k: int) -> int:
    """How many of k chosen experts have their bit."""
    count = 0
    for rank in range(k):
        count += bit_at(snapshot_at, id_at(chosen_at + rank * ID))
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
def _group(logits_at: int, first: int, num_experts: int, bonus: float, snapshot_at: int) -> Logits:
    """The choosing scores of up to sixteen experts from `first` on, rounded to float32."""
    logits = load_logits(logits_at + first * 4, num_experts - first)
    if bonus == 0.0:
        return logits
    return narrowed(raised(widened(logits), resident_bits(snapshot_at, first), bonus))


@inlined
def _bound_of_k(logits_at: int, num_experts: int, bonus: float, snapshot_at: int, k: int) -> float:
    """A score, rounded to float32, that at least k experts reach, and hardly more."""
    maxima = narrowed(same(-math.inf))
    for first in range(0, num_experts, WIDTH):
        maxima = larger(maxima, _group(logits_at, first, num_experts, bonus, snapshot_at))
    return max(LOWEST, kth_largest(maxima, k))


@inner
def _order_by_insertion(scores_at: int, ids_at: int, count: int, chosen_at: int, k: int) -> None:
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
def _select_of_few(
    logits_at: int, num_experts: int, bonus: float, snapshot_at: int, scores_at: int, chosen_at: int
) -> int:
    """`select_top_k` of at most sixteen experts: all of them are put in order."""
    logits = load_logits(logits_at, num_experts)
    if bonus == 0.0:
        store_logits(logits, scores_at)
        for expert in range(num_experts):
            put_id(chosen_at + count_before(logits, logit_at(scores_at + expert * 4), expert) * ID, expert)
    else:
        scores = raised(widened(logits), resident_bits(snapshot_at, 0), bonus)
        store_scores(scores, scores_at)
        for expert in range(num_experts):
            put_id(chosen_at + count_before(scores, score_at(scores_at + expert * WORD), expert) * ID, expert)
    return count_bits(at_least(logits, LOWEST))


@inlined
def select_top_k(
    logits_at: int, num_experts: int, bonus: float, snapshot_at: int, scores_at: int, ids_at: int, chosen_at: int,
    k: int,
) -> int:  # fmt: skip
    """The k best finite logits of one token, `bonus` added to resident experts, best first.

    Ties go to the lower id (INV-6). Experts whose logit is not finite are passed over.

    Parameters
    ----------
    logits_at : int
        Address of float32 [E].
    snapshot_at : int
        Address of int64 [⌈E/64⌉], residency.
    scores_at, ids_at : int
        Addresses of scratch space: float64 and int32, `scratch_length` of each.
    chosen_at : int
        Address of int32, as many again: the k experts are written, then rubbish.

    Returns
    -------
    int
        How many finite logits there were; entries from that rank on mean nothing.
    """
    if num_experts <= WIDTH:
        return _select_of_few(logits_at, num_experts, bonus, snapshot_at, scores_at, chosen_at)
    # Rounding a score to float32 keeps its order, or makes it tie: so whoever is under the bound has k above it.
    bound = _bound_of_k(logits_at, num_experts, bonus, snapshot_at, k) if k <= WIDTH else LOWEST
    finite = count = 0
    for block in range(0, num_experts, 64):
        bits = 0
        for first in range(block, min(block + 64, num_experts), WIDTH):
            group = _group(logits_at, first, num_experts, bonus, snapshot_at)
            finite += count_bits(at_least(group, LOWEST))
            bits |= at_least(group, bound) << (first - block)
        while bits != 0:
            expert = block + lowest_bit(bits)
            bits &= bits - 1
            put_id(ids_at + count * ID, expert)
            raise_by = bonus * bit_at(snapshot_at, expert)
            put_score(scores_at + count * WORD, logit_at(logits_at + expert * 4) + raise_by)
            count += 1
    if count > WIDTH:
        _order_by_insertion(scores_at, ids_at, count, chosen_at, k)
        return finite
    store_scores(same(-math.inf), scores_at + count * WORD)  # what is beyond the last one is before none
    candidates = load_scores(scores_at)
    if bonus == 0.0:
        logits = narrowed(candidates)
        for i in range(count):
            rank = count_before(logits, score_at(scores_at + i * WORD), i)
            put_id(chosen_at + rank * ID, id_at(ids_at + i * ID))
    else:
        for i in range(count):
            rank = count_before(candidates, score_at(scores_at + i * WORD), i)
            put_id(chosen_at + rank * ID, id_at(ids_at + i * ID))
    return finite
