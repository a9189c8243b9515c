"""What a worker's last token says about its next one in the same layer, against a plain account of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from shmroute.pager.eviction import policy
from shmroute.pager.eviction.history import IDLE_CYCLES, SLOW_RATE
from shmroute.pager.eviction.next_token import LEAST_LIFT, LEAST_SHARE, MOST_FOLLOWED, SHARE_WEIGHT, lift_of
from shmroute.pager.eviction.policy import Eviction
from shmroute.shared.affinity import power_table
from shmroute.shared.layout import LANE_CURSOR, LANE_IDENTITY, LINE
from shmroute.shared.segment import Segment
from shmroute.shared.words import LIVE, NOBODY, pack_identity

LAYERS, EXPERTS, TOP_K = 2, 8, 2


class Account:
    """The definitions of `shmroute.pager.eviction.next_token`, with arrays."""

    def __init__(self) -> None:
        self.followed_by = np.zeros((LAYERS, EXPERTS, EXPERTS))
        self.followed = np.zeros((LAYERS, EXPERTS))
        self.share = np.full((LAYERS, EXPERTS), TOP_K / EXPERTS)
        self.last: dict[tuple[int, int], tuple[int, ...]] = {}
        self.lift: dict[tuple[int, int], npt.NDArray[np.float64]] = {}

    def token(self, lane: int, layer: int, experts: tuple[int, ...]) -> None:
        used = np.isin(np.arange(EXPERTS), experts)
        self.share[layer] += SLOW_RATE * (used - self.share[layer])
        for first in self.last.get((lane, layer), ()):
            if self.followed[layer, first] >= MOST_FOLLOWED:
                self.followed[layer, first] /= 2
                self.followed_by[layer, first] /= 2
            self.followed[layer, first] += 1
            self.followed_by[layer, first] += used
        self.last[lane, layer] = experts
        share = np.maximum(self.share[layer], LEAST_SHARE * TOP_K / EXPERTS)
        given = [
            (self.followed_by[layer, one] + SHARE_WEIGHT * share) / (self.followed[layer, one] + SHARE_WEIGHT)
            for one in experts
        ]
        self.lift[lane, layer] = np.mean(given, axis=0) / share

    def expected(self, layer: int, lanes: int = 1) -> npt.NDArray[np.float64]:
        nothing = np.ones(EXPERTS)
        mean = np.mean([self.lift.get((lane, layer), nothing) for lane in range(lanes)], axis=0)
        return np.maximum(mean, LEAST_LIFT)


class Pager:
    """Workers that publish what they route, and the eviction that looks on."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._powers = power_table(segment.config.affinity.decay)
        self.eviction = Eviction(segment, self._powers)

    def arrive(self, lane: int) -> None:
        """A worker that has finished a token already."""
        at = self._segment.layout.lane(lane)
        self._segment.write(at + LANE_IDENTITY, pack_identity(LIVE, 0, 0, lane + 1))
        self._segment.write(at + LANE_CURSOR, LAYERS - 1)

    def publish(self, lane: int, layer: int, experts: tuple[int, ...], tokens: int = 1) -> None:
        segment, layout = self._segment, self._segment.layout
        clock = layout.clock + layer * LINE
        segment.write(clock, segment.read(clock) + tokens)
        for expert in experts:
            offset = layout.activations(layer, expert)
            segment.write(offset, segment.read(offset) + tokens)
        segment.write(layout.lane(lane) + LANE_CURSOR, layer)

    def route(self, lane: int, layer: int, experts: tuple[int, ...], tokens: int = 1) -> None:
        self.publish(lane, layer, experts, tokens)
        self.eviction.observe()

    def lifts(self, layer: int) -> npt.NDArray[np.float64]:
        return np.array([lift_of(self.eviction.table, layer * EXPERTS + expert) for expert in range(EXPERTS)])


@pytest.fixture
def pager(segment: Segment) -> Pager:
    return Pager(segment)


