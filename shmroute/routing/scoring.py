"""Weights of the chosen experts, from the unmodified logits: their softmax, or their sigmoids; then scaled."""

from __future__ import annotations

import math

from shmroute.routing.selection import ID
from shmroute.routing.vectors import (
    WIDTH,
    Scores,
    divided,
    exp_under,
    id_at,
    larger,
    largest,
    load_logits,
    logistic,
    logit_at,
    logits_of,
    narrowed,
    plus,
    same,
    store_weights,
    total,
    widened,
)
from shmroute.shared.atomic import f32_array
from shmroute.shared.kernel import inlined, inner


@inner
def peak_of_row(logits_at: int, num_experts: int) -> float:
    """The largest finite logit."""
    maxima = narrowed(same(-math.inf))
    for first in range(0, num_experts, WIDTH):
        maxima = larger(maxima, load_logits(logits_at + first * 4, num_experts - first))
    return largest(widened(maxima))


@inner
def _sum_of_row(logits_at: int, num_experts: int, peak: float) -> float:
    """The sum of ``exp(logit - peak)`` over all finite logits, each to 3e-7."""
    sums = same(0.0)
    for first in range(0, num_experts, WIDTH):
        sums = plus(sums, widened(exp_under(load_logits(logits_at + first * 4, num_experts - first), peak)))
    return total(sums)


@inner
def _weights_of_few(logits_at: int, num_experts: int, ids_at: int, k: int, renormalize: bool, weights_at: int) -> None:
    """`softmax_weights` of no more experts than fit into one vector."""
    # Any upper bound of the logits that are summed keeps exp from overflowing; the largest one keeps it exact.
    values = logits_of(logits_at, num_experts, ids_at, k)
    peak = largest(values) if renormalize else peak_of_row(logits_at, num_experts)
    shares = exp_under(values, peak)
    divisor = total(shares) if renormalize else _sum_of_row(logits_at, num_experts, peak)
    store_weights(divided(shares, divisor), weights_at, k)


@inner
def _weights_of_many(logits_at: int, num_experts: int, ids_at: int, k: int, renormalize: bool, weights_at: int) -> None:
    """`softmax_weights` of more experts than fit into one vector."""
    if renormalize:
        maxima = same(-math.inf)
        for first in range(0, k, WIDTH):
            maxima = larger(maxima, logits_of(logits_at, num_experts, ids_at + first * ID, k - first))
        peak = largest(maxima)
        sums = same(0.0)
        for first in range(0, k, WIDTH):
            sums = plus(sums, exp_under(logits_of(logits_at, num_experts, ids_at + first * ID, k - first), peak))
        divisor = total(sums)
    else:
        peak = peak_of_row(logits_at, num_experts)
        divisor = _sum_of_row(logits_at, num_experts, peak)
    for first in range(0, k, WIDTH):
        shares = exp_under(logits_of(logits_at, num_experts, ids_at + first * ID, k - first), peak)
        store_weights(divided(shares, divisor), weights_at + first * 4, k - first)


@inlined
def _weights_of_two(logits_at: int, num_experts: int, ids_at: int, weights_at: int) -> None:
    """`softmax_weights` of two experts that share all: one exponential, and nothing sixteen wide."""
    one, other = id_at(ids_at), id_at(ids_at + ID)
    weights = f32_array(weights_at, 2)
    if min(one, other) < 0 or max(one, other) >= num_experts:
        weights[0] = weights[1] = 0.0
        return
    difference = logit_at(logits_at + other * 4) - logit_at(logits_at + one * 4)
    less = math.exp(-abs(difference))
    greater_share = 1.0 / (1.0 + less)
    lesser_share = less * greater_share
    weights[0] = lesser_share if difference > 0.0 else greater_share
    weights[1] = greater_share if difference > 0.0 else lesser_share


@inlined
def softmax_weights(logits_at: int, num_experts: int, ids_at: int, k: int, renormalize: bool, weights_at: int) -> None:
    """Softmax weights of k experts of one token.

    With `renormalize` they sum to 1 (softmax over the chosen logits, as in Mixtral); without, they are the experts'
    shares of the softmax over all finite logits (as in OLMoE).

    Parameters
    ----------
    logits_at : int
        Address of float32 [E].
    ids_at : int
        Address of int32 [k], the chosen experts; an impossible one gets the weight 0.
    weights_at : int
        Address of float32 [k], written.
    """
    if k == 2 and renormalize:
        _weights_of_two(logits_at, num_experts, ids_at, weights_at)
        return
    if k > WIDTH:
        _weights_of_many(logits_at, num_experts, ids_at, k, renormalize, weights_at)
        return
    _weights_of_few(logits_at, num_experts, ids_at, k, renormalize, weights_at)


@inlined
def _sigmoids_of(logits_at: int, num_experts: int, ids_at: int, count: int) -> Scores:
    """The sigmoids of the first `count` experts' logits; 0 for an impossible one, and beyond."""
    shares: Scores = larger(logistic(logits_of(logits_at, num_experts, ids_at, count)), same(0.0))
    return shares


@inner
def sigmoid_weights(
    logits_at: int, num_experts: int, ids_at: int, k: int, renormalize: bool, scaling: float, weights_at: int
) -> None:
    """Sigmoid weights of k experts of one token, as in DeepSeek-V3, multiplied by `scaling`; as `softmax_weights`.

    With `renormalize` they sum to `scaling`; what is added to the divisor keeps it from being 0.
    """
    sums = same(0.0)
    for first in range(0, k, WIDTH):
        sums = plus(sums, _sigmoids_of(logits_at, num_experts, ids_at + first * ID, k - first))
    divisor = (total(sums) + 1e-20) / scaling if renormalize else 1.0 / scaling
    for first in range(0, k, WIDTH):
        shares = _sigmoids_of(logits_at, num_experts, ids_at + first * ID, k - first)
        store_weights(divided(shares, divisor), weights_at + first * 4, k - first)
