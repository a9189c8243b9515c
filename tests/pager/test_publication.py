"""A load is visible as soon as it was read; the pager's main thread takes note of it later, and must not mind."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.pager.daemon import Pager
from shmroute.pager.slots import Slots
from shmroute.pager.table import ExpertTable
from shmroute.shared.affinity import power_table
from shmroute.shared.experts import begin_load, publish, request_expert_word
from shmroute.shared.kernel import load_kernels
from shmroute.shared.removal import claim_destruction, unlink_segment
from shmroute.shared.segment import Segment, create_segment
from shmroute.shared.words import FAILED, RESIDENT, URGENT, expert_state
from shmroute.sources.synthetic import SyntheticSource

PATIENCE = 30.0
NOBODY_WAITS = np.empty(0, np.int64)
KEY, SLOT = 5, 0


class Source(SyntheticSource):
    """One layer of eight experts; the first read of expert 3 waits for a gate and then fails."""

    def __init__(self) -> None:
        super().__init__(1, 8, 16, 16)
        self.opened = threading.Event()

    def read_into(
        self, layer: int, expert: int, buffer: memoryview, filled: Callable[[int, int], object] | None = None
    ) -> None:
        if expert == 3:
            assert self.opened.wait(PATIENCE)
            raise OSError(5, "disk")
        super().read_into(layer, expert, buffer, filled)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def segment(source: Source) -> Iterator[Segment]:
    """Of one layer with 8 experts, and 2 slots."""
    load_kernels()
    config = RuntimeConfig(
        1, 8, 1, source.geometry.expert_bytes, 2, max_workers=2, pager=PagerConfig(io_threads=2, prefetch=0),
        source=source.spec,
    )  # fmt: skip
    made = create_segment(f"test-{uuid.uuid4().hex[:12]}", config)
    yield made
    assert claim_destruction(made)
    unlink_segment(made)
    made.close()


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_load_is_published_without_the_main_thread_while_another_is_stuck(segment: Segment, source: Source) -> None:
    pager, table = Pager(segment, source), ExpertTable(segment)
    for key in (3, KEY):
        request_expert_word(table.address(key), table.failure_address(key), URGENT)
    pager._sweep()
    pager._dispatch({})
    eventually(lambda: expert_state(table.word(KEY)) == RESIDENT)
    assert segment.read(segment.layout.resident) == 1 << KEY
    source.opened.set()
    eventually(lambda: pager._loader.has_unpublished)
    assert expert_state(table.word(3)) not in (RESIDENT, FAILED), "that is the main thread's to say"
    eventually(lambda: not pager._collect() and not pager.loading)
    assert expert_state(table.word(3)) == FAILED
    pager.close()


@pytest.fixture
def slots(segment: Segment) -> Slots:
    """An account of slots, in one of which an expert was published whose load was not noted."""
    table = ExpertTable(segment)
    slots = Slots(segment, table, power_table(0.99))
    slots.adopt()
    assert [slots.take(NOBODY_WAITS) for _ in range(2)] == [0, 1], "all slots are in use"
    slots.loading(SLOT)
    request_expert_word(table.address(KEY), table.failure_address(KEY), URGENT)
    assert begin_load(table.address(KEY), SLOT)
    publish(table.address(KEY), table.resident_row(0), KEY, SLOT)
    return slots


def test_an_expert_is_not_evicted_before_its_load_was_noted(slots: Slots) -> None:
    slots.scan()
    slots.evict_first(KEY)
    assert slots.take(NOBODY_WAITS) is None
    assert slots.take(NOBODY_WAITS, lambda victim: True) is None
    slots.loaded(SLOT, KEY)
    assert slots.take(NOBODY_WAITS) == SLOT


def test_an_expert_whose_load_was_noted_can_be_paged_out(slots: Slots) -> None:
    slots.loaded(SLOT, KEY)
    slots.evict_first(KEY)
    assert (slots.take(NOBODY_WAITS), slots.page_outs) == (SLOT, 1)
