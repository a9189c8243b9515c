"""The resident expert that is worth least, found without looking at all of them each time.

Each layer has a *candidate*: of its experts that can go, the one worth least. Within a layer the order changes only
when the layer's clock moves, an expert of it is loaded or goes, or a lease or a waiter comes or goes; between layers it
also changes as the workers move on, which is a number for each layer. So an eviction compares the layers' candidates,
takes the least, and looks at that one's word again: if it is not RESIDENT without a lease any more, or a worker waits
for it, the layer's candidate is chosen again. So it is, `REFRESHES` times at most, if the layer's clock moved since it
was chosen, and beforehand in as many layers that changed; the others' turn comes at later evictions. Cost: a few passes
over the layers, and over the experts of a few of them.

Hints grow old: a candidate that was passed over for a lease may be free by now. Such layers are looked at again, and
before the answer is "none" every word is.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.pager.eviction import names
from shmroute.pager.eviction import table as t
from shmroute.pager.eviction.affinity import current_affinity
from shmroute.pager.eviction.frequency import (
    decayed_frequency,
    least_frequently_and_recently_used,
    least_frequently_used,
)
from shmroute.pager.eviction.history import begin, note_load, observe
from shmroute.pager.eviction.next_token import MOST_PAIRS, NO_TOKEN, lift_of
from shmroute.pager.eviction.next_use import (
    LAST_TOKEN_GAIN,
    TOKEN_BEFORE_GAIN,
    rank_by_odds,
    rank_factor,
    tokens_until_use,
)
from shmroute.pager.eviction.recency import least_recently_used, least_stale
from shmroute.shared.affinity import age_of
from shmroute.shared.atomic import WORD, f64_array, i64_array, load
from shmroute.shared.experts import evict
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.layout import LINE, USE_AFFINITY, USE_BYTES
from shmroute.shared.tables import Tables
from shmroute.shared.words import LOW32, RESIDENT, expert_slot, pack_expert

REFRESHES: Final = 4
"""Layers of which one eviction chooses the candidate again because something changed there; as many once more if
they come first all the same."""


@inner
def is_awaited(awaited: int, count: int, key: int) -> bool:
    """Whether a worker waits for an expert: a load reaches its waiter before it is evicted."""
    waiting = i64_array(awaited, count)
    found = False
    for i in range(count):
        found |= waiting[i] == key
    return found


@inner
def can_go(table: int, key: int, awaited: int, count: int) -> bool:
    """Whether an expert is RESIDENT in the slot that the pager knows, without a lease, and nobody waits for it."""
    words = i64_array(table, t.TABLE_WORDS)
    layer, expert = key // words[t.NUM_EXPERTS], key % words[t.NUM_EXPERTS]
    word = load(words[t.EXPERTS] + layer * words[t.ROW_BYTES] + expert * WORD)
    slot = expert_slot(word)
    if word != pack_expert(RESIDENT, 0, slot, 0):
        return False  # leased, elsewhere, or damaged: `evict` would fail, again and again
    if slot >= words[t.SLOTS] or i64_array(words[t.OWNERS], words[t.SLOTS])[slot] != key:
        return False
    return not is_awaited(awaited, count, key)


@inner
def affinity_of(table: int, key: int) -> float:
    """An expert's present affinity."""
    words = i64_array(table, t.TABLE_WORDS)
    experts = words[t.NUM_EXPERTS]
    layer = key // experts
    word = load(words[t.USES] + layer * words[t.USE_ROW_BYTES] + key % experts * USE_BYTES + USE_AFFINITY)
    clock = load(words[t.CLOCK] + layer * LINE)  # after the word, as `age_of` demands
    loaded_at = i64_array(words[t.LOADED_AT], words[t.NUM_LAYERS] * experts)[key]
    return current_affinity(word, clock, loaded_at, f64_array(words[t.NUMBERS], 4)[t.BOOST], words[t.POWERS])


