"""`Eviction`: the policy of one pager, the arrays of what it has learnt, and its kernels as the pager calls them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shmroute.pager.eviction import names
from shmroute.pager.eviction import table as t
from shmroute.pager.eviction.history import begin, observe
from shmroute.pager.eviction.next_token import MOST_PAIRS, NO_TOKEN
from shmroute.pager.eviction.next_use import LAST_TOKEN_GAIN, TOKEN_BEFORE_GAIN, rank_factor
from shmroute.pager.eviction.victims import loaded, victim_of
from shmroute.shared.tables import Tables


class Eviction:
    """The eviction policy of one pager, and what it has learnt.

    Parameters
    ----------
    tables : Tables
        A segment, or what stands for one.
    powers : ndarray
        The affinity's power table.

    Attributes
    ----------
    owners : ndarray
        int64 [slots]: the key ``layer * num_experts + expert`` in each slot, -1 if none.
    table : int
        Address of the table's words.
    """

    def __init__(self, tables: Tables, powers: npt.NDArray[np.float64]) -> None:
        config, layout, base = tables.config, tables.layout, tables.address
        layers, experts, lanes = config.num_layers, config.num_experts, config.max_workers
        self._powers = powers
        self._placed: dict[int, npt.NDArray[np.int64] | npt.NDArray[np.floating]] = {}
        self._words = words = np.zeros(t.TABLE_WORDS, np.int64)
        self.table = int(words.ctypes.data)
        self.owners = np.full(config.slots, -1, np.int64)
        self._score = np.zeros(1, np.float64)
        boost = min(config.affinity.activation_boost, config.affinity.max_score)
        words[t.EXPERTS : t.CLOCK] = base + layout.experts, base + layout.uses, layout.use_row_bytes
        words[t.CLOCK : t.MAX_WORKERS] = base + layout.clock, base + layout.lanes, layout.lane_bytes
        words[t.MAX_WORKERS : t.NUM_LAYERS] = lanes, layout.row_bytes
        words[t.NUM_LAYERS : t.POWERS] = layers, experts
        words[t.POWERS] = powers.ctypes.data
        words[t.POLICY] = names.POLICIES[config.pager.eviction]
        words[t.SLOTS], words[t.OWNERS] = config.slots, self.owners.ctypes.data
        words[t.SCORE] = self._score.ctypes.data
        words[t.RESIDENT], words[t.RESIDENT_ROW_BYTES] = base + layout.resident, layout.resident_row_bytes
        words[t.WORKERS] = 1
        for word, count, initial in (
            (t.SEEN_TOTAL, layers * experts, 0),
            (t.LAST_USED, layers * experts, 0),
            (t.LOADED_AT, layers * experts, t.NEVER),
            (t.SEEN_CLOCK, layers, 0),
            (t.AHEAD, layers, layers),
            (t.CHANGED, layers, t.OUTDATED),
            (t.CANDIDATE, layers, -1),
            (t.TIE, layers, 0),
            (t.SEEN_CURSOR, lanes, t.NEVER),
            (t.MOVED_AT, lanes, t.NEVER),
        ):
            self._place(word, np.full(count, initial, np.int64))
        for word, count in ((t.FAST, layers * experts), (t.SLOW, layers * experts), (t.WORTH, layers)):
            self._place(word, np.zeros(count, np.float64))
        if layers * experts * experts <= MOST_PAIRS:
            self._place(t.FOLLOWED_BY, np.zeros(layers * experts * experts, np.float32))
        self._place(t.RAISED_BY, np.zeros(lanes * layers * experts, np.float32))
        for word in (t.FOLLOWED, t.RAISED):
            self._place(word, np.zeros(layers * experts, np.float64))
        words[t.TOP_K] = config.top_k
        for word, count in (
            (t.LAST_TOKENS, lanes * layers * (1 + config.top_k)),
            (t.PASSES, layers),
            (t.PASSED_BY, layers),
            (t.KNOWN, lanes),
        ):
            self._place(word, np.zeros(count, np.int64))
        self._place(t.NEW_TOKENS, np.full(layers * (1 + config.top_k), NO_TOKEN, np.int64))
        factors = rank_factor(LAST_TOKEN_GAIN, 1), rank_factor(TOKEN_BEFORE_GAIN, 1)
        self._place(t.NUMBERS, np.array([boost, config.top_k / experts, *factors]))
        self._clocks = self._placed[t.SEEN_CLOCK].astype(np.int64, copy=False)
        begin(self.table)

    def _place(self, word: int, array: npt.NDArray[np.int64] | npt.NDArray[np.floating]) -> None:
        self._placed[word] = array
        self._words[word] = array.ctypes.data

    def observe(self) -> None:
        """Take in what the workers published since the last call."""
        observe(self.table)

    def shares(self, key: int) -> tuple[float, float]:
        """An expert's shares of the latest tokens and of many."""
        return float(self._placed[t.FAST][key]), float(self._placed[t.SLOW][key])

    def distances(self) -> npt.NDArray[np.int64]:
        """int64 [layers]: layers until some worker comes to each."""
        return self._placed[t.AHEAD].astype(np.int64)

    def clocks(self) -> npt.NDArray[np.int64]:
        """int64 [layers]: each layer's clock as it was last observed; not a copy."""
        return self._clocks

    def total(self, key: int) -> int:
        """An expert's activations as they were last observed."""
        return int(self._placed[t.SEEN_TOTAL][key])

    @property
    def observations(self) -> int:
        """How often `observe` has found something new."""
        return int(self._words[t.OBSERVATION])

    @property
    def workers(self) -> int:
        """Workers under way, at least 1."""
        return int(self._words[t.WORKERS])

    def loaded(self, slot: int, key: int) -> None:
        """Note that a slot has a new expert, as of its layer's present tick."""
        self.owners[slot] = key
        loaded(self.table, key)

    def emptied(self, slot: int) -> None:
        """Note that a slot holds nothing."""
        self.owners[slot] = -1

    def victim(self, awaited: npt.NDArray[np.int64]) -> tuple[int, float] | None:
        """The (key, affinity) of the expert to evict first, or None if every one is leased, awaited or loading.

        Parameters
        ----------
        awaited : ndarray
            int64 keys that workers wait for.
        """
        key = int(victim_of(self.table, awaited, False))
        return None if key < 0 else (key, float(self._score[0]))

    def evict(self, awaited: npt.NDArray[np.int64]) -> tuple[int, int] | None:
        """Evict what `victim` names: its key and the slot that it leaves, or None if there is none."""
        key = int(victim_of(self.table, awaited, True))
        if key < 0:
            return None
        slot = int(self._words[t.VACATED])
        self.emptied(slot)
        return key, slot
