"""Routing rules: how a model chooses experts, and how residency is let into that choice.

Every expert has a *choosing score*: its logit, or for sigmoid scoring its sigmoid plus the layer's correction bias; but
-inf if the logit is not finite, or the expert is in a group that the model does not admit for the token. A token's
*own* experts are the k best by that score. A rule of the cache may replace some of them by resident experts; it never
touches the weights, which follow from the model's scores of whatever was chosen.

| rule | who is chosen | strength |
|---|---|---|
| absolute | the k best by score, plus strength for a resident expert | in units of the score |
| cache-prior | the same, with strength × spread, for resident ones and the own best J | λ, a share of the spread |
| max-rank | the own best J, then resident ones of the best M, then the rest by score | how far from k (0) to M (1) |
| cumulative-threshold | likewise, the best M being the least set of best experts that reaches it | a probability |
| probability | the k best by probability, plus strength for a resident expert | a probability |

The second to the fourth are those of Skliar et al., *Mixture of Cache-Conditional Experts for Efficient Mobile Device
Inference* (arXiv 2412.00099). At strength 0, and for a token whose own experts are all resident, each chooses the own
experts. A strength above 1 is 1 where it says how far M goes, and reaches every expert where it is a probability. The
spread is a mean over tokens, see `shmroute.routing.spread`.

*Two tiers.* A worker with a cache in its GPU (`shmroute.device_tier`) has experts that are nearer than those in host
memory. Then "resident" means in either, and the strength counts whole for an expert in the GPU, and in the share
`RouterConfig.host_share` for one in host memory only: of the bonus, or of how far M goes. (The last two rules of the
paper go on replacing those of the own experts that are in neither.) Without a GPU it counts whole for all residents.

Softmax scores, one group, no scaling and the absolute rule are not here but in `shmroute.routing.route`, which does
them with one selection per token, unless there is a GPU; a token here has one for its own experts, and another if they
are not all resident, or not all in the GPU.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shmroute.routing import codes
from shmroute.routing import plan_words as p
from shmroute.routing.scoring import sigmoid_weights, softmax_weights
from shmroute.routing.selection import (
    ID,
    LOWEST,
    bit_at,
    choose_top_k,
    count_after,
    count_before_by_logit,
    count_resident,
    order_by_insertion,
    select_raised,
)
from shmroute.routing.shares import fill_shares, lost_mass, mass_before
from shmroute.routing.spread import spread_of
from shmroute.routing.vectors import (
    WIDTH,
    at_least,
    id_at,
    larger,
    largest,
    load_logits,
    logistic,
    logit_at,
    narrowed,
    plus,
    put_id,
    put_score,
    put_word,
    replaced,
    same,
    smaller,
    store_logits,
    widened,
    word_at,
)
from shmroute.shared.atomic import WORD, f32_array, f64_array, load
from shmroute.shared.bits import count_bits
from shmroute.shared.kernel import inner

# ------------------------------------------------------------------ choosing scores


@inner
def _group_score(scores_at: int, first: int, end: int, rule: int) -> float:
    """The largest choosing score of the experts from `first` to `end`, or the sum of the two largest."""
    best = narrowed(same(-math.inf))
    second = narrowed(same(-math.inf))
    for start in range(first, end, WIDTH):
        scores = load_logits(scores_at + start * 4, end - start)
        second = larger(second, smaller(best, scores))
        best = larger(best, scores)
    top = largest(widened(best))
    if rule == codes.GROUP_MAX:
        return top
    holders = at_least(best, top)
    if count_bits(holders) > 1:
        return top + top
    others = larger(second, replaced(best, holders, -math.inf))
    return top + largest(widened(others))


@inner
def _leave_out_groups(words: npt.NDArray[np.int64], scores_at: int) -> None:
    """-inf for every expert outside the groups that are best for this token; ties go to the lower group."""
    groups, size = words[p.N_GROUP], words[p.NUM_EXPERTS] // words[p.N_GROUP]
    group_scores = f32_array(words[p.GROUPS], groups)
    for group in range(groups):
        group_scores[group] = _group_score(scores_at, group * size, (group + 1) * size, words[p.GROUP_SCORE])
        put_word(words[p.QUEUED] + group * WORD, 0)  # whether it is admitted; the requests come later
    admitted = min(
        words[p.TOPK_GROUP],
        choose_top_k(
            words[p.GROUPS], groups, words[p.SCORES], words[p.CANDIDATES], words[p.FOUND], words[p.TOPK_GROUP]
        ),
    )
    for rank in range(admitted):
        put_word(words[p.QUEUED] + id_at(words[p.FOUND] + rank * ID) * WORD, 1)
    scores = f32_array(scores_at, words[p.NUM_EXPERTS])
    for group in range(groups):
        if word_at(words[p.QUEUED] + group * WORD) == 0:
            for expert in range(group * size, (group + 1) * size):
                scores[expert] = -math.inf


@inner
def _choosing_scores(words: npt.NDArray[np.int64], row_at: int) -> int:
    """Address of float32 [E], a token's choosing scores."""
    num_experts, scores_at, bias_at = words[p.NUM_EXPERTS], words[p.CHOOSING], words[p.CORRECTION_BIAS]
    grouped = words[p.TOPK_GROUP] < words[p.N_GROUP]
    sigmoid = words[p.SCORING] == codes.SIGMOID
    if not sigmoid and not grouped:
        return row_at
    for first in range(0, num_experts, WIDTH):
        scores = load_logits(row_at + first * 4, num_experts - first)
        if sigmoid:
            scores = plus(logistic(scores), load_logits(bias_at + first * 4, num_experts - first))
        store_logits(scores, scores_at + first * 4)
    if grouped:
        _leave_out_groups(words, scores_at)
    return int(scores_at)