@inner
def last_use(table: int, key: int) -> int:
    """Ticks of its layer since an expert was used or loaded."""
    words = i64_array(table, t.TABLE_WORDS)
    experts = words[t.NUM_EXPERTS]
    layer = key // experts
    word = load(words[t.USES] + layer * words[t.USE_ROW_BYTES] + key % experts * USE_BYTES + USE_AFFINITY)
    clock = load(words[t.CLOCK] + layer * LINE)
    age = age_of(word, clock)
    loaded_at = i64_array(words[t.LOADED_AT], words[t.NUM_LAYERS] * experts)[key]
    if loaded_at != t.NEVER:
        age = min(age, (clock - loaded_at) & LOW32)
    return age


@inner
def worth_of(table: int, key: int) -> float:
    """What an expert is worth among those of its layer, by the pager's policy."""
    words = i64_array(table, t.TABLE_WORDS)
    size = words[t.NUM_LAYERS] * words[t.NUM_EXPERTS]
    policy = words[t.POLICY]
    if policy == names.NEXT_USE:
        numbers = f64_array(words[t.NUMBERS], 4)
        return rank_by_odds(
            f64_array(words[t.FAST], size)[key], f64_array(words[t.SLOW], size)[key], last_use(table, key),
            lift_of(table, key), words[t.WORKERS], numbers[t.PRIOR], numbers[t.LAST_TOKEN], numbers[t.TOKEN_BEFORE],
        )  # fmt: skip
    if policy == names.AFFINITY:
        return affinity_of(table, key)
    if policy == names.LRU:
        return least_recently_used(i64_array(words[t.LAST_USED], size)[key])
    if policy == names.LFU:
        return least_frequently_used(i64_array(words[t.SEEN_TOTAL], size)[key])
    if policy == names.LFRU:
        return least_frequently_and_recently_used(i64_array(words[t.SEEN_TOTAL], size)[key], last_use(table, key))
    if policy == names.LEAST_STALE:
        return least_stale(last_use(table, key), words[t.WORKERS])
    return decayed_frequency(f64_array(words[t.FAST], size)[key])


@inner
def tie_of(table: int, key: int) -> int:
    """Of experts that are worth the same, the one with the lower number goes first: the one used longer ago."""
    words = i64_array(table, t.TABLE_WORDS)
    if words[t.POLICY] == names.AFFINITY:
        return -last_use(table, key)
    return int(i64_array(words[t.LAST_USED], words[t.NUM_LAYERS] * words[t.NUM_EXPERTS])[key])


@inner
def worth_among_all(table: int, worth: float) -> float:
    """The same among those of all layers, apart from how soon a worker comes to the layer.

    For the expected next use it is minus the layers that a worker passes until then: a power is taken for each layer's
    candidate, not for each expert.
    """
    words = i64_array(table, t.TABLE_WORDS)
    if words[t.POLICY] != names.NEXT_USE:
        return worth
    tokens = tokens_until_use(worth, f64_array(words[t.NUMBERS], 4)[t.PRIOR])
    return float(-tokens * words[t.NUM_LAYERS] / words[t.WORKERS])


@inner
def choose_candidate(table: int, layer: int, awaited: int, count: int) -> None:
    """Look at all experts of a layer for the one that would go first."""
    words = i64_array(table, t.TABLE_WORDS)
    layers, experts = words[t.NUM_LAYERS], words[t.NUM_EXPERTS]
    owners = i64_array(words[t.OWNERS], words[t.SLOTS])
    best, best_worth, best_tie, passed_over = -1, 1e300, 0, 0
    row = words[t.EXPERTS] + layer * words[t.ROW_BYTES]
    for expert in range(experts):
        key = layer * experts + expert
        word = load(row + expert * WORD)
        slot = expert_slot(word)
        if word & ~LOW32 != pack_expert(RESIDENT, 0, slot, 0) or slot >= words[t.SLOTS] or owners[slot] != key:
            continue
        if word & LOW32 != 0 or is_awaited(awaited, count, key):
            passed_over = t.PASSED_OVER
            continue
        worth = worth_of(table, key)
        tie = tie_of(table, key)
        if worth < best_worth or (worth == best_worth and tie < best_tie):
            best, best_worth, best_tie = key, worth, tie
    i64_array(words[t.CANDIDATE], layers)[layer] = best
    if best >= 0:
        f64_array(words[t.WORTH], layers)[layer] = worth_among_all(table, best_worth)
    i64_array(words[t.TIE], layers)[layer] = best_tie
    i64_array(words[t.CHANGED], layers)[layer] = passed_over


