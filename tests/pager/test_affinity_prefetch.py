"""`AffinityPrefetch.proposals`: the absent experts of highest affinity in layers that were routed of late."""

from __future__ import annotations

import pytest

from shmroute.pager.prefetch import LOWEST_WORTH, AffinityPrefetch
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import LINE
from shmroute.shared.segment import Segment
from shmroute.shared.words import FAILED, LOADING, REQUESTED, RESIDENT, SCORE_ONE, pack_affinity, pack_expert


@pytest.fixture
def prefetch(segment: Segment) -> AffinityPrefetch:
    return AffinityPrefetch(segment, power_table(segment.config.affinity.decay))


def feel(segment: Segment, layer: int, scores: dict[int, float], clock: int = 1) -> None:
    """Set affinities that are true at `clock`, and the layer's clock."""
    segment.write(segment.layout.clock + layer * LINE, clock)
    for expert, score in scores.items():
        segment.write(segment.layout.affinity(layer, expert), pack_affinity(clock, int(score * SCORE_ONE)))


def put(segment: Segment, layer: int, expert: int, state: int) -> None:
    segment.write(segment.layout.row(segment.layout.experts, layer) + expert * WORD, pack_expert(state, 0, 0, 0))


def keys(proposals: list[tuple[int, float]]) -> list[int]:
    return [key for key, _ in proposals]


def test_the_best_of_all_layers_are_proposed_best_first(segment: Segment, prefetch: AffinityPrefetch) -> None:
    feel(segment, 0, {1: 0.2, 2: 0.9, 3: 0.1})
    feel(segment, 1, {0: 0.5, 7: 0.8})
    proposals = prefetch.proposals(3)
    assert keys(proposals) == [2, 15, 8]
    assert [score for _, score in proposals] == pytest.approx([0.9, 0.8, 0.5], abs=1e-6)


def test_no_more_than_the_room_or_the_budget_is_proposed(segment: Segment, prefetch: AffinityPrefetch) -> None:
    feel(segment, 0, {expert: 0.1 * (expert + 1) for expert in range(8)})
    assert prefetch.proposals(0) == []
    assert prefetch.proposals(-2) == []
    assert keys(prefetch.proposals(2)) == [7, 6]
    feel(segment, 0, {}, clock=2)
    assert keys(prefetch.proposals(99)) == [7, 6, 5]


def test_only_absent_experts_are_proposed(segment: Segment, prefetch: AffinityPrefetch) -> None:
    feel(segment, 0, dict.fromkeys(range(5), 0.5))
    for expert, state in enumerate((RESIDENT, LOADING, REQUESTED, FAILED)):
        put(segment, 0, expert, state)
    assert keys(prefetch.proposals(3)) == [4]


def test_what_was_hardly_used_of_late_is_not_proposed(segment: Segment, prefetch: AffinityPrefetch) -> None:
    feel(segment, 0, {1: LOWEST_WORTH / 2, 2: LOWEST_WORTH * 2})
    assert keys(prefetch.proposals(3)) == [2]
    segment.write(segment.layout.clock, 1000)  # 0.99^999
    assert prefetch.proposals(3) == []


def test_a_layer_that_was_not_routed_since_is_not_looked_at_again(segment: Segment, prefetch: AffinityPrefetch) -> None:
    feel(segment, 0, {1: 0.5})
    assert keys(prefetch.proposals(3)) == [1]
    assert prefetch.proposals(3) == []
    feel(segment, 0, {}, clock=2)
    assert keys(prefetch.proposals(3)) == [1]
