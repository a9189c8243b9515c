"""Expert words: which transitions there are, one process at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtimes import Memory

from shmroute.shared.atomic import WORD, load, monotonic_ns, store
from shmroute.shared.experts import (
    BROKEN,
    PENDING,
    PRESENT,
    QUEUE,
    begin_load,
    cancel,
    clear_lane,
    evict,
    fail,
    lease,
    publish,
    rebuild_bitmap,
    recover,
    release,
    request_expert_word,
    scan_table,
)
from shmroute.shared.words import (
    ABSENT,
    FAILED,
    FAILURE_CHECKSUM,
    LOADING,
    MAX_SLOTS,
    NORMAL,
    PREFETCH,
    REQUESTED,
    RESIDENT,
    URGENT,
    expert_mask,
    expert_priority,
    expert_slot,
    expert_state,
    pack_expert,
    pack_failure,
)

SLOT = MAX_SLOTS - 1
LAST_LANE = 1 << 31
EXPERT = 63  # the sign bit of its bitmap word


class OneExpert:
    """An expert's word with what belongs to it."""

    def __init__(self, address: int) -> None:
        self.word, self.failure, self.row = address, address + 64, address + 128

    def be(self, state: int, priority: int = 0, slot: int = 0, mask: int = 0) -> None:
        store(self.word, pack_expert(state, priority, slot, mask))

    @property
    def fields(self) -> tuple[int, int, int, int]:
        word = load(self.word)
        return expert_state(word), expert_priority(word), expert_slot(word), expert_mask(word)

    @property
    def in_bitmap(self) -> bool:
        return bool(load(self.row) >> EXPERT & 1)

    def request(self, priority: int) -> int:
        return int(request_expert_word(self.word, self.failure, priority))


@pytest.fixture
def expert(memory: Callable[[int], int]) -> OneExpert:
    """An absent expert."""
    return OneExpert(memory(192))


# ------------------------------------------------------------------ requests


@pytest.mark.parametrize("priority", [PREFETCH, NORMAL, URGENT])
def test_an_absent_expert_is_queued_by_the_first_who_asks(expert: OneExpert, priority: int) -> None:
    assert expert.request(priority) == QUEUE
    assert expert.fields == (REQUESTED, priority, 0, 0)
    assert expert.request(priority) == PENDING


@pytest.mark.parametrize(("had", "asked"), [(PREFETCH, NORMAL), (PREFETCH, URGENT), (NORMAL, URGENT)])
def test_a_higher_priority_is_queued_again(expert: OneExpert, had: int, asked: int) -> None:
    expert.be(REQUESTED, had)
    assert expert.request(asked) == QUEUE
    assert expert.fields == (REQUESTED, asked, 0, 0)


@pytest.mark.parametrize(("had", "asked"), [(URGENT, NORMAL), (NORMAL, PREFETCH), (URGENT, URGENT)])
def test_a_priority_is_never_lowered(expert: OneExpert, had: int, asked: int) -> None:
    expert.be(REQUESTED, had)
    assert expert.request(asked) == PENDING
    assert expert.fields == (REQUESTED, had, 0, 0)


@pytest.mark.parametrize(("state", "answer"), [(LOADING, PENDING), (RESIDENT, PRESENT)])
def test_an_expert_on_its_way_or_here_is_not_requested(expert: OneExpert, state: int, answer: int) -> None:
    expert.be(state, 0, SLOT)
    before = expert.fields
    assert expert.request(URGENT) == answer
    assert expert.fields == before


