"""`Eviction.victim`: the lowest current affinity that nobody reads or waits for."""

from __future__ import annotations

import numpy as np
import pytest

from shmroute.pager.eviction import Eviction
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import LINE
from shmroute.shared.segment import Segment
from shmroute.shared.words import LOADING, RESIDENT, SCORE_ONE, pack_affinity, pack_expert

NOBODY_WAITS = np.empty(0, np.int64)


@pytest.fixture
def eviction(segment: Segment) -> Eviction:
    """Slots 0 to 3 hold experts 0 and 1 of either layer, with affinities 0.5, 0.4, 0.3 and 0.2."""
    made = Eviction(segment, power_table(segment.config.affinity.decay))
    for slot, (layer, expert) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        put(segment, layer, expert, pack_expert(RESIDENT, 0, slot, 0))
        feel(segment, layer, expert, 0.5 - slot / 10)
        made.owners[slot] = layer * 8 + expert
    return made


def put(segment: Segment, layer: int, expert: int, word: int) -> None:
    segment.write(segment.layout.row(segment.layout.experts, layer) + expert * WORD, word)


def feel(segment: Segment, layer: int, expert: int, score: float, tick: int = 0) -> None:
    word = pack_affinity(tick, int(score * SCORE_ONE))
    segment.write(segment.layout.row(segment.layout.affinity, layer) + expert * WORD, word)


def pass_time(segment: Segment, layer: int, clock: int) -> None:
    segment.write(segment.layout.clock + layer * LINE, clock)


def test_the_lowest_affinity_goes_first(eviction: Eviction) -> None:
    slot, score = eviction.victim(NOBODY_WAITS) or (-1, 0.0)
    assert slot == 3
    assert score == pytest.approx(0.2, abs=1e-6)


def test_affinity_counts_as_it_is_now_not_as_it_was_written(segment: Segment, eviction: Eviction) -> None:
    pass_time(segment, 0, 200)  # 0.5 and 0.4 of layer 0 have decayed by 0.99^200
    slot, score = eviction.victim(NOBODY_WAITS) or (-1, 0.0)
    assert slot == 1
    assert score == pytest.approx(0.4 * 0.99**200, rel=1e-5)


def test_of_equal_scores_the_older_one_goes_first(segment: Segment, eviction: Eviction) -> None:
    for layer, expert in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        feel(segment, layer, expert, 0.0, tick=10 if (layer, expert) != (1, 0) else 4)
    pass_time(segment, 0, 12)
    pass_time(segment, 1, 12)
    assert (eviction.victim(NOBODY_WAITS) or (-1, 0.0))[0] == 2


def test_the_leased_the_loading_and_the_awaited_are_passed_over(segment: Segment, eviction: Eviction) -> None:
    put(segment, 1, 1, pack_expert(RESIDENT, 0, 3, 1 << 31))
    assert (eviction.victim(NOBODY_WAITS) or (-1, 0.0))[0] == 2
    put(segment, 1, 0, pack_expert(LOADING, 0, 2, 0))
    assert (eviction.victim(NOBODY_WAITS) or (-1, 0.0))[0] == 1
    assert (eviction.victim(np.array([5, 1], np.int64)) or (-1, 0.0))[0] == 0
    assert eviction.victim(np.array([0, 1], np.int64)) is None


def test_empty_slots_have_no_victim(eviction: Eviction) -> None:
    for slot in range(4):
        eviction.emptied(slot)
    assert eviction.victim(NOBODY_WAITS) is None


def test_a_load_counts_as_an_activation(segment: Segment, eviction: Eviction) -> None:
    eviction.loaded(3, 9)
    assert (eviction.victim(NOBODY_WAITS) or (-1, 0.0))[0] == 2
    pass_time(segment, 1, 1000)  # and decays like one
    feel(segment, 1, 0, 0.3, tick=1000)
    assert (eviction.victim(NOBODY_WAITS) or (-1, 0.0))[0] == 3


def test_a_slot_that_was_emptied_forgets_its_load(eviction: Eviction) -> None:
    eviction.loaded(3, 9)
    eviction.emptied(3)
    eviction.owners[3] = 9
    assert (eviction.victim(NOBODY_WAITS) or (-1, 0.0))[0] == 3
