"""What workers wait for right now, from their wait words, and how they are woken."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.atomic import i64_array, load
from shmroute.shared.bell import Semaphore, ring, unlink_semaphore
from shmroute.shared.kernel import kernel
from shmroute.shared.layout import LANE_BELL, LANE_WAIT
from shmroute.shared.segment import Segment
from shmroute.shared.words import EXPERT_BITS, LAYER_SHIFT


@kernel(types.void(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64))
def read_awaited(lanes: int, lane_bytes: int, count: int, num_layers: int, num_experts: int, out: int) -> None:
    """Write to int64 [count] at `out` which key each lane waits for, -1 for none.

    A word that names no possible expert (a buggy peer) counts as none.
    """
    keys = i64_array(out, count)
    for lane in range(count):
        named = load(lanes + lane * lane_bytes + LANE_WAIT) - 1
        layer, expert = named >> LAYER_SHIFT, named & ((1 << EXPERT_BITS) - 1)
        possible = named >= 0 and layer < num_layers and expert < num_experts
        keys[lane] = layer * num_experts + expert if possible else -1


@kernel(types.boolean(types.int64, types.int64, types.int64, types.int64))
def waits_in_layer(lanes: int, lane_bytes: int, count: int, layer: int) -> bool:
    """Whether a lane waits for an expert of a layer."""
    for lane in range(count):
        named = load(lanes + lane * lane_bytes + LANE_WAIT) - 1
        if named >= 0 and named >> LAYER_SHIFT == layer:
            return True
    return False


def awaited_by_lane(segment: Segment) -> npt.NDArray[np.int64]:
    """int64 [max_workers]: the key ``layer * num_experts + expert`` that each lane waits for, -1 for none."""
    config, layout = segment.config, segment.layout
    keys = np.empty(config.max_workers, np.int64)
    read_awaited(
        segment.address + layout.lanes, layout.lane_bytes, config.max_workers, config.num_layers, config.num_experts,
        keys.ctypes.data,
    )  # fmt: skip
    return keys


class Waiters:
    """The workers that wait for experts.

    Parameters
    ----------
    segment : Segment
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._semaphores: dict[int, Semaphore] = {}
        self._arrivals: dict[tuple[int, int], int] = {}
        self._arrived = 0

    def keys(self) -> npt.NDArray[np.int64]:
        """int64 of the keys that are waited for, in no order."""
        keys = awaited_by_lane(self._segment)
        return keys[keys >= 0]

    def in_turn(self) -> list[int]:
        """The keys that are waited for, those of the longest waiters first: no lane starves another.

        To be called regularly: a wait is as old as the first of these calls that saw it.
        """
        waits = [(lane, key) for lane, key in enumerate(awaited_by_lane(self._segment).tolist()) if key >= 0]
        arrivals = {}
        for wait in waits:
            self._arrived += wait not in self._arrivals
            arrivals[wait] = self._arrivals.get(wait, self._arrived)
        self._arrivals = arrivals
        return [key for _, key in sorted(waits, key=arrivals.__getitem__)]

    def lanes(self, key: int) -> list[int]:
        """The lanes that wait for an expert."""
        return [lane for lane, awaited in enumerate(awaited_by_lane(self._segment).tolist()) if awaited == key]

    def any_in(self, layer: int) -> bool:
        """Whether a worker waits for an expert of a layer; from any thread."""
        config, layout = self._segment.config, self._segment.layout
        return bool(waits_in_layer(self._segment.address + layout.lanes, layout.lane_bytes, config.max_workers, layer))

    def wake(self, keys: Iterable[int]) -> None:
        """Ring the bell of every lane that waits for one of some experts, or for another of its layer.

        A worker names one of the experts that it needs of a layer, and takes whichever comes first.
        (wait word / expert word)
        """
        num_experts = self._segment.config.num_experts
        layers = {key // num_experts for key in keys}
        for lane, key in enumerate(awaited_by_lane(self._segment).tolist()):
            if key >= 0 and key // num_experts in layers:
                if lane not in self._semaphores:
                    self._semaphores[lane] = open_semaphore(self._segment, lane)
                ring(self._segment.address + self._segment.layout.lane(lane) + LANE_BELL, self._semaphores[lane])

    def close(self) -> None:
        """Close the semaphores."""
        for semaphore in self._semaphores.values():
            semaphore.close()


def open_semaphore(segment: Segment, lane: int | None) -> Semaphore:
    """The semaphore of a lane's bell, or with None of the pager's own."""
    semaphore = Semaphore(segment.semaphore_name(lane))
    if segment.closing:  # whoever destroys may have unlinked it before it was made
        unlink_semaphore(semaphore.name)
    return semaphore
