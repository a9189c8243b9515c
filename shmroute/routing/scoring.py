"""Weights of the chosen experts: softmax of the unmodified logits."""

from __future__ import annotations

import math

from shmroute.routing.selection import ID
from shmroute.routing.vectors import (
    WIDTH,
    divided,
    exp_under,
    id_at,
    larger,
    largest,
    load_logits,
    load_scores,
    logit_at,
    plus,
    put_score,
    same,
    store_scores,
    store_weights,
    total,
    widened,
)
from shmroute.shared.atomic import WORD
from shmroute.shared.kernel import inlined, inner


@inner
def _peak_of_row(logits_at: int, num_experts: int) -> float:
    """The largest finite logit."""
    maxima = same(-math.inf)
    for first in range(0, num_experts, WIDTH):
        maxima = larger(maxima, widened(load_logits(logits_at + first * 4, num_experts - first)))
    return largest(maxima)


@inner
def _sum_of_row(logits_at: int, num_experts: int, peak: float) -> float:
    """The sum of ``exp(logit - peak)`` over all finite logits."""
    sums = same(0.0)
    for first in range(0, num_experts, WIDTH):
        sums = plus(sums, exp_under(widened(load_logits(logits_at + first * 4, num_experts - first)), peak))
    return total(sums)


@inner
def _peak_of_chosen(scores_at: int, k: int) -> float:
    """The largest of k logits in scratch space."""
    maxima = same(-math.inf)
    for first in range(0, k, WIDTH):
        maxima = larger(maxima, load_scores(scores_at + first * WORD))
    return largest(maxima)


@inner
def _sum_of_chosen(scores_at: int, k: int, peak: float) -> float:
    """The sum of ``exp(logit - peak)`` over k logits in scratch space."""
    sums = same(0.0)
    for first in range(0, k, WIDTH):
        sums = plus(sums, exp_under(load_scores(scores_at + first * WORD), peak))
    return total(sums)


@inlined
def softmax_weights(
    logits_at: int,
    num_experts: int,
    chosen_at: int,
    k: int,
    renormalize: bool,
    scores_at: int,
    weights_at: int,
) -> None:
    """Softmax weights of k experts of one token.

    With `renormalize` they sum to 1 (softmax over the chosen logits, as in Mixtral); without, they are the experts'
    shares of the softmax over all finite logits (as in OLMoE).

    Parameters
    ----------
    logits_at : int
        Address of float32 [E].
    chosen_at : int
        Address of int32 [k], the chosen experts.
    scores_at : int
        Address of scratch space: float64 [k + WIDTH].
    weights_at : int
        Address of float32 [k], written.
    """
    for rank in range(k):
        put_score(scores_at + rank * WORD, logit_at(logits_at + id_at(chosen_at + rank * ID) * 4))
    store_scores(same(-math.inf), scores_at + k * WORD)
    # Any upper bound of the logits that are summed keeps exp from overflowing; the largest one keeps it exact.
    if k <= WIDTH:
        values = load_scores(scores_at)
        peak = largest(values) if renormalize else _peak_of_row(logits_at, num_experts)
        shares = exp_under(values, peak)
        divisor = total(shares) if renormalize else _sum_of_row(logits_at, num_experts, peak)
        store_weights(divided(shares, divisor), weights_at, k)
        return
    if renormalize:
        peak = _peak_of_chosen(scores_at, k)
        divisor = _sum_of_chosen(scores_at, k, peak)
    else:
        peak = _peak_of_row(logits_at, num_experts)
        divisor = _sum_of_row(logits_at, num_experts, peak)
    for first in range(0, k, WIDTH):
        shares = exp_under(load_scores(scores_at + first * WORD), peak)
        store_weights(divided(shares, divisor), weights_at + first * 4, k - first)