@inner
def _count_finite(row_at: int, num_experts: int) -> int:
    """How many logits are finite."""
    finite = 0
    for first in range(0, num_experts, WIDTH):
        finite += count_bits(at_least(load_logits(row_at + first * 4, num_experts - first), LOWEST))
    return finite


# ------------------------------------------------------------------ the rules


@inner
def take_nearest(words: npt.NDArray[np.int64]) -> None:
    """Begin a call of a worker with a GPU: take the snapshot of what is there, which is resident like the rest."""
    for i in range((words[p.NUM_EXPERTS] + 63) >> 6):
        near = load(words[p.DEVICE] + i * WORD)
        put_word(words[p.NEAREST] + i * WORD, near)
        put_word(words[p.SNAPSHOT] + i * WORD, word_at(words[p.SNAPSHOT] + i * WORD) | near)


@inner
def _host_share(words: npt.NDArray[np.int64]) -> float:
    """What share of the strength counts for residents that are not in the GPU."""
    return float(f64_array(words[p.PARAMETERS], p.PARAMETER_COUNT)[p.HOST_SHARE])


@inner
def _best_of_two_tiers(words: npt.NDArray[np.int64], scores_at: int, amount: float, preferred_at: int) -> None:
    """`_best_raised` with a GPU. One score at a time: next to fetching logits from there it is nothing."""
    in_host = amount * _host_share(words)
    count = 0
    for expert in range(words[p.NUM_EXPERTS]):
        score = logit_at(scores_at + expert * 4)
        if not abs(score) <= -LOWEST:
            continue
        if bit_at(preferred_at, expert) == 1:
            score += amount
        elif bit_at(words[p.SNAPSHOT], expert) == 1:
            score += in_host
        put_score(words[p.SCORES] + count * WORD, score)
        put_id(words[p.CANDIDATES] + count * ID, expert)
        count += 1
    order_by_insertion(words[p.SCORES], words[p.CANDIDATES], count, words[p.CHOSEN], words[p.TOP_K])


@inner
def _best_raised(words: npt.NDArray[np.int64], scores_at: int, amount: float, preferred_at: int) -> None:
    """Choose by score plus `amount` for those whose bit is set in a bitmap; with a GPU, a share for other residents."""
    if words[p.DEVICE] != 0:
        _best_of_two_tiers(words, scores_at, amount, preferred_at)
        return
    select_raised(
        scores_at, words[p.NUM_EXPERTS], amount, preferred_at, words[p.SCORES], words[p.CANDIDATES], words[p.CHOSEN],
        words[p.TOP_K],
    )  # fmt: skip


@inner
def _cache_prior(words: npt.NDArray[np.int64], scores_at: int, amount: float) -> None:
    """Raise resident experts and the own best J."""
    preferred_at, own_at = words[p.PREFERRED], words[p.OWN]
    for i in range((words[p.NUM_EXPERTS] + 63) >> 6):
        put_word(preferred_at + i * WORD, word_at(words[p.NEAREST] + i * WORD))
    for rank in range(words[p.TOP_J]):
        expert = id_at(own_at + rank * ID)
        word = preferred_at + (expert >> 6) * WORD
        put_word(word, word_at(word) | (1 << (expert & 63)))
    _best_raised(words, scores_at, amount, preferred_at)


