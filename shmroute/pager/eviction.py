"""Which resident expert to give up: the one of lowest current affinity that nobody reads or waits for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.affinity import age_of, decay_power, score_of
from shmroute.shared.atomic import WORD, f64_array, i64_array, load
from shmroute.shared.kernel import kernel
from shmroute.shared.layout import LINE
from shmroute.shared.segment import Segment
from shmroute.shared.words import LOW32, RESIDENT, pack_expert

NEVER = -1
"""`loaded_at` of a slot whose expert was loaded by a former pager."""

# Words of the table that `find_victim` reads: int64, private to the pager.
_OWNERS, _SLOTS, _LOADED_AT, _EXPERTS, _AFFINITY, _CLOCK, _ROW_BYTES, _NUM_EXPERTS, _POWERS, _SCORE = range(10)
_TABLE_WORDS = 10


@kernel(types.int64(types.int64, types.int64, types.int64, types.float64))
def find_victim(table: int, awaited: int, awaited_count: int, boost: float) -> int:
    """The slot to evict, or -1; its score is written where the table says.

    A load counts as an activation here, so that a prefetched expert is not the first to go before it could be used.
    Equal scores: the expert that was true longer ago goes first.
    """
    words = i64_array(table, _TABLE_WORDS)
    owners = i64_array(words[_OWNERS], words[_SLOTS])
    loaded_at = i64_array(words[_LOADED_AT], words[_SLOTS])
    waiting = i64_array(awaited, awaited_count)
    best, best_score, best_age = -1, 1e300, 0
    for slot in range(words[_SLOTS]):
        key = owners[slot]
        if key < 0:
            continue
        layer, expert = key // words[_NUM_EXPERTS], key % words[_NUM_EXPERTS]
        offset = layer * words[_ROW_BYTES] + expert * WORD
        word = load(words[_EXPERTS] + offset)
        if word != pack_expert(RESIDENT, 0, slot, 0):
            continue  # leased, elsewhere, or damaged: `evict` would fail, again and again
        wanted = False
        for i in range(awaited_count):
            wanted |= waiting[i] == key
        if wanted:
            continue
        affinity = load(words[_AFFINITY] + offset)
        clock = load(words[_CLOCK] + layer * LINE)
        age = age_of(affinity, clock)
        score = score_of(affinity) * decay_power(words[_POWERS], age)
        if loaded_at[slot] != NEVER:
            score = max(score, boost * decay_power(words[_POWERS], (clock - loaded_at[slot]) & LOW32))
        if score < best_score or (score == best_score and age > best_age):
            best, best_score, best_age = slot, score, age
    f64_array(words[_SCORE], 1)[0] = best_score
    return best


class Eviction:
    """The eviction policy of one pager, and the tables that it looks at.

    Parameters
    ----------
    segment : Segment
    powers : ndarray
        The affinity's power table.

    Attributes
    ----------
    owners : ndarray
        int64 [slots]: ``layer * num_experts + expert`` in each slot, -1 if none.
    """

    def __init__(self, segment: Segment, powers: npt.NDArray[np.float64]) -> None:
        config, layout, base = segment.config, segment.layout, segment.address
        self._segment = segment
        self._powers = powers
        self.owners = np.full(config.slots, -1, np.int64)
        self._loaded_at = np.full(config.slots, NEVER, np.int64)
        self._score = np.zeros(1, np.float64)
        self._boost = min(config.affinity.activation_boost, config.affinity.max_score)
        self._table = np.zeros(_TABLE_WORDS, np.int64)
        self._table[:] = (
            self.owners.ctypes.data, config.slots, self._loaded_at.ctypes.data, base + layout.experts,
            base + layout.affinity, base + layout.clock, layout.row_bytes, config.num_experts,
            powers.ctypes.data, self._score.ctypes.data,
        )  # fmt: skip

    def loaded(self, slot: int, key: int) -> None:
        """Note that a slot has a new expert, as of its layer's present tick."""
        self.owners[slot] = key
        layer = key // self._segment.config.num_experts
        self._loaded_at[slot] = self._segment.read(self._segment.layout.clock + layer * LINE)

    def emptied(self, slot: int) -> None:
        """Note that a slot holds nothing."""
        self.owners[slot] = -1
        self._loaded_at[slot] = NEVER

    def victim(self, awaited: npt.NDArray[np.int64]) -> tuple[int, float] | None:
        """The (slot, score) to evict first, or None if every slot is leased, awaited or loading.

        Parameters
        ----------
        awaited : ndarray
            int64 keys that workers wait for.
        """
        slot = int(find_victim(self._table.ctypes.data, awaited.ctypes.data, len(awaited), self._boost))
        return None if slot < 0 else (slot, float(self._score[0]))
