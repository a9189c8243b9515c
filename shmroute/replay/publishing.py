"""What a worker publishes when it routes one token: clock, affinity, activations, cursor; and its successors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.pager.eviction import table as t
from shmroute.shared.affinity import activate, advance_clock, count_activation
from shmroute.shared.atomic import f64_array, i32_array, i64_array, store
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.layout import LANE_CURSOR, LINE, USE_ACTIVATIONS, USE_AFFINITY, USE_BYTES
from shmroute.shared.successors import learn

_ARRAY = types.int64[::1]


@inner
def publish(table: int, worker: int, layer: int, keys: npt.NDArray[np.int64], first: int, last: int) -> None:
    """Publish that a worker's token chose ``keys[first:last]`` of a layer.

    Parameters
    ----------
    table : int
        Of the eviction policy (`shmroute.pager.eviction.table`).
    worker, layer : int
    keys : ndarray
        int64: ``layer * num_experts + expert``.
    first, last : int
    """
    words = i64_array(table, t.TABLE_WORDS)
    experts, boost = words[t.NUM_EXPERTS], f64_array(words[t.NUMBERS], 4)[t.BOOST]
    clock = words[t.CLOCK] + layer * LINE
    start = advance_clock(clock, 1)
    for i in range(first, last):
        use = words[t.USES] + layer * words[t.USE_ROW_BYTES] + keys[i] % experts * USE_BYTES
        activate(use + USE_AFFINITY, clock, words[t.POWERS], start, start + 1, boost, 1.0, 1.0)
        count_activation(use + USE_ACTIVATIONS, 1)
    store(words[t.LANES] + worker * words[t.LANE_BYTES] + LANE_CURSOR, layer)


@kernel(
    types.void(
        types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, _ARRAY, types.int64, types.int64,
        types.int64,
    )
)  # fmt: skip
def publish_and_learn(
    table: int,
    successors: int,
    row_bytes: int,
    trail: int,
    worker: int,
    layer: int,
    keys: npt.NDArray[np.int64],
    first: int,
    last: int,
    experts_at: int,
) -> None:
    """`publish`, and what the table of successors learns from it.

    Parameters
    ----------
    successors, row_bytes : int
        That table's address, and bytes of a layer.
    trail : int
        Address of the worker's `new_trail`.
    experts_at : int
        Scratch, int32 [last - first].
    """
    publish(table, worker, layer, keys, first, last)
    words = i64_array(table, t.TABLE_WORDS)
    experts = i32_array(experts_at, last - first)
    for i in range(first, last):
        experts[i - first] = keys[i] % words[t.NUM_EXPERTS]
    learn(successors, row_bytes, words[t.NUM_LAYERS], words[t.NUM_EXPERTS], trail, layer, experts_at, last - first)
