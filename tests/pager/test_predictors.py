"""The pager's predictors: which absent experts of a layer each would load."""

from __future__ import annotations

import numpy as np
import pytest

from shmroute.pager.eviction.policy import Eviction
from shmroute.pager.prefetch.affinity import LOWEST
from shmroute.pager.prefetch.candidates import find_candidates, layers_until_use
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import LINE
from shmroute.shared.metrics import Predictor
from shmroute.shared.segment import Segment
from shmroute.shared.words import (
    FAILED,
    FOLLOW_ONE,
    LOADING,
    REQUESTED,
    RESIDENT,
    SCORE_ONE,
    SUCCESSORS,
    pack_affinity,
    pack_expert,
    pack_follow,
)


class Pager:
    """The eviction's observations, and candidates by them."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._powers = power_table(segment.config.affinity.decay)
        self.eviction = Eviction(segment, self._powers)

    def candidates(self, predictor: Predictor, layer: int, count: int = 3) -> list[int]:
        """Experts, best first."""
        layout, experts = self.segment.layout, self.segment.config.num_experts
        scores, keys = np.zeros(experts), np.zeros(count, np.int64)
        found = find_candidates(
            self.eviction.table, self.segment.address + layout.successors, layout.successor_row_bytes,
            predictor, layer, scores.ctypes.data, keys.ctypes.data, count,
        )  # fmt: skip
        assert (keys[:found] // experts == layer).all()
        return [int(key) % experts for key in keys[:found]]


@pytest.fixture
def pager(segment: Segment) -> Pager:
    return Pager(segment)


def feel(segment: Segment, layer: int, scores: dict[int, float], clock: int = 1) -> None:
    """Set affinities that are true at `clock`, and the layer's clock."""
    segment.write(segment.layout.clock + layer * LINE, clock)
    for expert, score in scores.items():
        segment.write(segment.layout.affinity(layer, expert), pack_affinity(clock, int(score * SCORE_ONE)))


def put(segment: Segment, layer: int, expert: int, state: int) -> None:
    segment.write(segment.layout.row(segment.layout.experts, layer) + expert * WORD, pack_expert(state, 0, 0, 0))


def follow(segment: Segment, layer: int, expert: int, followers: dict[int, float]) -> None:
    row = segment.layout.successors + layer * segment.layout.successor_row_bytes
    for i, (follower, share) in enumerate(followers.items()):
        word = pack_follow(follower + 1, int(share * FOLLOW_ONE))
        segment.write(row + (expert * SUCCESSORS + i) * WORD, word)


def test_affinity_proposes_the_absent_experts_used_most_of_late(segment: Segment, pager: Pager) -> None:
    feel(segment, 0, {1: 0.2, 2: 0.9, 3: 0.1, 5: 0.5, 6: 0.5})
    assert pager.candidates(Predictor.AFFINITY, 0) == [2, 5, 6]
    assert pager.candidates(Predictor.AFFINITY, 0, count=99) == [2, 5, 6, 1, 3]
    assert pager.candidates(Predictor.AFFINITY, 1) == []


def test_only_absent_experts_are_proposed(segment: Segment, pager: Pager) -> None:
    feel(segment, 0, dict.fromkeys(range(5), 0.5))
    for expert, state in enumerate((RESIDENT, LOADING, REQUESTED, FAILED)):
        put(segment, 0, expert, state)
    for predictor in (Predictor.AFFINITY, Predictor.PREVIOUS_TOKEN):
        assert pager.candidates(predictor, 0) == [4]


def test_what_was_hardly_used_of_late_has_no_affinity(segment: Segment, pager: Pager) -> None:
    feel(segment, 0, {1: LOWEST / 2, 2: LOWEST * 2})
    assert pager.candidates(Predictor.AFFINITY, 0) == [2]
    segment.write(segment.layout.clock, 1000)  # 0.99^999
    assert pager.candidates(Predictor.AFFINITY, 0) == []


def test_the_previous_token_is_what_the_latest_ticks_used(segment: Segment, pager: Pager) -> None:
    feel(segment, 0, {1: 1.0, 2: 1.0}, clock=8)
    feel(segment, 0, {3: 0.2, 4: 0.1}, clock=9)
    assert pager.candidates(Predictor.PREVIOUS_TOKEN, 0) == [3, 4]
    segment.write(segment.layout.clock, 10)
    assert pager.candidates(Predictor.PREVIOUS_TOKEN, 0) == []


def test_transitions_propose_what_follows_the_latest_choice_of_the_layer_before(segment: Segment, pager: Pager) -> None:
    follow(segment, 0, 1, {5: 0.9, 6: 0.5})
    follow(segment, 0, 2, {6: 0.7, 7: 0.3})
    follow(segment, 0, 4, {0: 1.0})
    feel(segment, 0, {4: 1.0}, clock=8)
    feel(segment, 0, {1: 1.0, 2: 1.0}, clock=9)
    assert pager.candidates(Predictor.TRANSITIONS, 1) == [6, 5]  # of two, 6 follows 0.6 on average, 5 0.45, 7 0.15
    put(segment, 1, 6, RESIDENT)
    assert pager.candidates(Predictor.TRANSITIONS, 1) == [5]


def test_the_first_layer_follows_the_last(segment: Segment, pager: Pager) -> None:
    follow(segment, 1, 3, {2: 0.8})
    feel(segment, 1, {3: 1.0}, clock=4)
    assert pager.candidates(Predictor.TRANSITIONS, 0) == [2]


def test_what_is_used_more_is_expected_sooner(segment: Segment, pager: Pager) -> None:
    layout = segment.layout
    for token in range(1, 40):
        segment.write(layout.clock, token)
        segment.write(layout.activations(0, 1), token)
        segment.write(layout.activations(0, 2), token // 3)
        pager.eviction.observe()
    often, seldom, never = (layers_until_use(pager.eviction.table, expert) for expert in (1, 2, 3))
    assert 0 < often < seldom < never
