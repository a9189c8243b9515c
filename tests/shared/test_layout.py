"""The layout: regions adjoin without overlap, what is contended has a line of its own."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmroute.shared import layout as names
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import CONSTANTS, LINE, PAGE, Layout, compiled_constants
from shmroute.shared.metrics import PAGER_SHARD_WORDS

LAYOUTS = st.builds(
    Layout,
    num_layers=st.integers(1, 100),
    num_experts=st.integers(1, 300),
    max_workers=st.integers(1, 32),
    slots=st.integers(1, 1000),
    slot_bytes=st.integers(1, 100).map(lambda pages: pages * PAGE),
    config_bytes=st.integers(1, 20_000),
)
TABLES = ("experts", "checksums", "failures")
SMALL = Layout(2, 9, 4, 5, PAGE, 700)


def regions(layout: Layout) -> list[tuple[str, int, int]]:
    """Name, start and size of everything in a segment."""
    rows = layout.num_layers * layout.row_bytes
    return [
        ("header", 0, names.HEADER_CONFIG + layout.config_bytes),
        ("clock", layout.clock, layout.num_layers * LINE),
        ("bonus", layout.bonus, layout.num_layers * LINE),
        ("uses", layout.uses, layout.num_layers * layout.use_row_bytes),
        *((name, getattr(layout, name), rows) for name in TABLES),
        ("resident", layout.resident, layout.num_layers * layout.resident_row_bytes),
        ("successors", layout.successors, layout.num_layers * layout.successor_row_bytes),
        ("ring", layout.ring, names.RING_ENTRIES + (WORD << layout.ring_bits)),
        ("lanes", layout.lanes, layout.max_workers * layout.lane_bytes),
        ("pager", layout.pager, PAGER_SHARD_WORDS * WORD),
        ("slot headers", layout.slot_headers, layout.slots * names.SLOT_HEADER_BYTES),
        ("pool", layout.pool, layout.slots * layout.slot_bytes),
    ]  # fmt: skip


@given(LAYOUTS)
def test_no_two_regions_overlap_and_all_are_inside(layout: Layout) -> None:
    ordered = sorted((start, start + size) for _, start, size in regions(layout))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ordered))
    assert ordered[-1][1] <= layout.total_bytes
    assert layout.control_bytes <= layout.slot_headers


@given(LAYOUTS)
def test_every_region_starts_on_a_line_and_every_slot_on_a_page(layout: Layout) -> None:
    assert all(start % LINE == 0 for _, start, _ in regions(layout))
    assert layout.pool % PAGE == layout.slot_bytes % PAGE == layout.total_bytes % PAGE == 0
    assert layout.slot(layout.slots - 1) == layout.pool + (layout.slots - 1) * layout.slot_bytes


@given(LAYOUTS)
def test_the_rows_of_a_layer_and_the_lanes_start_on_lines(layout: Layout) -> None:
    assert layout.row_bytes % LINE == layout.resident_row_bytes % LINE == layout.lane_bytes % LINE == 0
    assert layout.use_row_bytes % LINE == 0
    assert layout.use_row_bytes >= layout.num_experts * names.USE_BYTES
    assert layout.use_row(1) == layout.uses + layout.use_row_bytes
    assert layout.successor_row_bytes % LINE == 0
    assert layout.row_bytes >= layout.num_experts * WORD
    assert layout.resident_row_bytes * 8 >= layout.num_experts
    assert layout.row(layout.experts, 1) == layout.experts + layout.row_bytes


@given(LAYOUTS)
def test_what_one_use_of_an_expert_changes_is_on_one_line(layout: Layout) -> None:
    last = layout.num_layers - 1
    for expert in range(layout.num_experts):
        affinity, activations = layout.affinity(last, expert), layout.activations(last, expert)
        assert affinity != activations
        assert affinity // LINE == activations // LINE
    assert layout.use_row(last) <= affinity < activations < layout.use_row(last) + layout.use_row_bytes


def test_contended_words_have_lines_of_their_own() -> None:
    header = [names.HEADER_STATE, names.HEADER_OWNER, names.HEADER_PAGER, names.HEADER_STANDBY, names.HEADER_BELL]
    assert len({offset // LINE for offset in [0, *header, names.HEADER_CONFIG]}) == len(header) + 2
    lane = [names.LANE_IDENTITY, names.LANE_WAIT, names.LANE_BELL, names.LANE_SHARD]
    assert [offset % LINE for offset in lane] == [0] * 4
    assert len({offset // LINE for offset in lane}) == 4
    ring = [names.RING_HEAD, names.RING_TAIL, names.RING_ENTRIES]
    assert len({(SMALL.ring + offset) // LINE for offset in ring}) == 3


def test_the_headers_fixed_part_does_not_overlap() -> None:
    fixed = [
        (names.HEADER_MAGIC, 8), (names.HEADER_ABI, 8), (names.HEADER_TOTAL_BYTES, 8), (names.HEADER_FINGERPRINT, 8),
        (names.HEADER_UUID, 16), (names.HEADER_PID_NAMESPACE, 8), (names.HEADER_CONFIG_BYTES, 8),
        (names.HEADER_STATE, 8),
    ]  # fmt: skip
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(fixed))


def test_a_large_models_control_part_is_at_most_four_mebibytes() -> None:
    layout = Layout(61, 256, 32, 1000, 44 << 20, 2000)
    assert layout.control_bytes <= 4 << 20


@given(LAYOUTS)
def test_a_ring_holds_all_experts_or_8192(layout: Layout) -> None:
    assert 1 << layout.ring_bits >= min(layout.num_layers * layout.num_experts, 8192)
    assert 4 <= layout.ring_bits <= 13


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Layout) if field.init])
def test_the_fingerprint_changes_with_any_size(field: str) -> None:
    other = dataclasses.replace(SMALL, **{field: getattr(SMALL, field) * 2})
    assert other.fingerprint != SMALL.fingerprint
    assert dataclasses.replace(SMALL).fingerprint == SMALL.fingerprint


@given(LAYOUTS)
def test_fingerprints_are_positive_words(layout: Layout) -> None:
    assert 0 <= layout.fingerprint < 1 << 63


def test_kernels_were_compiled_with_this_processs_constants() -> None:
    assert compiled_constants() == CONSTANTS
