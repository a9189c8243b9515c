"""Weights of the chosen experts: softmax of the unmodified logits."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shmroute.routing.selection import is_finite
from shmroute.shared.kernel import inner


@inner
def softmax_weights(
    logits: npt.NDArray[np.float32],
    first: int,
    num_experts: int,
    ids: npt.NDArray[np.int64],
    k: int,
    renormalize: bool,
    weights: npt.NDArray[np.float32],
    out: int,
) -> None:
    """Softmax weights of k experts of one token.

    With `renormalize` they sum to 1 (softmax over the chosen logits, as in Mixtral); without, they are the experts'
    shares of the softmax over all finite logits (as in OLMoE).

    Parameters
    ----------
    logits : ndarray
        float32; the token's begin at `first`.
    ids : ndarray
        int64 [k], the chosen experts.
    weights : ndarray
        float32; the token's are written from index `out`.
    """
    # Any upper bound of the logits that are summed keeps exp from overflowing; the largest one keeps it exact.
    peak = -math.inf
    if renormalize:
        for rank in range(k):
            peak = max(peak, float(logits[first + ids[rank]]))
    else:
        for expert in range(num_experts):
            value = float(logits[first + expert])
            if is_finite(value):
                peak = max(peak, value)
    total = 0.0
    if renormalize:
        for rank in range(k):
            total += math.exp(float(logits[first + ids[rank]]) - peak)
    else:
        for expert in range(num_experts):
            value = float(logits[first + expert])
            if is_finite(value):
                total += math.exp(value - peak)
    for rank in range(k):
        weights[out + rank] = math.exp(float(logits[first + ids[rank]]) - peak) / total
