"""Which tokens chose each expert: a batch's choices, sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.affinity import checked_ids
from shmroute.shared.kernel import kernel

# Rows of `group_pairs`'s groups.
_IDS, _ENDS, _COUNTS = 0, 1, 2

Ints = npt.NDArray[np.int64]


@kernel(types.int64(types.int64[::1], types.int64, types.int64[:, ::1], types.int64[:, ::1]))
def group_pairs(choices: Ints, top_k: int, groups: Ints, pairs: Ints) -> int:
    """Sort the (token, rank) pairs of a batch by expert, experts in order of first appearance.

    Parameters
    ----------
    choices : ndarray
        int64 [T × k], token after token.
    top_k : int
    groups : ndarray
        int64 [3, E], written: the experts that appear, where the pairs of each end, and rubbish.
    pairs : ndarray
        int64 [2, T × k], written: tokens (ascending for each expert) and ranks.

    Returns
    -------
    int
        How many experts appear; -1 if an id is not one of an expert.
    """
    num_experts = groups.shape[1]
    for expert in range(num_experts):
        groups[_COUNTS, expert] = 0
    found = 0
    for i in range(choices.shape[0]):
        expert = choices[i]
        if expert < 0 or expert >= num_experts:
            return -1
        if groups[_COUNTS, expert] == 0:
            groups[_IDS, found] = expert
            found += 1
        groups[_COUNTS, expert] += 1
    end = 0
    for group in range(found):
        expert = groups[_IDS, group]
        begin = end
        end += groups[_COUNTS, expert]
        groups[_ENDS, group] = end
        groups[_COUNTS, expert] = begin  # from here on, where its next pair goes
    token = rank = 0
    for i in range(choices.shape[0]):
        place = groups[_COUNTS, choices[i]]
        pairs[0, place], pairs[1, place] = token, rank
        groups[_COUNTS, choices[i]] = place + 1
        rank += 1
        if rank == top_k:
            token, rank = token + 1, 0
    return found


def group_by_expert(
    choices: npt.NDArray[np.integer] | Sequence[int], num_experts: int
) -> tuple[Ints, dict[int, tuple[Ints, Ints]]]:
    """Which tokens chose each expert.

    Parameters
    ----------
    choices : ndarray of int, or sequence of int
        [k] or [T, k].
    num_experts : int

    Returns
    -------
    ids : ndarray
        int64: the experts that appear, each once, in order of first appearance.
    groups : dict
        expert -> (rows ascending, ranks), int64 of equal length; in the same order.

    Raises
    ------
    ValueError
        If the shape is another, or an id is impossible.
    """
    given = np.asarray(choices)
    if given.ndim not in {1, 2}:
        raise ValueError(f"experts must be [k] or [T, k], not {list(given.shape)}")
    if given.size == 0 or given.dtype.kind not in "iu":
        given = checked_ids(given, num_experts)
    flat = given.astype(np.int64).ravel()
    groups, pairs = np.empty((3, num_experts), np.int64), np.empty((2, len(flat)), np.int64)
    found = group_pairs(flat, given.shape[-1], groups, pairs)
    if found < 0:
        checked_ids(given, num_experts)
    ids, rows, ranks = groups[_IDS, :found], pairs[0], pairs[1]
    by_expert, begin = {}, 0
    for expert, end in zip(ids.tolist(), groups[_ENDS, :found].tolist(), strict=True):
        by_expert[expert] = rows[begin:end], ranks[begin:end]
        begin = end
    return ids, by_expert
