"""`Arbiter`: which proposals are loaded, and what their predictors earn by it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from shmroute.config import PagerConfig
from shmroute.pager.eviction.policy import Eviction
from shmroute.pager.prefetch.arbiter import LEAST_PRECISION, Arbiter
from shmroute.pager.prefetch.balance import DEBT, MEMORY, Balance
from shmroute.pager.prefetch.record import PRIOR
from shmroute.pager.prefetch.spare import LOADS, SpareBandwidth
from shmroute.pager.prefetch.usage import IdleCores
from shmroute.shared.affinity import power_table
from shmroute.shared.layout import LANE_CURSOR, LANE_IDENTITY, LINE
from shmroute.shared.metrics import Predictor, PrefetchOutcome
from shmroute.shared.segment import Segment
from shmroute.shared.turned_down import PROBE, is_turned_down
from shmroute.shared.words import LIVE, SCORE_ONE, pack_affinity, pack_identity

EVERYBODY = ("affinity", "previous-token", "transitions", "gate")


class Cores(IdleCores):
    """Idle cores until told otherwise; a thought takes `thought` seconds."""

    def __init__(self) -> None:
        self.waiting_weight, self.cpu_weight, self.load_cpu, self.thought = 1.0, 0.0, 0.0, 0.0
        self.counted = [0.0] * 4
        self._thread_seconds = 0.0

    def busy(self) -> None:
        """No core idles from now on."""
        self.waiting_weight, self.cpu_weight = 0.0, 1.0

    def idle(self) -> None:
        """All cores idle whenever a worker waits."""
        self.waiting_weight, self.cpu_weight = 1.0, 0.0

    def thread_seconds(self) -> float:
        self._thread_seconds += self.thought
        return self._thread_seconds

    def waited(self, lane: int) -> float:
        return self.counted[lane]


class Pager:
    """A segment's arbiter, and what routing publishes. Keys below 8 are of layer 0, the others of layer 1."""

    def __init__(self, segment: Segment, **settings: object) -> None:
        self.segment = segment
        pager = PagerConfig(**({"prefetch": 3, "predictors": EVERYBODY} | settings))
        tables = SimpleNamespace(
            config=replace(segment.config, pager=pager), layout=segment.layout, address=segment.address
        )
        self._powers = power_table(segment.config.affinity.decay)
        self.eviction = Eviction(tables, self._powers)
        self.counted: Counter[tuple[int, PrefetchOutcome]] = Counter()
        self.cores = Cores()
        self.arbiter = Arbiter(tables, self.eviction, lambda *outcome: self.counted.update([outcome]), self.cores)
        self._clocks = [0, 0]
        lane = segment.layout.lane(0)
        segment.write(lane + LANE_IDENTITY, pack_identity(LIVE, 0, 0, 1))

    def route(self, layer: int, *experts: int) -> None:
        """One token, observed."""
        layout = self.segment.layout
        self._clocks[layer] += 1
        self.segment.write(layout.clock + layer * LINE, self._clocks[layer])
        for expert in experts:
            offset = layout.activations(layer, expert)
            self.segment.write(offset, self.segment.read(offset) + 1)
            word = pack_affinity(self._clocks[layer], SCORE_ONE)
            self.segment.write(layout.affinity(layer, expert), word)
        self.segment.write(layout.lane(0) + LANE_CURSOR, layer)
        self.eviction.observe()
        self.arbiter.look()

    def outcomes(self, predictor: Predictor) -> dict[str, int]:
        return {o.name.lower(): self.counted[predictor, o] for o in PrefetchOutcome if self.counted[predictor, o]}

    def prefetch(self, key: int, predictor: Predictor, *, used: bool, seconds: float = 0.01) -> None:
        """One prefetch from its beginning to its end."""
        self.arbiter.asked(key, predictor, 0.0)
        self.arbiter.loaded(key, seconds, 0.0, demanded=False)
        self.route(key // 8, *([key % 8] if used else []))
        if not used:
            self.arbiter.evicted(key)


@pytest.fixture
def pager(segment: Segment) -> Pager:
    return Pager(segment)


# ------------------------------------------------------------------ outcomes


def test_used_before_evicted_is_useful(pager: Pager) -> None:
    pager.prefetch(3, Predictor.TRANSITIONS, used=True)
    assert pager.outcomes(Predictor.TRANSITIONS) == {"issued": 1, "completed": 1, "useful": 1}
    pager.arbiter.evicted(3)
    assert pager.outcomes(Predictor.TRANSITIONS) == {"issued": 1, "completed": 1, "useful": 1}


def test_evicted_before_used_is_wasted(pager: Pager) -> None:
    pager.prefetch(3, Predictor.AFFINITY, used=False)
    assert pager.outcomes(Predictor.AFFINITY) == {"issued": 1, "completed": 1, "wasted": 1}


def test_used_while_it_loads_is_useful_too(pager: Pager) -> None:
    pager.arbiter.asked(3, Predictor.GATE, 0.0)
    pager.route(0, 3)
    assert pager.outcomes(Predictor.GATE) == {"issued": 1}
    pager.arbiter.loaded(3, 0.01, 0.0, demanded=False)
    pager.arbiter.look()
    assert pager.outcomes(Predictor.GATE) == {"issued": 1, "completed": 1, "useful": 1}


def test_a_use_just_before_it_was_asked_for_does_not_count(pager: Pager) -> None:
    layout = pager.segment.layout
    pager.segment.write(layout.activations(0, 3), 1)  # published, and not observed yet
    pager.arbiter.asked(3, Predictor.GATE, 0.0)
    pager.arbiter.loaded(3, 0.01, 0.0, demanded=False)
    pager.route(0)
    assert pager.outcomes(Predictor.GATE) == {"issued": 1, "completed": 1}


def test_overtaken_and_cancelled_are_counted_apart(pager: Pager) -> None:
    pager.arbiter.asked(3, Predictor.GATE, 0.0)
    pager.arbiter.overtaken(3)
    pager.arbiter.asked(4, Predictor.GATE, 0.0)
    pager.arbiter.cancelled(4)
    assert pager.outcomes(Predictor.GATE) == {"issued": 2, "overtaken": 1, "cancelled": 1}
    for end in (pager.arbiter.overtaken, pager.arbiter.cancelled, pager.arbiter.evicted):
        end(5)  # was no prefetch
    assert pager.outcomes(Predictor.GATE) == {"issued": 2, "overtaken": 1, "cancelled": 1}


# ------------------------------------------------------------------ trust


def trusted(pager: Pager, predictor: Predictor, layer: int = 0, of: int = PROBE) -> int:
    return sum(pager.arbiter.trusts(predictor, layer, 0.0) for _ in range(of))


def test_a_predictor_that_is_wrong_is_turned_down_but_for_probes_and_wins_back_by_them(pager: Pager) -> None:
    pager.prefetch(11, Predictor.AFFINITY, used=True)  # so that layer 1 has an opinion of its own
    assert trusted(pager, Predictor.AFFINITY) == PROBE
    for _ in range(20):
        pager.prefetch(3, Predictor.AFFINITY, used=False)
    assert pager.arbiter.record.precision[Predictor.AFFINITY, 0] < LEAST_PRECISION[Predictor.AFFINITY]
    assert trusted(pager, Predictor.AFFINITY) == 1
    assert trusted(pager, Predictor.AFFINITY, of=10 * PROBE) == 10
    assert trusted(pager, Predictor.AFFINITY, layer=1) == PROBE
    assert trusted(pager, Predictor.TRANSITIONS) == PROBE
    for _ in range(20):
        pager.prefetch(3, Predictor.AFFINITY, used=True)
    assert trusted(pager, Predictor.AFFINITY) == PROBE


def test_a_layer_without_outcomes_takes_after_the_others(pager: Pager) -> None:
    record = pager.arbiter.record
    pager.prefetch(1, Predictor.TRANSITIONS, used=False)
    known = record.precision[Predictor.TRANSITIONS, 0]
    assert record.precision[Predictor.TRANSITIONS].tolist() == [known, known]
    assert known < PRIOR
    pager.prefetch(9, Predictor.TRANSITIONS, used=True)
    assert record.precision[Predictor.TRANSITIONS, 1] > record.precision[Predictor.TRANSITIONS, 0] == known
    assert (record.precision[Predictor.AFFINITY] == PRIOR).all(), "another predictor's outcomes say nothing of it"


def test_affinity_must_be_right_more_often_than_the_others(pager: Pager) -> None:
    for predictor in (Predictor.AFFINITY, Predictor.TRANSITIONS):
        pager.arbiter.record.precision[predictor] = 0.4
    assert pager.arbiter.trusts(Predictor.TRANSITIONS, 0, 0.0)
    assert not pager.arbiter.trusts(Predictor.AFFINITY, 0, 0.0)


def test_where_demands_take_all_the_time_only_the_surest_is_asked(segment: Segment) -> None:
    pager = Pager(segment, io_threads=1)
    for number in range(200):
        pager.arbiter.loaded(9, 0.01, 0.01 * number, demanded=True)
    now = 2.0
    assert not pager.arbiter.trusts(Predictor.AFFINITY, 0, now)
    assert pager.arbiter.trusts(Predictor.AFFINITY, 0, now + 10)  # they are over


def test_what_costs_more_than_it_saves_is_turned_down_everywhere(pager: Pager) -> None:
    pager.prefetch(3, Predictor.GATE, used=True)
    pager.arbiter.asked(4, Predictor.GATE, 0.0)
    for _ in range(5):
        pager.arbiter.delayed(4, 0.01)
    assert trusted(pager, Predictor.GATE) == trusted(pager, Predictor.GATE, layer=1) == 1
    assert trusted(pager, Predictor.AFFINITY) == PROBE


def test_hints_are_always_taken(segment: Segment) -> None:
    pager = Pager(segment, prefetch=0)
    for _ in range(20):
        pager.prefetch(3, Predictor.HINT, used=False)
    assert trusted(pager, Predictor.HINT) == PROBE
    assert pager.arbiter.may_replace(3, 5)


def test_without_prefetching_nobody_else_is_trusted(segment: Segment) -> None:
    pager = Pager(segment, prefetch=0)
    assert [trusted(pager, predictor) for predictor in Predictor] == [0, 0, 0, 0, PROBE]
    assert pager.arbiter.proposals(0.0) == []


def test_only_predictors_that_are_named_are_trusted(segment: Segment) -> None:
    pager = Pager(segment, predictors=("previous-token",))
    assert [trusted(pager, predictor) for predictor in Predictor] == [0, PROBE, 0, 0, PROBE]
    pager.route(0, 1)
    pager.route(1, 2)
    assert pager.arbiter.proposals(0.0) == [(1, Predictor.PREVIOUS_TOKEN)]


# ------------------------------------------------------------------ proposals


def test_no_more_is_proposed_than_the_budget_leaves(pager: Pager) -> None:
    pager.route(0, 1, 2, 3, 4, 5)
    pager.route(1, 0)
    found = pager.arbiter.proposals(0.0)
    assert [predictor for _, predictor in found] == [Predictor.PREVIOUS_TOKEN] * 3
    for key, predictor in found:
        pager.arbiter.asked(key, predictor, 0.0)
    pager.route(0, 6)
    pager.route(1, 0)
    assert pager.arbiter.proposals(0.0) == []
    pager.arbiter.cancelled(found[0][0])
    pager.route(0, 6)
    pager.route(1, 0)
    assert len(pager.arbiter.proposals(0.0)) == 1


def test_the_same_state_is_not_looked_at_twice(pager: Pager) -> None:
    pager.route(0, 1)
    pager.route(1, 2)
    assert pager.arbiter.proposals(0.0)
    assert pager.arbiter.proposals(0.0) == []


# ------------------------------------------------------------------ CPU time


def turned_down(pager: Pager) -> set[Predictor]:
    word = pager.arbiter.turned_down()
    return {predictor for predictor in Predictor if is_turned_down(word, predictor)}


def asked(pager: Pager, times: int) -> int:
    """How often a predictor of the pager's own looks for proposals, given the chance."""
    before, pager.cores.thought = pager.cores.thread_seconds(), 1.0
    for _ in range(times):
        pager.arbiter.proposals(0.0)
    found = pager.cores.thread_seconds() - before
    pager.cores.thought = 0.0
    return round(found - 1) // 2  # one look at the clock before, one after each time


def test_where_no_core_is_idle_waiting_counts_for_nothing_and_wrong_guesses_cost_their_loads(pager: Pager) -> None:
    pager.cores.load_cpu = 0.004
    for _ in range(10):
        pager.prefetch(3, Predictor.GATE, used=True)
    for _ in range(5):
        pager.prefetch(3, Predictor.AFFINITY, used=False)
    assert turned_down(pager) == set(), "cores are idle: all that counts is what was saved"
    pager.cores.busy()
    assert turned_down(pager) == {Predictor.AFFINITY}, "the gate's loads stand for those of demands"
    pager.cores.idle()
    assert turned_down(pager) == set()


def test_thinking_is_charged_where_no_core_is_idle_and_then_done_one_time_in_so_many(segment: Segment) -> None:
    pager = Pager(segment, predictors=("transitions",))
    pager.arbiter.loaded(9, 0.01, 0.0, demanded=True)
    pager.cores.thought = 0.004
    for _ in range(3):
        pager.arbiter.proposals(100.0)
    assert turned_down(pager) == set()
    pager.cores.busy()
    assert turned_down(pager) == {Predictor.TRANSITIONS}
    pager.cores.thought = 0.0
    assert asked(pager, 10 * PROBE) == 10
    pager.cores.idle()
    assert turned_down(pager) == set()
    assert asked(pager, PROBE) == PROBE


def test_thinking_is_charged_where_demanded_loads_wait_for_its_end(segment: Segment) -> None:
    pager = Pager(segment, predictors=("transitions",), io_threads=1)
    for number in range(20):
        pager.arbiter.loaded(9, 0.01, 0.02 * number, demanded=True)
    pager.cores.thought = 0.015
    pager.arbiter.proposals(0.4)
    assert turned_down(pager) == set(), "half of the time none is under way"
    pager.arbiter.proposals(0.4)
    assert turned_down(pager) == {Predictor.TRANSITIONS}


def test_workers_thinking_is_charged_whatever_the_cores_do(pager: Pager) -> None:
    pager.prefetch(3, Predictor.GATE, used=True)
    pager.arbiter.speculated(0.009)
    assert turned_down(pager) == set()
    pager.arbiter.speculated(0.002)
    assert turned_down(pager) == {Predictor.GATE}
    for _ in range(3):
        pager.prefetch(3, Predictor.GATE, used=True)
    assert turned_down(pager) == set()


def test_no_predictor_gets_so_deep_into_debt_that_it_cannot_come_back(pager: Pager) -> None:
    pager.prefetch(3, Predictor.GATE, used=True)
    pager.arbiter.speculated(1e6)
    pager.arbiter.balance.spent(Predictor.GATE, 1e6, 0.01)
    needed = 0
    while turned_down(pager):
        pager.prefetch(3, Predictor.GATE, used=True)
        needed += 1
    assert DEBT / 2 < needed < DEBT


def test_probes_of_workers_that_were_told_are_all_taken(pager: Pager) -> None:
    pager.prefetch(3, Predictor.GATE, used=True)
    pager.arbiter.speculated(1.0)
    assert trusted(pager, Predictor.GATE) == PROBE, "they have not been told yet, and it is precise"
    pager.arbiter.record.precision[Predictor.GATE] = 0.0
    assert trusted(pager, Predictor.GATE) == 1
    pager.arbiter.turned_down()
    assert trusted(pager, Predictor.GATE) == PROBE


def test_only_predictors_that_are_named_can_be_turned_down(segment: Segment) -> None:
    pager = Pager(segment, predictors=("transitions",))
    for predictor in Predictor:
        pager.arbiter.balance.cost(predictor, 1.0)
    assert turned_down(pager) == {Predictor.TRANSITIONS}


# ------------------------------------------------------------------ how much waiting a prefetch saves


def saved(pager: Pager, predictor: Predictor = Predictor.GATE) -> float:
    """Loads saved so far: by so many the workers' thinking may exceed them until the predictor is turned down."""
    spent = 0
    while not pager.arbiter.turned_down():
        pager.arbiter.balance.lost(predictor, 1e-4, 0.01)
        spent += 1
    return round((spent - 1) / 100, 1)


def test_what_a_worker_waited_for_the_end_of_a_load_is_not_saved(pager: Pager) -> None:
    for _ in range(4):
        pager.arbiter.asked(3, Predictor.GATE, 0.0)
        pager.route(0, 3)
        pager.arbiter.loaded(3, 0.01, 0.0, demanded=False, waiting=pager.arbiter.waited([1]))
        pager.arbiter.look()
        pager.cores.counted[1] += 0.002
        pager.arbiter.look()
    assert pager.outcomes(Predictor.GATE) == {"issued": 4, "completed": 4, "useful": 4}
    assert saved(pager) == pytest.approx(4 * 0.8, rel=0.05)


def test_a_prefetch_is_judged_when_the_wait_for_it_was_counted_or_it_goes(pager: Pager) -> None:
    for key in (3, 4):
        pager.arbiter.asked(key, Predictor.GATE, 0.0)
        pager.arbiter.loaded(key, 0.01, 0.0, demanded=False, waiting=pager.arbiter.waited([0]))
    pager.route(0, 3)
    assert pager.outcomes(Predictor.GATE) == {"issued": 2, "completed": 2}
    pager.arbiter.evicted(3)
    pager.arbiter.evicted(4)
    assert pager.outcomes(Predictor.GATE) == {"issued": 2, "completed": 2, "useful": 1, "wasted": 1}


def test_a_hint_is_not_judged_by_what_it_saves(segment: Segment) -> None:
    pager = Pager(segment, prefetch=0)
    pager.arbiter.asked(3, Predictor.HINT, 0.0)
    pager.arbiter.loaded(3, 0.01, 0.0, demanded=False, waiting=pager.arbiter.waited([0]))
    pager.route(0, 3)
    assert pager.outcomes(Predictor.HINT) == {"issued": 1, "completed": 1, "useful": 1}


@pytest.mark.parametrize(("threads", "loads"), [(1, 4.0), (2, 1.0)])
def test_a_load_that_would_have_run_beside_another_of_the_same_token_saves_nothing(
    segment: Segment, threads: int, loads: float
) -> None:
    pager = Pager(segment, io_threads=threads)
    pager.prefetch(3, Predictor.GATE, used=True)
    for _ in range(3):
        pager.arbiter.asked(3, Predictor.GATE, 0.0)
        pager.arbiter.loaded(3, 0.01, 0.0, demanded=False)
        segment.write(segment.layout.clock, pager.eviction.clocks()[0] + 1)
        pager.arbiter.demanded(5)
        pager.route(0, 3, 5)
    assert saved(pager) == pytest.approx(loads, abs=0.25)


# ------------------------------------------------------------------ the slot


def test_what_is_expected_sooner_is_not_replaced(pager: Pager) -> None:
    for _ in range(40):
        pager.route(0, 1)
        pager.route(1, 2)
    used, unused = 1, 6
    pager.arbiter.asked(5, Predictor.AFFINITY, 0.0)
    assert not pager.arbiter.may_replace(5, used)
    pager.arbiter.asked(used, Predictor.AFFINITY, 0.0)
    assert pager.arbiter.may_replace(used, unused)


def test_a_punctual_prediction_is_expected_at_the_next_token(pager: Pager) -> None:
    for _ in range(40):
        pager.route(0, 1)
        pager.route(1, *([2] if _ % 2 else []))
    for _ in range(60):
        pager.prefetch(7, Predictor.GATE, used=True)
        pager.prefetch(7, Predictor.TRANSITIONS, used=False)
    pager.route(1)
    for predictor, may in ((Predictor.GATE, True), (Predictor.TRANSITIONS, False)):
        pager.arbiter.asked(3, predictor, 0.0)
        assert pager.arbiter.may_replace(3, 10) == may
        pager.arbiter.cancelled(3)


def test_a_prediction_is_stale_once_its_layer_was_passed(pager: Pager) -> None:
    pager.route(0, 1)
    for key, predictor in ((8, Predictor.GATE), (9, Predictor.AFFINITY), (10, Predictor.HINT)):
        pager.arbiter.asked(key, predictor, 0.0)
    assert all(pager.arbiter.still_wanted(key) for key in (8, 9, 10))
    pager.route(1, 0)
    assert [pager.arbiter.still_wanted(key) for key in (8, 9, 10)] == [False, True, True]


def test_whoever_went_for_an_unused_prefetch_and_is_demanded_again_is_charged(pager: Pager) -> None:
    for _ in range(40):
        pager.route(0, 1)
    pager.arbiter.loaded(15, 0.01, 0.0, demanded=True)
    pager.prefetch(3, Predictor.AFFINITY, used=True)
    pager.arbiter.asked(1, Predictor.AFFINITY, 0.0)
    assert pager.arbiter.may_replace(1, 6)
    for _ in range(2):
        pager.arbiter.demanded(6)
    assert trusted(pager, Predictor.AFFINITY) == PROBE  # one load saved, one lost
    for _ in range(3):
        assert pager.arbiter.may_replace(1, 6)
        pager.arbiter.demanded(6)
    assert trusted(pager, Predictor.AFFINITY) == 1


# ------------------------------------------------------------------ what it is measured by


def test_spare_bandwidth_is_what_loads_leave() -> None:
    spare = SpareBandwidth(threads=2)
    assert (spare.demanded(0.0), spare.spare(0.0)) == (0.0, 1.0)
    for number in range(400):
        now = 0.02 * number
        spare.loaded(0.01, now, demanded=number % 2 == 0)
    assert spare.load_seconds == pytest.approx(0.01)
    assert spare.demanded(now) == pytest.approx(0.125, rel=0.2)  # 10 ms in every 40, of two threads
    assert spare.spare(now) == pytest.approx(0.75, rel=0.1)
    assert spare.spare(now + LOADS) == pytest.approx(1.0)


def test_old_savings_fade() -> None:
    balance = Balance(IdleCores())
    for _ in range(1000):
        balance.saved(Predictor.GATE, 0.01, 0.01)
    costs = 0
    while balance.is_worth_it(Predictor.GATE):
        balance.cost(Predictor.GATE, 0.01)
        costs += 1
    assert MEMORY / 4 < costs < 2 * MEMORY
