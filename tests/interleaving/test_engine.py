"""The scheduler itself: what it runs, in which order, how it kills, and that it is not fooled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest

import shmroute.leases
import shmroute.pager.daemon
from shmroute.shared.atomic import cas, fetch_add, load, store

from .histories import NEVER, Call, linearizable
from .host import Host
from .machine import Memory, StoreBuffers
from .mutation import store_release
from .search import exhaust, replay, search
from .simulation import Simulation, Violation, require
from .strategies import Exhaustive, RandomWalk, Replay, Undisturbed
from .world import World, run
from .worlds import WORLDS
from .worlds.ring import bounded_queue

_words = np.zeros(64, np.int64)
X, Y = int(_words.ctypes.data), int(_words.ctypes.data) + 128


class Small(World):
    """Two words, zero at first; programs are functions."""

    programs: ClassVar[tuple[Callable[[Small], None], ...]] = ()
    deaths = 0
    step_bound = 500

    def populate(self, simulation: Simulation) -> None:
        _words[:] = 0
        self.seen: dict[str, int] = {}
        self.simulation = simulation
        for program in self.programs:
            simulation.process(program.__name__, lambda program=program: program(self))

    def check(self, simulation: Simulation) -> None:
        """Nothing."""


def increment_badly(world: Small) -> None:
    store(X, load(X) + 1)


def increment(world: Small) -> None:
    fetch_add(X, 1)


def test_a_lost_update_is_found_and_replayed_from_its_schedule() -> None:
    class Lossy(Small):
        programs = (increment_badly, increment_badly)

        def check(self, simulation: Simulation) -> None:
            require(load(X) == 2, f"{load(X)} of 2")

    report = exhaust("lossy", Lossy, preemptions=1, deaths=0, runs=100)
    assert report.found is not None
    again = replay(Lossy, report.found.schedule)
    assert str(again.failure) == "1 of 2"
    assert again.schedule == report.found.schedule

    class Sound(Lossy):
        programs = (increment, increment)

    assert exhaust("sound", Sound, preemptions=2, deaths=0, runs=100).found is None


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_exhaustive_search_runs_every_interleaving_once(steps: int) -> None:
    def several(world: Small) -> None:
        for _ in range(steps):
            fetch_add(X, 1)

    class Pair(Small):
        programs = (several, several)

    schedules = set()
    exhaustive = Exhaustive(preemptions=100, deaths=0)
    for strategy in exhaustive.strategies():
        outcome = run(Pair, strategy)
        assert outcome.schedule not in schedules
        schedules.add(outcome.schedule)
    assert exhaustive.complete
    # A thread of n steps takes n + 1 turns: the first goes to just before its first step.
    assert len(schedules) == math.comb(2 * (steps + 1), steps + 1)


def test_a_process_dies_between_any_two_steps_and_does_nothing_afterwards() -> None:
    def tidy(world: Small) -> None:
        try:
            for i in range(3):
                store(X, i + 1)
        finally:
            store(Y, 1)

    class Mortal(Small):
        programs = (tidy,)
        deaths = 1
        ends: ClassVar[set[tuple[int, int]]] = set()

        def check(self, simulation: Simulation) -> None:
            self.ends.add((load(X), load(Y)))

    report = exhaust("mortal", Mortal, preemptions=0, deaths=1, runs=100)
    assert report.complete
    assert Mortal.ends == {(0, 0), (1, 0), (2, 0), (3, 0), (3, 1)}
    assert (_words[0], _words[16]) in {(0, 0), (1, 0), (2, 0), (3, 0), (3, 1)}


def test_waiting_for_ever_is_a_finding() -> None:
    def wait(world: Small) -> None:
        world.simulation.wait(lambda: False)

    class Stuck(Small):
        programs = (wait,)

    assert "deadlock" in str(run(Stuck, Undisturbed()).failure)


def test_spinning_for_ever_is_a_finding_and_spinning_for_another_is_none() -> None:
    def spin(world: Small) -> None:
        while load(X) == 0:
            pass

    class Alone(Small):
        programs = (spin,)

    class Together(Small):
        programs = (spin, increment)

    assert "not done after 500 steps" in str(run(Alone, Undisturbed()).failure)
    assert run(Together, Undisturbed()).failure is None


def test_time_goes_on_only_when_everybody_waits() -> None:
    def sleep(world: Small) -> None:
        world.simulation.sleep(10)
        world.seen["late"] = load(X)

    class Sleepy(Small):
        programs = (sleep, increment)

        def check(self, simulation: Simulation) -> None:
            require(self.seen["late"] == 1, "woke too early")
            require(simulation.timeouts == 1, "no timeout")

    for seed in range(50):
        assert run(Sleepy, RandomWalk(seed)).failure is None


# ------------------------------------------------------------------ store buffers


def litmus(put: Callable[[int, int], None], memory: type[Memory]) -> set[tuple[int, int]]:
    """Store buffering: two processes, each stores one word and loads the other. What they may read."""

    def left(world: Small) -> None:
        put(X, 1)
        world.seen["left"] = load(Y)

    def right(world: Small) -> None:
        put(Y, 1)
        world.seen["right"] = load(X)

    results: set[tuple[int, int]] = set()

    class Litmus(Small):
        programs = (left, right)

        def check(self, simulation: Simulation) -> None:
            results.add((self.seen["left"], self.seen["right"]))

    Litmus.memory = memory
    assert exhaust("litmus", Litmus, preemptions=3, deaths=0, runs=5000).complete
    return results


def test_a_plain_store_may_stay_behind_a_later_load_and_a_seq_cst_one_may_not() -> None:
    assert litmus(store, Memory) == {(0, 1), (1, 0), (1, 1)}
    assert litmus(store, StoreBuffers) == {(0, 1), (1, 0), (1, 1)}
    assert litmus(store_release, StoreBuffers) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_thread_sees_its_own_buffered_stores_and_a_cas_empties_the_buffer() -> None:
    def own(world: Small) -> None:
        store_release(X, 5)
        world.seen["own"] = load(X)
        cas(Y, 0, 7)
        world.seen["memory"] = int(_words[0])

    class Own(Small):
        programs = (own,)
        memory = StoreBuffers

        def check(self, simulation: Simulation) -> None:
            require(self.seen == {"own": 5, "memory": 5}, str(self.seen))

    assert run(Own, Undisturbed()).failure is None


# ------------------------------------------------------------------ replay


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    class Pair(Small):
        programs = (increment, increment)

    with pytest.raises(ValueError, match="does not fit"):
        replay(Pair, "c")
    assert replay(Pair, "ab").failure is None


@pytest.mark.parametrize("seed", range(5))
def test_a_random_run_is_the_same_when_replayed(seed: int) -> None:
    first = run(WORLDS["crowd"], RandomWalk(seed))
    again = run(WORLDS["crowd"], Replay(first.decisions))
    assert (again.schedule, again.steps) == (first.schedule, first.steps)


def test_a_search_stops_at_the_first_finding_and_says_how_to_see_it_again() -> None:
    def fail(world: Small) -> None:
        raise Violation("always")

    class Failing(Small):
        programs = (fail,)

    report = search("failing", Failing, (RandomWalk(seed) for seed in range(10)), runs=10)
    assert report.runs == 1
    assert "replay failing 'a'" in str(report.found)


# ------------------------------------------------------------------ histories


def call(who: str, operation: str, arguments: tuple[int, ...], invoked: int, returned: int, result: object) -> Call:
    return Call(who, operation, arguments, invoked, returned, result)


def queue_of_two(state: object, operation: str, arguments: tuple[object, ...]) -> tuple[object, object]:
    return bounded_queue(2, state, operation, arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("calls", "explained"),
    [
        ([call("a", "push", (1,), 0, 1, 0), call("b", "pop", (), 2, 3, 1)], True),
        ([call("a", "push", (1,), 0, 1, 0), call("b", "pop", (), 2, 3, -1)], False),  # it was there
        ([call("a", "push", (1,), 0, 3, 0), call("b", "pop", (), 1, 2, -1)], True),  # at the same time
        ([call("a", "push", (1,), 0, 1, 1)], False),  # FULL although empty
        ([call("a", "push", (1,), 0, NEVER, None), call("b", "pop", (), 1, 2, 1)], True),  # by the dead
        ([call("a", "push", (1,), 0, NEVER, None), call("b", "pop", (), 1, 2, -1)], True),  # or not
        ([call("b", "pop", (), 1, 2, 1), call("a", "push", (1,), 3, NEVER, None)], False),  # before it began
        ([call("a", "push", (1,), 0, 1, 0), call("b", "pop", (), 2, 5, 1), call("c", "pop", (), 3, 4, 1)], False),
        (
            [call("a", "push", (1,), 0, 1, 0), call("b", "push", (2,), 2, 3, 0), call("c", "pop", (), 4, 5, 2)],
            False,  # not first in, first out
        ),
    ],
)
def test_a_history_is_linearizable_or_not(calls: list[Call], explained: bool) -> None:
    assert linearizable(calls, queue_of_two, ()) is explained


# ------------------------------------------------------------------ the host


def test_a_stand_in_is_everywhere_while_a_host_is_installed_and_nowhere_after() -> None:
    remove = Host(Simulation(Undisturbed())).install()
    try:
        assert shmroute.leases.time is not time
        assert shmroute.pager.daemon.time is not time
    finally:
        remove()
    assert shmroute.leases.time is time
    assert shmroute.pager.daemon.time is time
