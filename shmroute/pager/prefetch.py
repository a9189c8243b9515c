"""Prefetch by affinity: which absent experts would be worth a slot.

Between demands, the pager looks at the layers that were routed since it last looked, and proposes the absent experts
of highest current affinity. A proposal is a REQUESTED(PREFETCH) word like any other: a demand upgrades it, and it is
cancelled when stale. It takes a free slot, or that of an expert of lower affinity; never another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.affinity import current_score
from shmroute.shared.atomic import WORD, f64_array, i64_array, load
from shmroute.shared.kernel import kernel
from shmroute.shared.layout import LINE, USE_AFFINITY, USE_BYTES
from shmroute.shared.segment import Segment
from shmroute.shared.words import ABSENT, expert_state

LOWEST_WORTH = 1e-3
"""Affinities under this are noise: nobody used the expert of late."""

_EXPERTS, _USES, _CLOCK, _ROW_BYTES, _USE_ROW_BYTES, _NUM_LAYERS, _NUM_EXPERTS, _POWERS, _SEEN = range(9)
_TABLE_WORDS = 9


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64))
def find_candidates(table: int, keys: int, scores: int, count: int) -> int:
    """The absent experts of highest affinity in layers whose clock moved; how many were found.

    Parameters
    ----------
    table : int
        Address of the policy's words.
    keys, scores : int
        Addresses of int64 and float64 [count], written: best first.
    """
    words = i64_array(table, _TABLE_WORDS)
    best, worth = i64_array(keys, count), f64_array(scores, count)
    seen = i64_array(words[_SEEN], words[_NUM_LAYERS])
    found = 0
    for layer in range(words[_NUM_LAYERS]):
        clock_address = words[_CLOCK] + layer * LINE
        clock = load(clock_address)
        if clock == seen[layer]:
            continue
        seen[layer] = clock
        for expert in range(words[_NUM_EXPERTS]):
            offset = layer * words[_ROW_BYTES] + expert * WORD
            if expert_state(load(words[_EXPERTS] + offset)) != ABSENT:
                continue
            use = words[_USES] + layer * words[_USE_ROW_BYTES] + expert * USE_BYTES
            score = current_score(use + USE_AFFINITY, clock_address, words[_POWERS])
            if score < LOWEST_WORTH or (found == count and score <= worth[count - 1]):
                continue
            if found < count:
                found += 1
            rank = found - 1
            while rank > 0 and worth[rank - 1] < score:
                best[rank], worth[rank] = best[rank - 1], worth[rank - 1]
                rank -= 1
            best[rank], worth[rank] = layer * words[_NUM_EXPERTS] + expert, score
    return found


class AffinityPrefetch:
    """The prefetch policy of one pager.

    Parameters
    ----------
    segment : Segment
    powers : ndarray
        The affinity's power table.
    """

    def __init__(self, segment: Segment, powers: npt.NDArray[np.float64]) -> None:
        config, layout, base = segment.config, segment.layout, segment.address
        self.budget = config.pager.prefetch
        self._powers = powers
        self._seen = np.zeros(config.num_layers, np.int64)
        self._keys = np.zeros(max(self.budget, 1), np.int64)
        self._scores = np.zeros(max(self.budget, 1), np.float64)
        self._table = np.zeros(_TABLE_WORDS, np.int64)
        self._table[:] = (
            base + layout.experts, base + layout.uses, base + layout.clock, layout.row_bytes, layout.use_row_bytes,
            config.num_layers, config.num_experts, powers.ctypes.data, self._seen.ctypes.data,
        )  # fmt: skip

    def proposals(self, room: int) -> list[tuple[int, float]]:
        """Up to `room` (key, affinity) worth loading, best first."""
        if room <= 0:
            return []
        count = min(room, self.budget)
        found = find_candidates(self._table.ctypes.data, self._keys.ctypes.data, self._scores.ctypes.data, count)
        return list(zip(self._keys[:found].tolist(), self._scores[:found].tolist(), strict=True))
