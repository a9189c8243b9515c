"""What workers wait for right now, from their wait words, and how they are woken.

A worker names one of the experts that it needs of a layer, and takes whichever comes first: so whoever makes an expert
RESIDENT, or FAILED, wakes all that wait in its layer. The store of the expert's word comes before the look at the wait
words and bells. (wait word / expert word, lane bell / expert word)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.atomic import i64_array, load
from shmroute.shared.bell import Semaphore, ring, unlink_semaphore
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.layout import LANE_BELL, LANE_WAIT
from shmroute.shared.segment import Segment
from shmroute.shared.words import EXPERT_BITS, LAYER_SHIFT


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64))
def read_waits(
    lanes: int, lane_bytes: int, count: int, num_layers: int, num_experts: int, waiting: int, awaited: int
) -> int:
    """Write to int64 [count] at `waiting` which lanes wait, and to one at `awaited` for which keys; how many do.

    A word that names no possible expert (a buggy peer) counts as none.
    """
    who, keys, waits = i64_array(waiting, count), i64_array(awaited, count), 0
    for lane in range(count):
        named = load(lanes + lane * lane_bytes + LANE_WAIT) - 1
        layer, expert = named >> LAYER_SHIFT, named & ((1 << EXPERT_BITS) - 1)
        if named >= 0 and layer < num_layers and expert < num_experts:
            who[waits], keys[waits] = lane, layer * num_experts + expert
            waits += 1
    return waits


@inner
def lanes_waiting_in(lanes: int, lane_bytes: int, count: int, layer: int) -> int:
    """The lanes that wait for an expert of a layer, as bits."""
    waiting = 0
    for lane in range(count):
        named = load(lanes + lane * lane_bytes + LANE_WAIT) - 1
        if named >= 0 and named >> LAYER_SHIFT == layer:
            waiting |= 1 << lane
    return waiting


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64))
def waiting_lanes(lanes: int, lane_bytes: int, count: int, layer: int) -> int:
    """`lanes_waiting_in`, from Python."""
    return lanes_waiting_in(lanes, lane_bytes, count, layer)


class WaitWords:
    """Who waits for what, as one thread reads it."""

    def __init__(self, segment: Segment) -> None:
        config, layout = segment.config, segment.layout
        self._waiting, self._awaited = np.empty((2, config.max_workers), np.int64)
        self._arguments = (
            segment.address + layout.lanes, layout.lane_bytes, config.max_workers, config.num_layers,
            config.num_experts, self._waiting.ctypes.data, self._awaited.ctypes.data,
        )  # fmt: skip

    def read(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The lanes that wait now, and the keys ``layer * num_experts + expert``, until this is called again."""
        count = read_waits(*self._arguments)
        return self._waiting[:count], self._awaited[:count]


def awaited_by_lane(segment: Segment) -> npt.NDArray[np.int64]:
    """int64 [max_workers]: the key ``layer * num_experts + expert`` that each lane waits for, -1 for none."""
    lanes, awaited = WaitWords(segment).read()
    keys = np.full(segment.config.max_workers, -1, np.int64)
    keys[lanes] = awaited
    return keys


class Waiters:
    """The workers that wait for experts.

    I/O threads call `wake` and `lanes_in`, the pager's main thread anything.

    Parameters
    ----------
    segment : Segment
    """

    def __init__(self, segment: Segment) -> None:
        config, layout = segment.config, segment.layout
        self._segment = segment
        self._semaphores: dict[int, Semaphore] = {}
        self._arrivals: dict[tuple[int, int], int] = {}
        self._arrived = 0
        self._lanes = segment.address + layout.lanes, layout.lane_bytes, config.max_workers
        self._waits = WaitWords(segment)

    def keys(self) -> npt.NDArray[np.int64]:
        """int64 of the keys that are waited for, in no order; good until the next call of this or `in_turn`."""
        return self._waits.read()[1]

    def in_turn(self) -> dict[int, int]:
        """The keys that are waited for, and of each the lane that waited first; those of the longest waiters first.

        So no lane starves another. To be called regularly: a wait is as old as the first of these calls that saw it.
        """
        lanes, keys = self._waits.read()
        waits = list(zip(lanes.tolist(), keys.tolist(), strict=True))
        arrivals = {}
        for wait in waits:
            self._arrived += wait not in self._arrivals
            arrivals[wait] = self._arrivals.get(wait, self._arrived)
        self._arrivals = arrivals
        in_turn: dict[int, int] = {}
        for lane, key in sorted(waits, key=arrivals.__getitem__):
            in_turn.setdefault(key, lane)
        return in_turn

    def lanes_in(self, layer: int) -> int:
        """The lanes that wait for an expert of a layer, as bits."""
        return int(waiting_lanes(*self._lanes, layer))

    def wake(self, lanes: int) -> None:
        """Ring the bells of some lanes, which are given as bits."""
        for lane in each_lane(lanes):
            ring(self._segment.address + self._segment.layout.lane(lane) + LANE_BELL, self._semaphore(lane))

    def wake_layers(self, layers: Iterable[int]) -> None:
        """Ring the bell of every lane that waits for an expert of some layers."""
        for layer in layers:
            self.wake(self.lanes_in(layer))

    def _semaphore(self, lane: int) -> Semaphore:
        found = self._semaphores.get(lane)
        if found is None:
            opened = open_semaphore(self._segment, lane)
            found = self._semaphores.setdefault(lane, opened)
            if found is not opened:  # another thread was faster
                opened.close()
        return found

    def close(self) -> None:
        """Close the semaphores."""
        for semaphore in self._semaphores.values():
            semaphore.close()


def each_lane(lanes: int) -> Iterator[int]:
    """The numbers of lanes that are given as bits."""
    while lanes:
        yield (lanes & -lanes).bit_length() - 1
        lanes &= lanes - 1


def open_semaphore(segment: Segment, lane: int | None) -> Semaphore:
    """The semaphore of a lane's bell, or with None of the pager's own."""
    semaphore = Semaphore(segment.semaphore_name(lane))
    if segment.closing:  # whoever destroys may have unlinked it before it was made
        unlink_semaphore(semaphore.name)
    return semaphore