def test_a_failed_expert_is_broken_until_it_is_due(expert: OneExpert) -> None:
    expert.be(FAILED)
    store(expert.failure, pack_failure(FAILURE_CHECKSUM, 0, monotonic_ns() // 1_000_000 + 60_000))
    assert expert.request(URGENT) == BROKEN
    assert expert.fields == (FAILED, 0, 0, 0)
    store(expert.failure, pack_failure(FAILURE_CHECKSUM, 0, monotonic_ns() // 1_000_000 - 1))
    assert expert.request(NORMAL) == QUEUE
    assert expert.fields == (REQUESTED, NORMAL, 0, 0)


# ------------------------------------------------------------------ loads


def test_a_requested_expert_is_loaded_and_published(expert: OneExpert) -> None:
    expert.be(REQUESTED, NORMAL)
    assert begin_load(expert.word, SLOT)
    assert expert.fields == (LOADING, 0, SLOT, 0)
    assert not expert.in_bitmap
    publish(expert.word, expert.row, EXPERT, SLOT)
    assert expert.fields == (RESIDENT, 0, SLOT, 0)
    assert expert.in_bitmap


@pytest.mark.parametrize("state", [ABSENT, LOADING, RESIDENT, FAILED])
def test_only_what_is_requested_begins_to_load(expert: OneExpert, state: int) -> None:
    expert.be(state, 0, 5)
    before = expert.fields
    assert not begin_load(expert.word, SLOT)
    assert expert.fields == before


def test_a_failed_load_leaves_its_reason_and_no_slot(expert: OneExpert) -> None:
    expert.be(LOADING, 0, SLOT)
    reason = pack_failure(FAILURE_CHECKSUM, 5, 77)
    fail(expert.word, expert.failure, SLOT, reason)
    assert expert.fields == (FAILED, 0, 0, 0)
    assert load(expert.failure) == reason


def test_a_load_that_was_taken_away_is_neither_published_nor_failed(expert: OneExpert) -> None:
    for state, slot in ((LOADING, 3), (REQUESTED, 0)):
        expert.be(state, 0, slot)
        before = expert.fields
        publish(expert.word, expert.row, EXPERT, SLOT)
        assert expert.fields == before
        fail(expert.word, expert.failure, SLOT, 1)
        assert expert.fields == before


# ------------------------------------------------------------------ leases and eviction


def test_each_worker_has_its_own_bit_in_the_mask(expert: OneExpert) -> None:
    expert.be(RESIDENT, 0, SLOT)
    assert lease(expert.word, 1) == SLOT
    assert lease(expert.word, LAST_LANE) == SLOT
    assert expert.fields == (RESIDENT, 0, SLOT, LAST_LANE | 1)
    release(expert.word, 1)
    assert expert.fields == (RESIDENT, 0, SLOT, LAST_LANE)
    release(expert.word, LAST_LANE)
    assert expert.fields == (RESIDENT, 0, SLOT, 0)


@pytest.mark.parametrize("state", [ABSENT, REQUESTED, LOADING, FAILED])
def test_only_a_resident_expert_is_leased(expert: OneExpert, state: int) -> None:
    expert.be(state)
    assert lease(expert.word, 1) == -1
    assert expert.fields == (state, 0, 0, 0)


def test_a_leased_expert_is_not_evicted(expert: OneExpert) -> None:
    expert.be(REQUESTED, URGENT)
    begin_load(expert.word, SLOT)
    publish(expert.word, expert.row, EXPERT, SLOT)
    lease(expert.word, LAST_LANE)
    assert not evict(expert.word, expert.row, EXPERT, SLOT)
    assert expert.in_bitmap
    release(expert.word, LAST_LANE)
    assert evict(expert.word, expert.row, EXPERT, SLOT)
    assert expert.fields == (ABSENT, 0, 0, 0)
    assert not expert.in_bitmap


def test_an_expert_in_another_slot_is_not_evicted(expert: OneExpert) -> None:
    expert.be(RESIDENT, 0, 4)
    assert not evict(expert.word, expert.row, EXPERT, 5)
    assert expert.fields == (RESIDENT, 0, 4, 0)


@pytest.mark.parametrize(
    ("state", "priority", "cancelled"),
    [(REQUESTED, PREFETCH, True), (REQUESTED, NORMAL, False), (REQUESTED, URGENT, False), (LOADING, 0, False)],
)
def test_only_a_prefetch_that_has_not_started_is_cancelled(
    expert: OneExpert, state: int, priority: int, cancelled: bool
) -> None:
    expert.be(state, priority)
    assert bool(cancel(expert.word)) == cancelled
    assert expert.fields == ((ABSENT, 0, 0, 0) if cancelled else (state, priority, 0, 0))


# ------------------------------------------------------------------ tables

LAYERS, EXPERTS, ROW, SLOTS = 3, 70, 576, 8


def test_recovery_requests_what_a_dead_pager_was_loading(memory: Callable[[int], int]) -> None:
    table = memory(LAYERS * ROW)
    words = {
        (0, 0): pack_expert(LOADING, 0, 3, 0),
        (2, 69): pack_expert(LOADING, 0, 0, 0),
        (1, 5): pack_expert(RESIDENT, 0, 1, 1),
        (1, 6): pack_expert(REQUESTED, PREFETCH, 0, 0),
        (1, 7): pack_expert(FAILED, 0, 0, 0),
    }
    for (layer, expert), word in words.items():
        store(table + layer * ROW + expert * WORD, word)
    recover(table, ROW, LAYERS)
    again = pack_expert(REQUESTED, URGENT, 0, 0)
    for (layer, expert), word in words.items():
        expected = again if expert_state(word) == LOADING else word
        assert load(table + layer * ROW + expert * WORD) == expected


@pytest.mark.parametrize("bit", [1, LAST_LANE])
def test_clearing_a_lane_releases_its_leases_and_no_others(memory: Callable[[int], int], bit: int) -> None:
    table, other = memory(LAYERS * ROW), 1 << 7
    for layer in range(LAYERS):
        store(table + layer * ROW, pack_expert(RESIDENT, 0, layer, bit | other))
        store(table + layer * ROW + WORD, pack_expert(RESIDENT, 0, layer + 3, bit))
        store(table + layer * ROW + 2 * WORD, pack_expert(LOADING, 0, 7, 0))
    clear_lane(table, ROW, LAYERS, bit)
    for layer in range(LAYERS):
        assert load(table + layer * ROW) == pack_expert(RESIDENT, 0, layer, other)
        assert load(table + layer * ROW + WORD) == pack_expert(RESIDENT, 0, layer + 3, 0)
        assert load(table + layer * ROW + 2 * WORD) == pack_expert(LOADING, 0, 7, 0)


STATES = st.sampled_from([ABSENT, REQUESTED, LOADING, RESIDENT, FAILED])


@settings(max_examples=40)
@given(st.dictionaries(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), STATES, max_size=SLOTS))
def test_the_table_tells_owners_requests_and_bitmap(states: dict[tuple[int, int], int]) -> None:
    block, bitmap = Memory(LAYERS * ROW), Memory(2 * WORD)
    owners, found = np.empty(SLOTS, np.int64), np.empty(LAYERS * EXPERTS, np.int64)
    expected_owners = [-1] * SLOTS
    for slot, ((layer, expert), state) in enumerate(states.items()):
        in_slot = state in (LOADING, RESIDENT)
        word = pack_expert(state, NORMAL if state == REQUESTED else 0, slot if in_slot else 0, 0)
        store(block.address + layer * ROW + expert * WORD, word)
        if in_slot:
            expected_owners[slot] = layer * EXPERTS + expert

    count = scan_table(
        block.address, ROW, LAYERS, EXPERTS, owners.ctypes.data, SLOTS, found.ctypes.data
    )  # fmt: skip
    assert owners.tolist() == expected_owners
    requested = sorted(layer * EXPERTS + expert for (layer, expert), state in states.items() if state == REQUESTED)
    assert found[:count].tolist() == requested

    for layer in range(LAYERS):
        rebuild_bitmap(block.address + layer * ROW, bitmap.address, EXPERTS)
        bits = [expert for expert in range(EXPERTS) if load(bitmap.address + expert // 64 * WORD) >> expert % 64 & 1]
        assert bits == sorted(e for (at, e), state in states.items() if at == layer and state == RESIDENT)
    block.close()
    bitmap.close()


def test_a_scan_survives_a_slot_that_does_not_exist(memory: Callable[[int], int]) -> None:
    table = memory(ROW)
    store(table, pack_expert(RESIDENT, 0, SLOTS, 0))
    owners, found = np.empty(SLOTS, np.int64), np.empty(EXPERTS, np.int64)
    assert scan_table(table, ROW, 1, EXPERTS, owners.ctypes.data, SLOTS, found.ctypes.data) == 0
    assert owners.tolist() == [-1] * SLOTS
