"""Paging requests: what workers ask of the pager, and the one way to ask it.

A demand goes through the expert's word first, and only the worker that changed the word pushes the request: so the
ring never carries one expert twice at one priority, and what it drops is still in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from numba import types

from shmroute.shared.atomic import WORD, fetch_add
from shmroute.shared.experts import QUEUE, request
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.metrics import LaneCounter
from shmroute.shared.ring import PUSHED, push
from shmroute.shared.words import (
    NORMAL,
    PAGE_IN,
    PAGE_OUT,
    PREFETCH,
    URGENT,
    pack_request,
    request_direction,
    request_expert,
    request_layer,
    request_priority,
    speculative,
)


class PagingDirection(IntEnum):
    """Which way an expert goes."""

    IN = PAGE_IN
    OUT = PAGE_OUT


class PagingPriority(IntEnum):
    """How soon an expert is wanted; experts that a worker waits for go before all of these."""

    PREFETCH = PREFETCH  # perhaps; cancelled when stale
    NORMAL = NORMAL  # routed
    URGENT = URGENT  # a worker has asked for the weights


@dataclass(frozen=True)
class PagingRequest:
    """One request to the pager.

    Attributes
    ----------
    layer, expert : int
    direction : PagingDirection
    priority : PagingPriority
    """

    layer: int
    expert: int
    direction: PagingDirection
    priority: PagingPriority

    @classmethod
    def unpack(cls, word: int) -> PagingRequest:
        """Read a request as the ring carries it.

        Raises
        ------
        ValueError
            If its priority is none.
        """
        return cls(
            request_layer(word),
            request_expert(word),
            PagingDirection(request_direction(word)),
            PagingPriority(request_priority(word)),
        )


@inner
def submit(
    word_address: int, failure_address: int, ring: int, bits: int, counters: int,
    layer: int, expert: int, priority: int, lane: int,
) -> int:  # fmt: skip
    """Demand an expert: `request`'s code. On QUEUE the caller rings the pager's bell. (ring CAS / bell)"""
    code = request(word_address, failure_address, priority)
    if code == QUEUE:
        if push(ring, bits, pack_request(layer, expert, PAGE_IN, priority, lane)) == PUSHED:
            fetch_add(counters + LaneCounter.REQUESTS * WORD, 1)
        else:
            fetch_add(counters + LaneCounter.RING_FULL * WORD, 1)
    return code


@kernel(
    types.int64(
        types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64
    )
)  # fmt: skip
def submit_speculation(
    word_address: int, failure_address: int, ring: int, bits: int, counters: int, layer: int, expert: int, lane: int
) -> int:
    """Ask for an expert that a gate's speculation expects: as `submit`, at the lowest priority, and marked."""
    code = request(word_address, failure_address, PREFETCH)
    if code == QUEUE:
        request_word = speculative(pack_request(layer, expert, PAGE_IN, PREFETCH, lane))
        if push(ring, bits, request_word) == PUSHED:
            fetch_add(counters + LaneCounter.REQUESTS * WORD, 1)
        else:
            fetch_add(counters + LaneCounter.RING_FULL * WORD, 1)
    return code