@inner
def _by_probability(words: npt.NDArray[np.int64], row_at: int, scores_at: int, strength: float) -> None:
    """Choose by probability; sigmoid scores are probabilities as they are."""
    if words[p.SCORING] == codes.SIGMOID:
        _best_raised(words, scores_at, strength, words[p.NEAREST])
        return
    num_experts, shares_at = words[p.NUM_EXPERTS], words[p.SHARES]
    total = fill_shares(words, row_at)
    for first in range(0, num_experts, WIDTH):
        count = num_experts - first
        admitted = at_least(load_logits(scores_at + first * 4, count), LOWEST)
        shares = load_logits(shares_at + first * 4, count)
        store_logits(replaced(shares, ~admitted, -math.inf), shares_at + first * 4)
    _best_raised(words, shares_at, strength * total, words[p.NEAREST])


@inner
def _within(words: npt.NDArray[np.int64], scores_at: int, expert: int, strength: float, total: float) -> bool:
    """Whether an expert is one of the best M, or of those whose probability is needed to reach the threshold."""
    num_experts, k = words[p.NUM_EXPERTS], words[p.TOP_K]
    if words[p.RULE] == codes.MAX_RANK:
        limit = k + int(min(strength, 1.0) * (words[p.MAX_RANK] - k) + 0.5)
        return bool(count_before_by_logit(scores_at, num_experts, expert) < limit)
    return bool(mass_before(words, scores_at, expert) < strength * total)


@inner
def _leave_out_far(words: npt.NDArray[np.int64], scores_at: int, strength: float, total: float) -> None:
    """Clear the bits at PREFERRED of experts that are not in the GPU and that a strength does not reach."""
    for expert in range(words[p.NUM_EXPERTS]):
        if bit_at(words[p.PREFERRED], expert) == 0 or bit_at(words[p.NEAREST], expert) == 1:
            continue
        if not _within(words, scores_at, expert, strength, total):
            word = words[p.PREFERRED] + (expert >> 6) * WORD
            put_word(word, word_at(word) & ~(1 << (expert & 63)))


@inner
def _best_resident(words: npt.NDArray[np.int64], scores_at: int, count: int, strength: float, total: float) -> int:
    """Find the `count` best resident experts that are not among the own; how many there are.

    Those that are not in the GPU only if the host's share of the strength reaches them.
    """
    num_experts, k, own_at, preferred_at = words[p.NUM_EXPERTS], words[p.TOP_K], words[p.OWN], words[p.PREFERRED]
    for i in range((num_experts + 63) >> 6):
        put_word(preferred_at + i * WORD, word_at(words[p.SNAPSHOT] + i * WORD))
    for rank in range(k):
        expert = id_at(own_at + rank * ID)
        word = preferred_at + (expert >> 6) * WORD
        put_word(word, word_at(word) & ~(1 << (expert & 63)))
    if words[p.DEVICE] != 0:
        _leave_out_far(words, scores_at, strength * _host_share(words), total)
    others_at = words[p.OTHERS]
    for first in range(0, num_experts, WIDTH):
        scores = load_logits(scores_at + first * 4, num_experts - first)
        preferred = word_at(preferred_at + (first >> 6) * WORD) >> (first & 63)
        store_logits(replaced(scores, ~preferred, -math.inf), others_at + first * 4)
    found = choose_top_k(others_at, num_experts, words[p.SCORES], words[p.CANDIDATES], words[p.FOUND], count)
    return min(found, count)