@inner
def admit(table: int, key: int) -> None:
    """Note that an expert was loaded; it may well be its layer's least at once."""
    note_load(table, key)
    words = i64_array(table, t.TABLE_WORDS)
    layers = words[t.NUM_LAYERS]
    layer = key // words[t.NUM_EXPERTS]
    candidates, worths = i64_array(words[t.CANDIDATE], layers), f64_array(words[t.WORTH], layers)
    worth = worth_among_all(table, worth_of(table, key))
    if candidates[layer] < 0 or worth < worths[layer]:
        candidates[layer], worths[layer] = key, worth
        i64_array(words[t.TIE], layers)[layer] = tie_of(table, key)


@inner
def least_candidate(table: int) -> int:
    """The layer whose candidate goes first, or -1."""
    words = i64_array(table, t.TABLE_WORDS)
    layers = words[t.NUM_LAYERS]
    candidates, worths = i64_array(words[t.CANDIDATE], layers), f64_array(words[t.WORTH], layers)
    ties, ahead = i64_array(words[t.TIE], layers), i64_array(words[t.AHEAD], layers)
    in_turn = words[t.POLICY] == names.NEXT_USE or words[t.POLICY] == names.LEAST_STALE
    best, best_worth = -1, 1e300
    for layer in range(layers):
        if candidates[layer] < 0:
            continue
        worth = worths[layer]
        if in_turn:
            worth -= ahead[layer]
        if worth < best_worth or (worth == best_worth and ties[layer] < ties[best]):
            best, best_worth = layer, worth
    return best


@inner
def find_victim(table: int, awaited: int, count: int) -> int:
    """The key of the expert to evict, or -1; its affinity is written where the table says."""
    words = i64_array(table, t.TABLE_WORDS)
    layers = words[t.NUM_LAYERS]
    changed = i64_array(words[t.CHANGED], layers)
    candidates = i64_array(words[t.CANDIDATE], layers)
    refreshes, layer = 0, words[t.NEXT_LAYER]
    for _ in range(layers):
        if refreshes == REFRESHES:
            break
        layer = layer + 1 if layer + 1 < layers else 0
        if changed[layer] != t.UNCHANGED:
            choose_candidate(table, layer, awaited, count)
            words[t.NEXT_LAYER] = layer
            refreshes += 1
    refreshes = 0
    for complete in range(2):
        if complete == 1:
            for each in range(layers):
                choose_candidate(table, each, awaited, count)
        # Each turn either ends or chooses again in a layer; leases that come and go meanwhile cannot keep it here.
        for _ in range(2 * layers + REFRESHES):
            layer = least_candidate(table)
            if layer < 0:
                break
            key = candidates[layer]
            outdated = changed[layer] == t.OUTDATED and refreshes < REFRESHES
            if not outdated and can_go(table, key, awaited, count):
                f64_array(words[t.SCORE], 1)[0] = affinity_of(table, key)
                return int(key)
            refreshes += outdated
            choose_candidate(table, layer, awaited, count)
    return -1


@kernel(types.int64(types.int64, types.int64[::1], types.boolean))
def victim_of(table: int, awaited: npt.NDArray[np.int64], go: bool) -> int:
    """`find_victim`, from Python; with `go`, that expert is evicted, or the next if somebody leases it meanwhile.

    Its slot is written where the table says. Linearization point: the CAS of `evict`, whose death windows these are.
    """
    words = i64_array(table, t.TABLE_WORDS)
    while True:
        key = find_victim(table, awaited.ctypes.data, len(awaited))
        if key < 0 or not go:
            return key
        layer, expert = key // words[t.NUM_EXPERTS], key % words[t.NUM_EXPERTS]
        address = words[t.EXPERTS] + layer * words[t.ROW_BYTES] + expert * WORD
        slot = expert_slot(load(address))
        if evict(address, words[t.RESIDENT] + layer * words[t.RESIDENT_ROW_BYTES], expert, slot):
            words[t.VACATED] = slot
            return key


@kernel(types.void(types.int64, types.int64))
def loaded(table: int, key: int) -> None:
    """`admit`, from Python."""
    admit(table, key)


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
