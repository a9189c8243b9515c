"""What follows a load: comparing its checksum, describing its slot, making it visible, counting it; in one kernel.

The I/O thread that has read an expert publishes it, and wakes who waits for it, without the main thread: that hears of
it afterwards.

Words: an expert's checksum (0, or that of its first load; written here alone, once), its slot's header (written here
alone), its own word and bit, the pager's counters. Counters are added to, and of the bit `shmroute.shared.experts`
tells. The others have one writer at a time: the thread whose CAS made the expert LOADING. There is no second one before
it is RESIDENT or FAILED, and whoever loads it then has read its word since, so sees the checksum.

The linearization point is the CAS of `make_resident`; whoever sees RESIDENT sees the header. Death windows: before that
CAS the expert stays LOADING, the next pager makes it REQUESTED again, and a checksum that was kept is that of bytes
which were read whole; after it, a stale bit, a load that is not counted, or waiters that are not woken, who look again
by themselves. The pager's lock goes with its process, so with all of its threads: none publishes in a successor's time.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import types

from shmroute.pager.waiters import lanes_waiting_in
from shmroute.shared.atomic import WORD, fetch_add, i64_array, load, store
from shmroute.shared.experts import make_resident, read_word
from shmroute.shared.kernel import kernel
from shmroute.shared.layout import LANE_SHARD
from shmroute.shared.metrics import PAGER_HISTOGRAM, LaneCounter, PagerCounter, record_duration
from shmroute.shared.pool import describe_slot, precision_of
from shmroute.shared.segment import Segment

_EXPERTS, _CHECKSUMS, _ROW_BYTES, _RESIDENT, _RESIDENT_ROW_BYTES, _NUM_EXPERTS, _EXPERT_BYTES = range(7)
_SLOT_HEADERS, _PRECISION, _COUNTERS, _LANES, _LANE_BYTES, _MAX_WORKERS = range(7, 13)
_TABLE_WORDS = 13

DIFFERS: Final = -1
"""Instead of lanes: the checksum is not that of the expert's first load."""

_LOADS, _BYTES_READ, _PREFETCHES = (
    int(counter) * WORD for counter in (PagerCounter.LOADS, PagerCounter.BYTES_READ, PagerCounter.PREFETCHES)
)
_LANE_LOADS, _LANE_EVICTIONS = int(LaneCounter.LOADS) * WORD, int(LaneCounter.EVICTIONS) * WORD


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64, types.int64, types.boolean))
def publish_load(table: int, key: int, slot: int, checksum: int, duration: int, prefetch: bool) -> int:
    """Publish a load if its bytes are those that the expert had at first.

    Parameters
    ----------
    table : int
        Address of the words of `Publisher`.
    key, slot : int
    checksum : int
        Not 0. The first one of an expert is trusted and kept.
    duration : int
        Nanoseconds that the load took.
    prefetch : bool
        Whether nobody had demanded it.

    Returns
    -------
    int
        The lanes to wake, as bits: those that wait for an expert of the layer; or DIFFERS, and nothing was published.
    """
    words = i64_array(table, _TABLE_WORDS)
    layer, expert = key // words[_NUM_EXPERTS], key % words[_NUM_EXPERTS]
    offset = layer * words[_ROW_BYTES] + expert * WORD
    known = load(words[_CHECKSUMS] + offset)
    if known == 0:
        store(words[_CHECKSUMS] + offset, checksum)
    elif known != checksum:
        return DIFFERS
    describe_slot(words[_SLOT_HEADERS], slot, layer, expert, words[_PRECISION], words[_EXPERT_BYTES])
    row = words[_RESIDENT] + layer * words[_RESIDENT_ROW_BYTES]
    make_resident(words[_EXPERTS] + offset, row, expert, slot)
    counters = words[_COUNTERS]
    fetch_add(counters + _LOADS, 1)
    fetch_add(counters + _BYTES_READ, words[_EXPERT_BYTES])
    if prefetch:
        fetch_add(counters + _PREFETCHES, 1)
    record_duration(counters + PAGER_HISTOGRAM * WORD, duration)
    return lanes_waiting_in(words[_LANES], words[_LANE_BYTES], words[_MAX_WORKERS], layer)


@kernel(types.void(types.int64, types.int64))
def charge(lane: int, evictions: int) -> None:
    """Count a load, and what was evicted for it, for the worker in the lane at an address."""
    fetch_add(lane + LANE_SHARD + _LANE_LOADS, 1)
    fetch_add(lane + LANE_SHARD + _LANE_EVICTIONS, evictions)


class Publisher:
    """The pager's way to publish loads, from any of its threads.

    Parameters
    ----------
    segment : Segment
    """

    def __init__(self, segment: Segment) -> None:
        config, layout, base = segment.config, segment.layout, segment.address
        self._table = np.array(
            (
                base + layout.experts, base + layout.checksums, layout.row_bytes, base + layout.resident,
                layout.resident_row_bytes, config.num_experts, config.expert_bytes, base + layout.slot_headers,
                precision_of(config), base + layout.pager, base + layout.lanes, layout.lane_bytes, config.max_workers,
            ),
            np.int64,
        )  # fmt: skip
        self._address = self._table.ctypes.data

    def publish(self, key: int, slot: int, checksum: int, duration: int, prefetch: bool) -> int:
        """See `publish_load`."""
        return int(publish_load(self._address, key, slot, checksum, duration, prefetch))

    def first_checksum(self, key: int) -> int:
        """The checksum of an expert's first load, 0 before that."""
        layer, expert = divmod(key, int(self._table[_NUM_EXPERTS]))
        return int(read_word(int(self._table[_CHECKSUMS] + layer * self._table[_ROW_BYTES]) + expert * WORD))