@inner
def _admit_resident(words: npt.NDArray[np.int64], row_at: int, scores_at: int, strength: float) -> None:
    """Put the best resident experts of the best M in the place of the last missing ones of the own, behind the best J.

    What is admitted comes after the own experts that stay: it is behind all of them by score.
    """
    k, own_at, chosen_at, top_j = words[p.TOP_K], words[p.OWN], words[p.CHOSEN], words[p.TOP_J]
    replaceable = 0
    for rank in range(top_j, k):
        replaceable += 1 - bit_at(words[p.SNAPSHOT], id_at(own_at + rank * ID))
    if replaceable == 0:
        return
    total = fill_shares(words, row_at) if words[p.RULE] == codes.CUMULATIVE_THRESHOLD else 0.0
    available = _best_resident(words, scores_at, replaceable, strength, total)
    if available == 0:
        return
    admitted = 0
    while admitted < available and _within(words, scores_at, id_at(words[p.FOUND] + admitted * ID), strength, total):
        admitted += 1
    staying = replaceable - admitted  # of the missing ones
    count = missing = 0
    for rank in range(k):
        expert = id_at(own_at + rank * ID)
        if rank >= top_j and bit_at(words[p.SNAPSHOT], expert) == 0:
            missing += 1
            if missing > staying:
                continue
        put_id(chosen_at + count * ID, expert)
        count += 1
    for i in range(admitted):
        put_id(chosen_at + (count + i) * ID, id_at(words[p.FOUND] + i * ID))


@inner
def _apply_rule(words: npt.NDArray[np.int64], row_at: int, scores_at: int, strength: float, spread: float) -> None:
    """Choose a token's experts, some of whose own are missing, with the cache in mind."""
    rule = words[p.RULE]
    if rule == codes.ABSOLUTE:
        _best_raised(words, scores_at, strength, words[p.NEAREST])
    elif rule == codes.CACHE_PRIOR:
        _cache_prior(words, scores_at, strength * spread)
    elif rule == codes.PROBABILITY:
        _by_probability(words, row_at, scores_at, strength)
    else:
        _admit_resident(words, row_at, scores_at, strength)


# ------------------------------------------------------------------ one token


@inner
def choose_by_rule(words: npt.NDArray[np.int64], row_at: int, strength: float, spread: float) -> int:
    """Choose one token's experts, best first as its rule has it, into the plan's CHOSEN.

    Changed choices and what they lost are added to the plan's CHANGED and LOST_MASS, logits that are not finite to
    NOT_FINITE_LOGITS, its spread, if the rule wants it, to SPREAD_SUM.

    Parameters
    ----------
    row_at : int
        Address of float32 [E], its logits.
    strength, spread : float
        Those of the call; a strength of 0 keeps the cache out.

    Returns
    -------
    int
        How many experts could have been chosen. If they are fewer than k, nothing was.
    """
    num_experts, k, own_at, chosen_at = words[p.NUM_EXPERTS], words[p.TOP_K], words[p.OWN], words[p.CHOSEN]
    scores_at = _choosing_scores(words, row_at)
    choosable = choose_top_k(scores_at, num_experts, words[p.SCORES], words[p.CANDIDATES], own_at, k)
    if choosable < k:
        return choosable
    words[p.NOT_FINITE_LOGITS] += num_experts - _count_finite(row_at, num_experts)
    if words[p.RULE] == codes.CACHE_PRIOR:
        parameters = f64_array(words[p.PARAMETERS], p.PARAMETER_COUNT)
        parameters[p.SPREAD_SUM] += spread_of(scores_at, num_experts)
    for rank in range(k):
        put_id(chosen_at + rank * ID, id_at(own_at + rank * ID))
    if strength == 0.0 or count_resident(words[p.NEAREST], own_at, k) == k:
        return choosable
    _apply_rule(words, row_at, scores_at, strength, spread)
    replaced_experts = count_after(scores_at, chosen_at, k, id_at(own_at + (k - 1) * ID))
    if replaced_experts > 0:
        words[p.CHANGED] += replaced_experts
        words[p.LOST_MASS] += lost_mass(words, row_at)
    return choosable


@inner
def model_weights(words: npt.NDArray[np.int64], row_at: int, ids_at: int, weights_at: int) -> None:
    """Weights of one token's experts by the model's scoring, float32 [k] at `weights_at`."""
    num_experts, k, renormalize = words[p.NUM_EXPERTS], words[p.TOP_K], words[p.RENORMALIZE] == 1
    scaling = f64_array(words[p.PARAMETERS], p.PARAMETER_COUNT)[p.SCALING]
    if words[p.SCORING] == codes.SIGMOID:
        sigmoid_weights(row_at, num_experts, ids_at, k, renormalize, scaling, weights_at)
        return
    softmax_weights(row_at, num_experts, ids_at, k, renormalize, weights_at)
    if scaling != 1.0:
        weights = f32_array(weights_at, k)
        for rank in range(k):
            weights[rank] = weights[rank] * scaling
