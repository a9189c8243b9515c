"""What publishing a load writes: header, checksum, word, bit and counters."""

from __future__ import annotations

from shmroute.pager.publishing import DIFFERS, Publisher, charge
from shmroute.pager.table import ExpertTable
from shmroute.shared import layout as at
from shmroute.shared.atomic import WORD
from shmroute.shared.experts import begin_load, request_expert_word
from shmroute.shared.layout import LANE_SHARD
from shmroute.shared.metrics import LaneCounter, PagerCounter
from shmroute.shared.segment import Segment
from shmroute.shared.words import LOADING, RESIDENT, URGENT, expert_slot, expert_state, pack_wait

LAYER, EXPERT, SLOT = 1, 5, 3


def loading(segment: Segment) -> tuple[ExpertTable, int]:
    """The table, and the key of an expert that is LOADING."""
    table = ExpertTable(segment)
    key = table.key(LAYER, EXPERT)
    request_expert_word(table.address(key), table.failure_address(key), URGENT)
    assert begin_load(table.address(key), SLOT)
    return table, key


def counter(segment: Segment, which: PagerCounter) -> int:
    return segment.read(segment.layout.pager + which * WORD)


def test_a_first_load_becomes_visible_with_its_header_and_is_counted(segment: Segment) -> None:
    table, key = loading(segment)
    assert Publisher(segment).publish(key, SLOT, 77, 1_000, prefetch=True) == 0
    assert (expert_state(table.word(key)), expert_slot(table.word(key))) == (RESIDENT, SLOT)
    assert segment.read(segment.layout.resident + LAYER * segment.layout.resident_row_bytes) == 1 << EXPERT
    header = segment.layout.slot_headers + SLOT * at.SLOT_HEADER_BYTES
    assert segment.read(header + at.SLOT_OWNER) == pack_wait(LAYER, EXPERT)
    assert segment.read(header + at.SLOT_LENGTH) == segment.config.expert_bytes
    assert [counter(segment, which) for which in (PagerCounter.LOADS, PagerCounter.PREFETCHES)] == [1, 1]
    assert counter(segment, PagerCounter.BYTES_READ) == segment.config.expert_bytes


def test_bytes_that_differ_from_the_first_loads_stay_invisible(segment: Segment) -> None:
    table, key = loading(segment)
    segment.write(table.offset(segment.layout.checksums, key), 77)
    assert Publisher(segment).publish(key, SLOT, 78, 1_000, prefetch=False) == DIFFERS
    assert Publisher(segment).first_checksum(key) == 77
    assert expert_state(table.word(key)) == LOADING
    assert segment.read(segment.layout.resident + LAYER * segment.layout.resident_row_bytes) == 0
    assert segment.read(table.offset(segment.layout.checksums, key)) == 77
    assert counter(segment, PagerCounter.LOADS) == 0


def test_a_load_is_charged_to_the_lane_that_asked(segment: Segment) -> None:
    lane = segment.address + segment.layout.lane(2)
    charge(lane, 3)
    shard = segment.layout.lane(2) + LANE_SHARD
    assert segment.read(shard + LaneCounter.LOADS * WORD) == 1
    assert segment.read(shard + LaneCounter.EVICTIONS * WORD) == 3
