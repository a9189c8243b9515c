"""Choosing k of E experts by score."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shmroute.shared.kernel import inner


@inner
def is_finite(value: float) -> bool:
    """Neither NaN nor infinite."""
    return value - value == 0.0


@inner
def is_resident(snapshot: npt.NDArray[np.int64], expert: int) -> bool:
    """Whether a bitmap has an expert's bit."""
    return bool((snapshot[expert >> 6] >> (expert & 63)) & 1)


@inner
def select_top_k(
    logits: npt.NDArray[np.float32],
    first: int,
    num_experts: int,
    bonus: float,
    snapshot: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    ids: npt.NDArray[np.int64],
    k: int,
) -> int:
    """The k best finite logits of one token, `bonus` added to resident experts, best first.

    Ties go to the lower id (INV-6). Experts whose logit is not finite are passed over.

    Parameters
    ----------
    logits : ndarray
        float32; the token's begin at `first`.
    snapshot : ndarray
        int64 [⌈E/64⌉], residency.
    scores, ids : ndarray
        float64 and int64 [k], written: the choosing scores and the experts.

    Returns
    -------
    int
        How many finite logits there were; entries from that rank on are not written.
    """
    finite = 0
    filled = 0
    for expert in range(num_experts):
        score = float(logits[first + expert])
        if not is_finite(score):
            continue
        finite += 1
        if bonus != 0.0 and is_resident(snapshot, expert):
            score += bonus
        if filled == k:
            if score <= scores[k - 1]:
                continue
        else:
            filled += 1
        rank = filled - 1
        while rank > 0 and scores[rank - 1] < score:
            scores[rank] = scores[rank - 1]
            ids[rank] = ids[rank - 1]
            rank -= 1
        scores[rank] = score
        ids[rank] = expert
    return finite
