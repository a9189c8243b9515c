"""What one process needs to lease and to request: where things are, and how many leases it has of each expert.

The threads of a process share its bit in an expert's word, so a count of their leases goes with the bit. Both change
in one kernel call, so no exception, signal handler or garbage collection of Python's comes between them, and a call in
the middle of another one of the same thread does no harm.

A *lease table* is private memory: int64, first the words below, then a count for each expert word, at the same
distances. Each thread has a count of its own of the leases that it took, an int64 [1].

| who | calls | progress |
|---|---|---|
| threads of the process, one at a time, under its lease mutex | `take_lease`, `give_back` | lock-free |
| threads of the process, while the mapping is in use | `demand`, `demand_each` | lock-free |

`give_back` clears the bit only when the last lease goes: without the mutex, a new one could rely on it meanwhile.
`take_lease` counts before it sets the bit, so that interpreted too (where Python's garbage collection may give back
another lease of the same expert in between) the bit stays.

Death windows: a process dies with its table; what it leaves is its bit, which the reaper clears.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.atomic import WORD, fetch_add
from shmroute.shared.bell import heard
from shmroute.shared.experts import QUEUE, lease, release
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.layout import HEADER_BELL, LANE_SHARD
from shmroute.shared.metrics import LaneCounter
from shmroute.shared.requests import submit
from shmroute.shared.segment import Segment
from shmroute.shared.words import AWAKE, HUNGRY, pack_bell

# Words of a lease table.
IS_CLOSED: Final = 0  # 1 once the segment is about to be unmapped: no lease is taken or given back any more
EXPERTS: Final = 1
FAILURES: Final = 2
ROW_BYTES: Final = 3
RING: Final = 4
RING_BITS: Final = 5
BELL: Final = 6
COUNTERS: Final = 7
LANE: Final = 8
COUNTS: Final = 9  # from here on

# What `take_lease` returns beside slots.
NOT_RESIDENT: Final = -1
CLOSED: Final = -2

NOT_HELD: Final = pack_bell(-1, AWAKE)
"""What `give_back` returns beside words of an armed bell, of which it is none."""

_INTS = types.int64[::1]
Ints = npt.NDArray[np.int64]


def lease_table(segment: Segment, lane: int) -> Ints:
    """A new lease table of this process, which holds a lane."""
    layout, base = segment.layout, segment.address
    table = np.zeros(COUNTS + layout.num_layers * layout.row_bytes // WORD, np.int64)
    table[EXPERTS], table[FAILURES] = base + layout.experts, base + layout.failures
    table[ROW_BYTES] = layout.row_bytes
    table[RING], table[RING_BITS] = base + layout.ring, layout.ring_bits
    table[BELL] = base + HEADER_BELL
    table[COUNTERS] = base + layout.lane(lane) + LANE_SHARD
    table[LANE] = lane
    return table


@kernel(types.int64(_INTS, types.int64, types.int64, _INTS))
def take_lease(table: Ints, layer: int, expert: int, held: Ints) -> int:
    """Lease an expert if it is resident: its slot, NOT_RESIDENT or CLOSED. `held` counts the thread's leases."""
    if table[IS_CLOSED] == 1:
        return CLOSED
    offset = layer * int(table[ROW_BYTES]) + expert * WORD
    count = COUNTS + offset // WORD
    table[count] += 1  # before the bit: see the file's head
    slot = lease(int(table[EXPERTS]) + offset, 1 << int(table[LANE]))
    if slot < 0:
        table[count] -= 1
        return NOT_RESIDENT
    held[0] += 1
    fetch_add(int(table[COUNTERS]) + LaneCounter.LEASES * WORD, 1)
    return slot


@kernel(types.int64(_INTS, types.int64, types.int64, _INTS))
def give_back(table: Ints, layer: int, expert: int, held: Ints) -> int:
    """Give back one lease of those that `held` counts.

    Returns
    -------
    int
        What to mark on the pager's bell after a post, 0 if it needs none or all is CLOSED (the bit went with the lane),
        or NOT_HELD.
    """
    if table[IS_CLOSED] == 1:
        return 0
    offset = layer * int(table[ROW_BYTES]) + expert * WORD
    count = COUNTS + offset // WORD
    if table[count] == 0 or held[0] == 0:
        return NOT_HELD
    held[0] -= 1
    table[count] -= 1
    if table[count] > 0:
        return 0
    release(int(table[EXPERTS]) + offset, 1 << int(table[LANE]))
    return heard(int(table[BELL]), HUNGRY)


@inner
def _demand(table: Ints, layer: int, expert: int, priority: int) -> int:
    offset = layer * int(table[ROW_BYTES]) + expert * WORD
    return submit(
        int(table[EXPERTS]) + offset, int(table[FAILURES]) + offset, int(table[RING]), int(table[RING_BITS]),
        int(table[COUNTERS]), layer, expert, priority, int(table[LANE]),
    )  # fmt: skip


@kernel(types.int64(_INTS, types.int64, types.int64, types.int64))
def demand(table: Ints, layer: int, expert: int, priority: int) -> int:
    """Request an expert: `submit`'s code."""
    return _demand(table, layer, expert, priority)


@kernel(types.int64(_INTS, types.int64, _INTS, types.int64))
def demand_each(table: Ints, layer: int, experts: Ints, priority: int) -> int:
    """Request some experts of a layer; how many requests that queued."""
    queued = 0
    for i in range(experts.shape[0]):
        if _demand(table, layer, int(experts[i]), priority) == QUEUE:
            queued += 1
    return queued
