"""`Eviction.victim`: of the experts that nobody reads or waits for, the one that the policy ranks last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from shmroute.config import PagerConfig
from shmroute.pager.eviction import history
from shmroute.pager.eviction.names import POLICIES
from shmroute.pager.eviction.next_use import (
    LAST_TOKEN_GAIN,
    TOKEN_BEFORE_GAIN,
    rank_by_odds,
    rank_factor,
    tokens_until_use,
)
from shmroute.pager.eviction.policy import Eviction
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import LANE_CURSOR, LANE_IDENTITY, LINE
from shmroute.shared.segment import Segment
from shmroute.shared.words import LIVE, LOADING, RESIDENT, SCORE_ONE, pack_affinity, pack_expert, pack_identity

NOBODY_WAITS = np.empty(0, np.int64)
EXPERTS = 8
Make = Callable[[str], Eviction]


@pytest.fixture
def make(segment: Segment) -> Make:
    """Slots 0 to 3 hold experts 0 and 1 of either layer: keys 0, 1, 8 and 9."""

    def made(policy: str) -> Eviction:
        config = dataclasses.replace(segment.config, pager=PagerConfig(eviction=policy))
        eviction = Eviction(dataclasses.replace(segment, config=config), power_table(segment.config.affinity.decay))
        for slot, (layer, expert) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            put(segment, layer, expert, pack_expert(RESIDENT, 0, slot, 0))
            eviction.owners[slot] = layer * EXPERTS + expert
        return eviction

    return made


@pytest.fixture
def by_affinity(segment: Segment, make: Make) -> Eviction:
    """Affinities 0.5, 0.4, 0.3 and 0.2."""
    for slot, (layer, expert) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        feel(segment, layer, expert, 0.5 - slot / 10)
    return make("affinity")


def row(segment: Segment, region: int, layer: int, expert: int) -> int:
    return segment.layout.row(region, layer) + expert * WORD


def put(segment: Segment, layer: int, expert: int, word: int) -> None:
    segment.write(row(segment, segment.layout.experts, layer, expert), word)


def feel(segment: Segment, layer: int, expert: int, score: float, tick: int = 0) -> None:
    segment.write(segment.layout.affinity(layer, expert), pack_affinity(tick, int(score * SCORE_ONE)))


def pass_time(segment: Segment, layer: int, clock: int) -> None:
    segment.write(segment.layout.clock + layer * LINE, clock)


def route(segment: Segment, layer: int, experts: tuple[int, ...], tokens: int = 1, lane: int = 0) -> None:
    """Publish what routing some tokens to the same experts publishes."""
    layout = segment.layout
    clock = segment.read(layout.clock + layer * LINE) + tokens
    pass_time(segment, layer, clock)
    for expert in experts:
        feel(segment, layer, expert, 1.0, clock)
        offset = layout.activations(layer, expert)
        segment.write(offset, segment.read(offset) + tokens)
    segment.write(layout.lane(lane) + LANE_IDENTITY, pack_identity(LIVE, 0, 0, lane + 1))
    segment.write(layout.lane(lane) + LANE_CURSOR, layer)


def first_to_go(eviction: Eviction, awaited: tuple[int, ...] = ()) -> int | None:
    found = eviction.victim(np.array(awaited, np.int64))
    return None if found is None else found[0]


def order(segment: Segment, eviction: Eviction) -> list[int]:
    """All four, in the order in which they go."""
    keys = []
    while (key := first_to_go(eviction)) is not None:
        keys.append(key)
        put(segment, *divmod(key, EXPERTS), 0)
    return keys


# ------------------------------------------------------------------ what can go at all, whatever the policy


@pytest.mark.parametrize("policy", POLICIES)
def test_the_leased_the_loading_and_the_awaited_are_passed_over(segment: Segment, make: Make, policy: str) -> None:
    eviction = make(policy)
    put(segment, 1, 1, pack_expert(RESIDENT, 0, 3, 1 << 31))
    put(segment, 1, 0, pack_expert(LOADING, 0, 2, 0))
    assert first_to_go(eviction, (5, 1)) == 0
    assert first_to_go(eviction, (0, 1)) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_candidate_that_was_leased_meanwhile_is_passed_over_and_comes_back(
    segment: Segment, make: Make, policy: str
) -> None:
    eviction = make(policy)
    first = first_to_go(eviction)
    assert first is not None
    word = segment.read(row(segment, segment.layout.experts, *divmod(first, EXPERTS)))
    put(segment, *divmod(first, EXPERTS), word | 1)
    assert first_to_go(eviction) not in (first, None)
    put(segment, *divmod(first, EXPERTS), word)
    assert first_to_go(eviction) == first


@pytest.mark.parametrize("policy", POLICIES)
def test_the_last_lease_that_ends_leaves_a_victim(segment: Segment, make: Make, policy: str) -> None:
    eviction = make(policy)
    for slot, key in enumerate((0, 1, 8, 9)):
        put(segment, *divmod(key, EXPERTS), pack_expert(RESIDENT, 0, slot, 1))
    assert first_to_go(eviction) is None
    put(segment, 1, 0, pack_expert(RESIDENT, 0, 2, 0))
    assert first_to_go(eviction) == 8


@pytest.mark.parametrize("policy", POLICIES)
def test_empty_slots_have_no_victim(make: Make, policy: str) -> None:
    eviction = make(policy)
    for slot in range(4):
        eviction.emptied(slot)
    assert first_to_go(eviction) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_new_pager_ranks_what_a_former_one_left(segment: Segment, make: Make, policy: str) -> None:
    for _ in range(5):
        route(segment, 0, (0, 1))
        route(segment, 1, (1, 2))
    eviction = make(policy)
    assert sorted(order(segment, eviction)) == [0, 1, 8, 9]


# ------------------------------------------------------------------ affinity


def test_the_lowest_affinity_goes_first(by_affinity: Eviction) -> None:
    key, score = by_affinity.victim(NOBODY_WAITS) or (-1, 0.0)
    assert key == 9
    assert score == pytest.approx(0.2, abs=1e-6)


def test_affinity_counts_as_it_is_now_not_as_it_was_written(segment: Segment, by_affinity: Eviction) -> None:
    pass_time(segment, 0, 200)  # 0.5 and 0.4 of layer 0 have decayed by 0.99^200
    by_affinity.observe()
    key, score = by_affinity.victim(NOBODY_WAITS) or (-1, 0.0)
    assert key == 1
    assert score == pytest.approx(0.4 * 0.99**200, rel=1e-5)


def test_of_equal_affinities_the_older_one_goes_first(segment: Segment, by_affinity: Eviction) -> None:
    for layer, expert in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        feel(segment, layer, expert, 0.0, tick=10 if (layer, expert) != (1, 0) else 4)
    pass_time(segment, 0, 12)
    pass_time(segment, 1, 12)
    by_affinity.observe()
    assert first_to_go(by_affinity) == 8


def test_a_load_counts_as_an_activation(segment: Segment, by_affinity: Eviction) -> None:
    by_affinity.loaded(3, 9)
    assert first_to_go(by_affinity) == 8
    pass_time(segment, 1, 1000)  # and decays like one
    feel(segment, 1, 0, 0.3, tick=1000)
    by_affinity.observe()
    assert first_to_go(by_affinity) == 9


# ------------------------------------------------------------------ the others


def test_lru_goes_by_the_last_use_over_all_layers(segment: Segment, make: Make) -> None:
    eviction = make("lru")
    for layer, expert in [(1, 1), (0, 0), (1, 0), (0, 1), (0, 0)]:
        route(segment, layer, (expert,))
        eviction.observe()
    assert order(segment, eviction) == [9, 8, 1, 0]


def test_lfu_goes_by_activations_and_equals_by_the_last_use(segment: Segment, make: Make) -> None:
    eviction = make("lfu")
    for layer, expert in [(0, 0), (0, 0), (1, 1), (1, 1), (1, 1), (0, 1), (1, 0)]:
        route(segment, layer, (expert,))
        eviction.observe()
    assert order(segment, eviction) == [1, 8, 0, 9]


def test_lfru_forgets_what_was_used_often_long_ago(segment: Segment, make: Make) -> None:
    eviction = make("lfru")
    route(segment, 0, (0,), tokens=4)
    route(segment, 0, (7,), tokens=9)
    route(segment, 0, (1,))
    route(segment, 1, (0, 1))
    eviction.observe()
    assert order(segment, eviction)[0] == 0


def test_decayed_frequency_prefers_the_latest_tokens_choices(segment: Segment, make: Make) -> None:
    eviction = make("decayed-frequency")
    for experts in [(0,)] * 6 + [(1,)] * 5 + [(7,)] * 3:
        route(segment, 0, experts)
        eviction.observe()
    assert [key for key in order(segment, eviction) if key < EXPERTS] == [0, 1]


def test_least_stale_spares_what_the_present_pass_used(segment: Segment, make: Make) -> None:
    eviction = make("least-stale")
    for layer, expert in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        route(segment, layer, (expert,))
        eviction.observe()
    assert order(segment, eviction) == [8, 0, 9, 1]


def test_expected_next_use_keeps_what_comes_round_first_among_equals(segment: Segment, make: Make) -> None:
    eviction = make("expected-next-use")
    for _ in range(30):
        for layer in range(2):
            route(segment, layer, (0, 1))
            eviction.observe()
    route(segment, 0, (0, 1))
    eviction.observe()
    assert first_to_go(eviction) in (0, 1)  # layer 1 is next
    route(segment, 1, (0, 1))
    eviction.observe()
    assert first_to_go(eviction) in (8, 9)


def test_expected_next_use_gives_up_what_is_seldom_used(segment: Segment, make: Make) -> None:
    eviction = make("expected-next-use")
    for token in range(40):
        for layer in range(2):
            route(segment, layer, (0, 1) if token % 8 == 0 else (1, 2))
            eviction.observe()
    assert set(order(segment, eviction)[:2]) == {0, 8}


def test_with_several_workers_the_nearest_one_counts(segment: Segment, make: Make) -> None:
    eviction = make("expected-next-use")
    for _ in range(3):
        for layer in range(2):
            for lane in range(2):
                route(segment, (layer + lane) % 2, (0, 1), lane=lane)
                eviction.observe()
    assert eviction.distances().tolist() == [1, 1]  # one stands before either


def test_a_worker_that_stands_still_does_not_count_for_ever(segment: Segment, make: Make) -> None:
    eviction = make("expected-next-use")
    for layer in (0, 1, 0):
        route(segment, layer, (0, 1), lane=1)
        eviction.observe()
    for _ in range(3 * history.IDLE_CYCLES):
        for layer in range(2):
            route(segment, layer, (0, 1), lane=0)
            eviction.observe()
    assert eviction.distances().tolist() == [1, 2]  # of lane 0, at layer 1; lane 1 is before it


# ------------------------------------------------------------------ what is learnt


def test_shares_are_moving_averages_of_chosen_or_not(segment: Segment, make: Make) -> None:
    eviction = make("expected-next-use")
    fast = slow = 2 / EXPERTS
    rng = np.random.default_rng(1)
    for _ in range(100):
        chosen = bool(rng.integers(2))
        route(segment, 0, (0,) if chosen else (5,))
        eviction.observe()
        fast += history.FAST_RATE * (chosen - fast)
        slow += history.SLOW_RATE * (chosen - slow)
    assert eviction.shares(0) == pytest.approx((fast, slow))


def test_tokens_seen_at_once_count_as_if_spread_evenly(segment: Segment, make: Make) -> None:
    eviction = make("expected-next-use")
    route(segment, 0, (0,), tokens=2)
    route(segment, 0, (5,), tokens=2)
    eviction.observe()
    keep = (1 - history.FAST_RATE) ** 4
    assert eviction.shares(0)[0] == pytest.approx(2 / EXPERTS * keep + 0.5 * (1 - keep))


def test_the_odds_rise_with_use_and_with_its_freshness() -> None:
    def tokens(fast: float, slow: float, age: int, workers: int = 1, lift: float = 1.0) -> float:
        factors = rank_factor(LAST_TOKEN_GAIN, workers), rank_factor(TOKEN_BEFORE_GAIN, workers)
        return tokens_until_use(rank_by_odds(fast, slow, age, lift, workers, 0.1, *factors), 0.1)

    assert tokens(0.2, 0.1, 5) < tokens(0.1, 0.1, 5)
    assert tokens(0.1, 0.2, 5) < tokens(0.1, 0.1, 5)
    assert tokens(0.1, 0.1, 0) < tokens(0.1, 0.1, 1) < tokens(0.1, 0.1, 2) == tokens(0.1, 0.1, 3)
    assert tokens(0.1, 0.1, 0) < tokens(0.1, 0.1, 3, workers=4) < tokens(0.1, 0.1, 99)
    assert tokens(0.1, 0.1, 5, lift=2.0) < tokens(0.1, 0.1, 5) < tokens(0.1, 0.1, 5, lift=0.5)
    assert tokens(0.0, 0.0, 99) < 1e4  # never seen is not impossible


def test_with_several_workers_the_latest_tokens_are_as_many_of_each(segment: Segment, make: Make) -> None:
    eviction = make("expected-next-use")
    for _ in range(3):
        for layer in range(2):
            for lane in range(2):
                route(segment, (layer + lane) % 2, (5,), lane=lane)
                eviction.observe()
    before = eviction.shares(0)[0]
    route(segment, 0, (0,))
    eviction.observe()
    rate = history.FAST_RATE / 2
    assert eviction.shares(0)[0] == pytest.approx(before + rate * (1 - before))
