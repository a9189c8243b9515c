"""The lease table: one bit for all leases of a process, gone with the last of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from runtimes import Residency

from shmroute.runtime import Runtime
from shmroute.shared.bell import arm
from shmroute.shared.experts import PENDING, PRESENT, QUEUE
from shmroute.shared.layout import HEADER_BELL
from shmroute.shared.lease_table import (
    CLOSED,
    COUNTS,
    IS_CLOSED,
    NOT_HELD,
    NOT_RESIDENT,
    Ints,
    demand,
    demand_each,
    give_back,
    lease_table,
    take_lease,
)
from shmroute.shared.words import HUNGRY, NORMAL, REQUESTED, RESIDENT, URGENT, expert_mask, expert_priority, expert_slot

LAYER, EXPERT = 1, 7  # the last of both


class Process:
    """What a process holds of a segment whose last expert is resident."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.segment = runtime, runtime._attachment.segment
        self.residency = Residency(runtime)
        self.residency.load(LAYER, EXPERT)
        self.table: Ints = lease_table(self.segment, runtime._attachment.lane().number)
        self.bell = self.segment.address + HEADER_BELL

    @property
    def mask(self) -> int:
        return expert_mask(self.residency.word(LAYER, EXPERT))

    def take(self, holder: Ints) -> int:
        return int(take_lease(self.table, LAYER, EXPERT, holder))

    def give_back(self, holder: Ints) -> int:
        return int(give_back(self.table, LAYER, EXPERT, holder))

    def counted(self) -> int:
        return self.runtime.metrics().workers[0].counters["leases"]


@pytest.fixture
def process(make_runtime: Callable[..., Runtime]) -> Process:
    """A process of its own segment."""
    return Process(make_runtime(num_layers=2))


def holder() -> Ints:
    """A thread without leases."""
    return np.zeros(1, np.int64)


def test_the_bit_goes_with_the_last_lease_of_the_process(process: Process) -> None:
    one, other = holder(), holder()
    slot = expert_slot(process.residency.word(LAYER, EXPERT))
    assert [process.take(one), process.take(one), process.take(other)] == [slot] * 3
    assert (one[0], other[0], process.counted()) == (2, 1, 3)
    for leases, who in ((2, one), (1, other), (0, one)):
        assert process.mask == 1
        assert process.give_back(who) == 0
        assert process.table[COUNTS:].sum() == leases
    assert (process.mask, one[0], other[0]) == (0, 0, 0)


def test_an_expert_that_is_not_resident_leaves_no_count(process: Process) -> None:
    thread = holder()
    assert take_lease(process.table, 0, 0, thread) == NOT_RESIDENT
    assert not process.table[COUNTS:].any()
    assert (thread[0], process.counted()) == (0, 0)


def test_what_is_not_held_is_not_given_back(process: Process) -> None:
    thread, other = holder(), holder()
    assert process.give_back(thread) == NOT_HELD
    process.take(thread)
    assert process.give_back(other) == NOT_HELD
    assert give_back(process.table, 0, 0, thread) == NOT_HELD
    assert (process.mask, thread[0], other[0]) == (1, 1, 0)


def test_a_closed_table_touches_nothing(process: Process) -> None:
    thread = holder()
    process.take(thread)
    process.table[IS_CLOSED] = 1
    before = process.residency.word(LAYER, EXPERT)
    assert process.take(thread) == CLOSED
    assert process.give_back(thread) == 0
    assert process.residency.word(LAYER, EXPERT) == before


def test_the_last_release_hears_a_hungry_pager_and_no_other(process: Process) -> None:
    one, other = holder(), holder()
    arm(process.bell, HUNGRY)
    process.take(one)
    process.take(other)
    assert process.give_back(one) == 0
    assert process.give_back(other) == process.segment.read(HEADER_BELL)
    arm(process.bell, 0)
    process.take(one)
    assert process.give_back(one) == 0


def test_each_missing_expert_is_requested_once(process: Process) -> None:
    wanted = np.array([EXPERT, 0, 3], np.int64)
    assert demand_each(process.table, LAYER, wanted, NORMAL) == 2
    assert demand_each(process.table, LAYER, wanted, NORMAL) == 0
    assert [process.residency.state(LAYER, expert) for expert in (0, 3, EXPERT)] == [REQUESTED, REQUESTED, RESIDENT]
    assert process.residency.state(0, 0) != REQUESTED
    assert [demand(process.table, LAYER, expert, URGENT) for expert in (3, 3, EXPERT)] == [QUEUE, PENDING, PRESENT]
    assert expert_priority(process.residency.word(LAYER, 3)) == URGENT
    assert process.runtime.metrics().workers[0].counters["requests"] == 3
