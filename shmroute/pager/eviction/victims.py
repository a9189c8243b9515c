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
from shmroute.pager.eviction.history import note_load
from shmroute.pager.eviction.worth import affinity_of, tie_of, worth_among_all, worth_of
from shmroute.shared.atomic import WORD, f64_array, i64_array, load
from shmroute.shared.experts import evict
from shmroute.shared.kernel import inner, kernel
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
