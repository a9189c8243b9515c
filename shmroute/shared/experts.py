"""Expert words: where each expert is, and who reads it, in one word each.

```
ABSENT --worker--> REQUESTED(priority) --pager--> LOADING(slot) --pager--> RESIDENT(slot, lease mask)
   ^  ^------- pager cancels a prefetch -|             |                           |
   |                                                   +--> FAILED --demand, once due--> REQUESTED
   +--------------------------- pager: CAS from RESIDENT(slot, mask = 0) ----------+
```

The table of these words is the truth about slots: a slot is free when no word names it. Bits of the lease mask are 0
outside RESIDENT, so the reaper may clear a lane's bit in every word whatever its state.

| who | calls | progress |
|---|---|---|
| worker | `request`, `lease`, `release` | lock-free: obstructed only by changes of the same word |
| pager's main thread | `fail`, `evict`, `cancel`, `recover`, `rebuild_bitmap` | lock-free, likewise |
| pager's I/O threads | `begin_load`, `make_resident`, each for loads of its own | lock-free, likewise |
| holder of the pager's lock | `clear_lane` | wait-free per word |

*No expert is read while it moves.* `lease` sets the worker's bit by a CAS from the very word that says where the bytes
are; `evict` is a CAS from a word with an empty mask. One of the two fails.

Only the worker of lane w ever sets bit w, under its process's lease mutex (`shmroute.leases`).

*The bitmap follows the words.* A layer's bitmap says to the router which of its experts are RESIDENT. Each thread that
makes an expert RESIDENT, or makes it something else, afterwards calls `show`: it sets or clears the expert's bit as the
word says, and looks at the word again. So bit and word agree once all such calls have ended: whoever wrote the bit last
has seen the word after that as it wrote the bit, and had the word changed since, whoever changed it would have written
the bit later. Threads that load, one that evicts and one that rebuilds the bitmap may so run at once. In between a bit
may be stale, which costs a wrong bonus, never a wrong byte: leases look at the word.

Death windows: a worker dead between `request` and the push leaves REQUESTED, which the sweep finds; dead while it
holds a lease, its bit, which the reaper clears. A pager dead while LOADING leaves bytes that nobody could see; the
next pager makes it REQUESTED again (`recover`). Dead between a CAS and the end of its `show`, a stale bit; the next
pager's sweep rebuilds it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.atomic import WORD, cas, fetch_and, fetch_or, i64_array, load, monotonic_ns, store
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.words import (
    ABSENT,
    FAILED,
    LOADING,
    PREFETCH,
    REQUESTED,
    RESIDENT,
    URGENT,
    expert_priority,
    expert_slot,
    expert_state,
    failure_not_before_ms,
    pack_expert,
)

# What `request` found or did.
QUEUE: Final = 0  # now REQUESTED by this call, or at a higher priority: the caller pushes
PENDING: Final = 1  # requested before, or loading
PRESENT: Final = 2
BROKEN: Final = 3  # failed of late, and not due yet


@inner
def request(word_address: int, failure_address: int, priority: int) -> int:
    """Ask for an expert: QUEUE if the caller must push the request, else PENDING, PRESENT or BROKEN."""
    while True:
        word = load(word_address)
        state = expert_state(word)
        if state == RESIDENT:
            return PRESENT
        if state == LOADING:
            return PENDING
        if state == REQUESTED and expert_priority(word) >= priority:
            return PENDING
        if state == FAILED and failure_not_before_ms(load(failure_address)) > monotonic_ns() // 1_000_000:
            return BROKEN
        if cas(word_address, word, pack_expert(REQUESTED, priority, 0, 0)):  # linearization point
            return QUEUE


@kernel(types.int64(types.int64, types.int64, types.int64))
def request_expert_word(word_address: int, failure_address: int, priority: int) -> int:
    """`request`, from Python."""
    return request(word_address, failure_address, priority)


@inner
def lease(word_address: int, bit: int) -> int:
    """Set a lane's bit on a resident expert: its slot, or -1 if it is not resident."""
    while True:
        word = load(word_address)
        if expert_state(word) != RESIDENT:
            return -1
        if cas(word_address, word, word | bit):  # linearization point
            return expert_slot(word)


@inner
def release(word_address: int, bit: int) -> None:
    """Clear a lane's bit. The caller then listens for a hungry pager. (mask / HUNGRY)"""
    fetch_and(word_address, ~bit)


@kernel(types.int64(types.int64, types.int64[::1]))
def resident_ids(resident_row: int, ids: npt.NDArray[np.int64]) -> int:
    """Which experts of a layer its bitmap says are resident, ascending.

    Parameters
    ----------
    resident_row : int
    ids : ndarray
        int64 [E], written.

    Returns
    -------
    int
        How many; what is behind them in `ids` is rubbish.
    """
    count, num_experts = 0, ids.shape[0]
    for first in range(0, num_experts, 64):
        bits = load(resident_row + (first >> 6) * WORD)
        for expert in range(first, min(first + 64, num_experts)):
            ids[count] = expert
            count += (bits >> (expert - first)) & 1
    return count


@kernel(types.int64(types.int64))
def read_word(address: int) -> int:
    """Any shared word."""
    return load(address)


@kernel(types.void(types.int64, types.int64))
def write_word(address: int, value: int) -> None:
    """Set a word that has one writer."""
    store(address, value)


@kernel(types.boolean(types.int64, types.int64, types.int64))
def swap_word(address: int, expected: int, desired: int) -> bool:
    """One CAS."""
    return cas(address, expected, desired)