def choice(rng: np.random.Generator, after: tuple[int, ...] | None) -> tuple[int, ...]:
    """Two experts; as a rule the successors of those before."""
    if after is not None and rng.random() < 0.7:
        return tuple((one + 1) % EXPERTS for one in after)
    return tuple(rng.choice(EXPERTS, TOP_K, replace=False).tolist())


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_lift_is_that_of_what_followed_in_the_same_workers_tokens(pager: Pager, lanes: int) -> None:
    rng, account = np.random.default_rng(lanes), Account()
    for lane in range(lanes):
        pager.arrive(lane)
    for _ in range(200):
        for layer in range(LAYERS):
            for lane in range(lanes):
                experts = choice(rng, account.last.get((lane, layer)))
                account.token(lane, layer, experts)
                pager.route(lane, layer, experts)
        for layer in range(LAYERS):
            assert pager.lifts(layer) == pytest.approx(account.expected(layer, lanes), rel=1e-4)


def test_of_too_many_experts_nothing_is_foretold(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "MOST_PAIRS", LAYERS * EXPERTS**2 - 1)
    pager = Pager(segment)
    for token in range(9):
        pager.route(0, token % LAYERS, (0, 1))
    assert pager.lifts(0).tolist() == [1.0] * EXPERTS


def test_old_counts_fade(pager: Pager) -> None:
    account = Account()
    pager.arrive(0)
    for token in range(int(1.2 * MOST_FOLLOWED)):
        for layer in range(LAYERS):
            experts = (0, 1) if layer == 1 or token % 2 else (0, 2)
            account.token(0, layer, experts)
            pager.route(0, layer, experts)
    assert account.followed[1, 0] < 0.8 * MOST_FOLLOWED
    for layer in range(LAYERS):
        assert pager.lifts(layer) == pytest.approx(account.expected(layer), rel=1e-4)


def test_what_always_follows_is_raised_and_the_rest_lowered(pager: Pager) -> None:
    pager.arrive(0)
    for token in range(60):
        for layer in range(LAYERS):
            pager.route(0, layer, ((0, 1), (2, 3), (4, 5))[token % 3])
    for layer in range(LAYERS):
        lifts = pager.lifts(layer)
        assert lifts[[0, 1]].min() > 1.5  # after (4, 5)
        assert lifts[[2, 3, 4, 5]].max() < 0.5


def settled(pager: Pager) -> None:
    """Two workers that have learnt that (0, 1) and (2, 3) take turns."""
    for lane in range(2):
        pager.arrive(lane)
    for token in range(20):
        for layer in range(LAYERS):
            for lane in range(2):
                pager.route(lane, layer, ((0, 1), (2, 3))[token % 2])
    for layer in range(LAYERS):
        assert abs(pager.lifts(layer) - 1).max() > 0.2


@pytest.mark.parametrize("what", ["two tokens of one worker", "two workers at once", "a round unseen"])
def test_whose_token_it_was_must_be_plain(pager: Pager, what: str) -> None:
    settled(pager)
    before = pager.lifts(1)
    if what == "two tokens of one worker":
        for lane in range(2):
            pager.route(lane, 0, (0, 1), tokens=2)
    elif what == "two workers at once":
        for lane in range(2):
            pager.publish(lane, 0, (2 * lane, 1))
        pager.eviction.observe()
    else:
        for layer in range(LAYERS):
            pager.publish(0, layer, (0, 1))  # its cursor is where it was
        pager.eviction.observe()
        before[:] = 1.0
    assert pager.lifts(0).tolist() == [1.0] * EXPERTS
    assert pager.lifts(1).tolist() == before.tolist()


def test_who_stands_still_foretells_nothing(pager: Pager) -> None:
    settled(pager)
    for _ in range(4 * IDLE_CYCLES):
        for layer in range(LAYERS):
            pager.route(0, layer, (4, 5), tokens=2)  # of which nothing is learnt
    for layer in range(LAYERS):
        assert pager.lifts(layer).tolist() == [1.0] * EXPERTS


def test_who_left_foretells_nothing(segment: Segment, pager: Pager) -> None:
    settled(pager)
    for lane in range(2):
        segment.write(segment.layout.lane(lane) + LANE_IDENTITY, NOBODY)
    pager.publish(2, 0, (4, 5))
    pager.eviction.observe()
    for layer in range(LAYERS):
        assert pager.lifts(layer).tolist() == [1.0] * EXPERTS
