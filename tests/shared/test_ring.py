"""The request ring, one process at a time. (Its interleavings are tested elsewhere.)"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtimes import Memory

from shmroute.shared.atomic import WORD, load, signed, store
from shmroute.shared.layout import RING_ENTRIES, RING_HEAD, RING_TAIL
from shmroute.shared.requests import PagingRequest
from shmroute.shared.ring import EMPTY, FULL, PUSHED, push, ring_has_work, ring_pop, ring_push
from shmroute.shared.words import LOW32, NO_LANE, PAGE_OUT, URGENT, pack_request

BITS = 4
SIZE = 1 << BITS
BYTES = RING_ENTRIES + SIZE * WORD
STARTS = [SIZE, SIZE * ((1 << 31) - 1) + 3, SIZE * ((1 << 32) - 1), SIZE * (1 << 32) - 5, SIZE * (1 << 32)]
LARGEST_REQUEST = (1 << 31) - 1


def put_cursors(ring: int, position: int) -> None:
    """An empty ring whose next position is `position`: every entry carries the lap before the one it waits for."""
    for next_use in range(position, position + SIZE):
        store(ring + RING_ENTRIES + (next_use % SIZE) * WORD, signed((((next_use >> BITS) - 1) & LOW32) << 32))
    store(ring + RING_HEAD, position)
    store(ring + RING_TAIL, position)


@pytest.fixture(params=STARTS, ids=["first lap", "lap 2^31", "last lap", "across lap 2^32", "lap 0 again"])
def ring(request: pytest.FixtureRequest, memory: Callable[[int], int]) -> int:
    """An empty ring of 16 entries."""
    address = memory(BYTES)
    put_cursors(address, request.param)
    return address


def test_requests_come_out_in_the_order_they_went_in(ring: int) -> None:
    for lap in range(5):
        requests = [lap * 100 + i for i in range(SIZE - 3)]
        assert [ring_push(ring, BITS, request) for request in requests] == [PUSHED] * len(requests)
        assert [ring_pop(ring, BITS) for _ in requests] == requests


def test_an_empty_ring_says_so(ring: int) -> None:
    assert ring_pop(ring, BITS) == EMPTY
    assert not ring_has_work(ring, BITS)


def test_a_full_ring_refuses_and_keeps_what_it_has(ring: int) -> None:
    assert {ring_push(ring, BITS, request) for request in range(SIZE)} == {PUSHED}
    assert ring_push(ring, BITS, 99) == FULL
    assert ring_pop(ring, BITS) == 0
    assert ring_push(ring, BITS, 100) == PUSHED
    assert ring_push(ring, BITS, 101) == FULL
    assert [ring_pop(ring, BITS) for _ in range(SIZE + 1)] == [*range(1, SIZE), 100, EMPTY]


def publish_without_advancing_tail(ring: int, request: int) -> None:
    """What a producer leaves that dies right after its linearization point."""
    tail = load(ring + RING_TAIL)
    store(ring + RING_ENTRIES + (tail % SIZE) * WORD, signed(((tail >> BITS) & LOW32) << 32 | request))


def test_a_lagging_tail_is_helped_along_by_the_next_producer(ring: int) -> None:
    publish_without_advancing_tail(ring, 7)
    assert ring_push(ring, BITS, 8) == PUSHED
    assert [ring_pop(ring, BITS) for _ in range(3)] == [7, 8, EMPTY]


def test_a_request_behind_a_lagging_tail_is_there(ring: int) -> None:
    publish_without_advancing_tail(ring, 7)
    assert ring_has_work(ring, BITS)
    assert ring_pop(ring, BITS) == 7


def test_a_head_that_passed_a_lagging_tail_does_not_look_full(ring: int) -> None:
    publish_without_advancing_tail(ring, 7)
    assert ring_pop(ring, BITS) == 7
    assert load(ring + RING_TAIL) - load(ring + RING_HEAD) == -1
    assert not ring_has_work(ring, BITS)
    assert ring_push(ring, BITS, 8) == PUSHED
    assert [ring_pop(ring, BITS) for _ in range(2)] == [8, EMPTY]


def test_a_head_that_passes_the_tail_during_a_push_does_not_look_full(
    ring: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others publish behind the tail, and take that, between two of a producer's loads."""
    others = iter([lambda: (publish_without_advancing_tail(ring, 7), ring_pop(ring, BITS))])

    def load_late(address: int) -> int:
        if address == ring + RING_HEAD:
            next(others, lambda: None)()
        return load(address)

    monkeypatch.setattr("shmroute.shared.ring.load", load_late)
    assert push(ring, BITS, 8) == PUSHED
    monkeypatch.undo()
    assert [ring_pop(ring, BITS) for _ in range(2)] == [8, EMPTY]


def test_the_largest_request_survives_and_an_impossible_one_is_still_a_request(ring: int) -> None:
    nonsense = pack_request(1023, 4095, PAGE_OUT, URGENT, NO_LANE)
    for request in (LARGEST_REQUEST, nonsense):
        assert ring_push(ring, BITS, request) == PUSHED
        assert ring_pop(ring, BITS) == request
    unpacked = PagingRequest.unpack(nonsense)
    assert (unpacked.layer, unpacked.expert, unpacked.direction, unpacked.priority) == (1023, 4095, PAGE_OUT, URGENT)


def test_a_request_with_priority_zero_is_none() -> None:
    with pytest.raises(ValueError, match="0 is not a valid PagingPriority"):
        PagingRequest.unpack(0)


def test_numpy_integers_are_pushed_like_pythons(ring: int) -> None:
    """Kernels that run interpreted take them from their plans."""
    assert push(ring, BITS, np.int64(LARGEST_REQUEST)) == PUSHED
    assert ring_pop(ring, BITS) == LARGEST_REQUEST


@settings(max_examples=60)
@given(
    start=st.one_of(st.sampled_from(STARTS), st.integers(SIZE, SIZE << 33)),
    steps=st.lists(st.one_of(st.integers(0, LARGEST_REQUEST), st.none()), max_size=80),
)
def test_a_ring_is_a_bounded_queue(start: int, steps: list[int | None]) -> None:
    block = Memory(BYTES)
    put_cursors(block.address, start)
    queue: deque[int] = deque()
    for request in steps:
        if request is None:
            assert ring_pop(block.address, BITS) == (queue.popleft() if queue else EMPTY)
        elif ring_push(block.address, BITS, request) == PUSHED:
            queue.append(request)
            assert len(queue) <= SIZE
        else:
            assert len(queue) == SIZE
        assert ring_has_work(block.address, BITS) == bool(queue)
    block.close()