# ------------------------------------------------------------------ the pager's side


@kernel(types.boolean(types.int64, types.int64))
def begin_load(word_address: int, slot: int) -> bool:
    """REQUESTED to LOADING(slot); False if it is not REQUESTED any more."""
    while True:
        word = load(word_address)
        if expert_state(word) != REQUESTED:
            return False
        if cas(word_address, word, pack_expert(LOADING, 0, slot, 0)):
            return True


@inner
def show(word_address: int, resident_row: int, expert: int) -> None:
    """Make an expert's bit say what its word says; see the file's head."""
    bits, bit = resident_row + (expert >> 6) * WORD, 1 << (expert & 63)
    resident = expert_state(load(word_address)) == RESIDENT
    while True:
        if resident:
            fetch_or(bits, bit)
        else:
            fetch_and(bits, ~bit)
        shown, resident = resident, expert_state(load(word_address)) == RESIDENT
        if shown == resident:
            return


@inner
def make_resident(word_address: int, resident_row: int, expert: int, slot: int) -> None:
    """LOADING(slot) to RESIDENT(slot), then the bitmap: the load becomes visible here and nowhere else."""
    if cas(word_address, pack_expert(LOADING, 0, slot, 0), pack_expert(RESIDENT, 0, slot, 0)):  # linearization point
        show(word_address, resident_row, expert)


@kernel(types.void(types.int64, types.int64, types.int64, types.int64))
def publish(word_address: int, resident_row: int, expert: int, slot: int) -> None:
    """`make_resident`, from Python."""
    make_resident(word_address, resident_row, expert, slot)


@kernel(types.void(types.int64, types.int64, types.int64, types.int64))
def fail(word_address: int, failure_address: int, slot: int, failure: int) -> None:
    """LOADING(slot) to FAILED, with the reason stored first."""
    store(failure_address, failure)
    cas(word_address, pack_expert(LOADING, 0, slot, 0), pack_expert(FAILED, 0, 0, 0))


@kernel(types.boolean(types.int64, types.int64, types.int64, types.int64))
def evict(word_address: int, resident_row: int, expert: int, slot: int) -> bool:
    """RESIDENT(slot) without a lease to ABSENT, then the bitmap; False if it is leased or elsewhere."""
    if not cas(word_address, pack_expert(RESIDENT, 0, slot, 0), pack_expert(ABSENT, 0, 0, 0)):
        return False
    show(word_address, resident_row, expert)
    return True


@kernel(types.boolean(types.int64))
def cancel(word_address: int) -> bool:
    """REQUESTED as a prefetch to ABSENT; False if somebody demands it by now."""
    while True:
        word = load(word_address)
        if expert_state(word) != REQUESTED or expert_priority(word) > PREFETCH:
            return False
        if cas(word_address, word, pack_expert(ABSENT, 0, 0, 0)):
            return True


@kernel(types.void(types.int64, types.int64, types.int64))
def recover(experts: int, row_bytes: int, num_layers: int) -> None:
    """At a takeover: what the dead pager was loading is REQUESTED again, at the highest priority."""
    for address in range(experts, experts + num_layers * row_bytes, WORD):
        word = load(address)
        if expert_state(word) == LOADING:
            cas(address, word, pack_expert(REQUESTED, URGENT, 0, 0))


@kernel(types.void(types.int64, types.int64, types.int64, types.int64))
def clear_lane(experts: int, row_bytes: int, num_layers: int, bit: int) -> None:
    """Release every lease of a dead lane."""
    for address in range(experts, experts + num_layers * row_bytes, WORD):
        if load(address) & bit:
            fetch_and(address, ~bit)


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64))
def scan_table(
    experts: int, row_bytes: int, num_layers: int, num_experts: int, owners: int, slots: int, requested: int
) -> int:
    """One pass over all words: who is in which slot, and what is requested.

    Parameters
    ----------
    experts, row_bytes, num_layers, num_experts : int
        The table.
    owners : int
        Private int64 [slots]: set to ``layer * num_experts + expert`` where a LOADING or RESIDENT word names the
        slot, -1 elsewhere.
    slots : int
    requested : int
        Private int64 [num_layers × num_experts]: the requested experts, numbered likewise.

    Returns
    -------
    int
        How many are requested.
    """
    owner = i64_array(owners, slots)
    found = i64_array(requested, num_layers * num_experts)
    for slot in range(slots):
        owner[slot] = -1
    count = 0
    for layer in range(num_layers):
        for expert in range(num_experts):
            word = load(experts + layer * row_bytes + expert * WORD)
            state = expert_state(word)
            if state in (LOADING, RESIDENT) and expert_slot(word) < slots:
                owner[expert_slot(word)] = layer * num_experts + expert
            elif state == REQUESTED:
                found[count] = layer * num_experts + expert
                count += 1
    return count


@kernel(types.void(types.int64, types.int64, types.int64))
def rebuild_bitmap(row: int, resident_row: int, num_experts: int) -> None:
    """Make one layer's bitmap say what its words say, bit by bit, while I/O threads publish."""
    for first in range(0, num_experts, 64):
        address, end = resident_row + (first >> 6) * WORD, min(first + 64, num_experts)
        bits = load(address)
        for expert in range(first, end):
            word_address = row + expert * WORD
            if ((bits >> (expert - first)) & 1 == 1) != (expert_state(load(word_address)) == RESIDENT):
                show(word_address, resident_row, expert)
        if end - first < 64 and bits >> (end - first) != 0:
            fetch_and(address, (1 << (end - first)) - 1)  # bits of no expert, set by a damaging peer
