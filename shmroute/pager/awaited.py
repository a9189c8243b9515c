"""What workers wait for right now, from their wait words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.atomic import i64_array, load
from shmroute.shared.kernel import kernel
from shmroute.shared.layout import LANE_WAIT
from shmroute.shared.segment import Segment
from shmroute.shared.words import EXPERT_BITS, LAYER_SHIFT


@kernel(types.void(types.int64, types.int64, types.int64, types.int64))
def read_wait_words(lanes: int, lane_bytes: int, count: int, out: int) -> None:
    """Copy every lane's wait word to int64 [count] at `out`."""
    waits = i64_array(out, count)
    for lane in range(count):
        waits[lane] = load(lanes + lane * lane_bytes + LANE_WAIT)


def awaited_by_lane(segment: Segment) -> npt.NDArray[np.int64]:
    """int64 [max_workers]: the key ``layer * num_experts + expert`` that each lane waits for, -1 for none.

    A word that names no possible expert (a buggy peer) counts as none.
    """
    config, layout = segment.config, segment.layout
    waits = np.empty(config.max_workers, np.int64)
    read_wait_words(segment.address + layout.lanes, layout.lane_bytes, config.max_workers, waits.ctypes.data)
    named = waits - 1
    layer, expert = named >> LAYER_SHIFT, named & ((1 << EXPERT_BITS) - 1)
    possible = (waits > 0) & (layer < config.num_layers) & (expert < config.num_experts)
    return np.where(possible, layer * config.num_experts + expert, -1)
