"""How figures come about: on made-up samples, never on the clock."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import pytest

from shmroute.bench import measuring
from shmroute.bench.measuring import (
    Contestant,
    Latencies,
    Loop,
    Summary,
    contest,
    contest_anew,
    cpu_ns,
    cpus,
    pinned,
    ratios,
)


def test_contestants_take_turns_there_and_back() -> None:
    order = []

    def contestant(name: str) -> Contestant:
        return Contestant(name, lambda: order.append(name) or 1.0)  # type: ignore[func-returns-value]

    contest([contestant(name) for name in "abc"], rounds=2)
    assert "".join(order) == "abc" + "abc" + "cba"


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine halves its speed from round to round; the second contestant always takes three times as long.
    slowness = [1.0, 1.0, 2.0, 4.0]
    first, second = iter(slowness), iter([3 * value for value in slowness])
    mine, theirs = contest(
        [Contestant("mine", lambda: next(first)), Contestant("theirs", lambda: next(second))], rounds=3
    )
    assert (mine.ratio.median, theirs.ratio.p25, theirs.ratio.median, theirs.ratio.p75) == (1, 3, 3, 3)
    assert mine.summary == Summary(2.0, 1.5, 3.0, 3)  # the first sample warmed up


def test_what_is_set_up_anew_is_one_contest() -> None:
    setups = iter(range(10, 100, 10))

    @contextlib.contextmanager
    def set_up() -> Iterator[list[Contestant]]:
        base = float(next(setups))
        yield [Contestant("mine", lambda: base), Contestant("theirs", lambda: 2 * base)]

    mine, theirs = contest_anew(set_up, rounds=4)
    assert mine.summary == Summary(20, 12.5, 27.5, 6)
    assert theirs.ratio == Summary(2, 2, 2, 6)


def test_ratios_to_nothing() -> None:
    assert ratios([0.0, 2.0, 0.0], [0.0, 1.0, 2.0]) == [1.0, 2.0, 0.0]


def test_a_summary_of_one_value() -> None:
    assert Summary.of([5.0]) == Summary(5, 5, 5, 1)


class Clock:
    """Wall and CPU time that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 0
        monkeypatch.setattr(measuring.time, "perf_counter_ns", lambda: self.wall)
        monkeypatch.setattr(measuring.time, "thread_time_ns", lambda: self.cpu)


def test_a_loop_is_as_long_as_asked_and_gives_the_time_of_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counts = Clock(monkeypatch), []

    def run(count: int) -> None:
        counts.append(count)
        clock.wall += 100 * count
        clock.cpu += 100 * count

    loop = Loop(run, seconds=0.001, per=4)
    assert loop() == 25
    assert counts[-1] * 100 == 1_000_000


def test_a_sample_in_which_the_core_was_lost_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lost = iter([0] * 20)

    def run(count: int) -> None:
        clock.wall += 100 * count + next(lost)
        clock.cpu += 100 * count

    loop = Loop(run, seconds=0.001)
    loop()
    lost = iter([500_000, 400_000, 0, 300_000])
    assert loop() == 100
    lost = iter([500_000] * 20)  # a crowded machine
    assert loop() == 100
    waiting = Loop(run, seconds=0.001, waits=True)
    lost = iter([0] * 20)
    waiting()
    lost = iter([500_000])
    assert waiting() == 150


def test_latencies_leave_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    durations = iter([1000] * 4 + [10, 20, 30, 40])

    def call(argument: object) -> None:
        clock.wall += next(durations)

    latencies = Latencies(call, ["a", "b"], 4)
    assert latencies() == 1000
    assert latencies() == 25
    assert latencies.details()["max"] == 40
    assert latencies.details()["p50"] == 25


def test_pinning_ends_with_its_block() -> None:
    before = cpus()
    with pinned(before[-1]):
        assert cpus() == before[-1:]
    assert cpus() == before


def test_cpu_time_of_any_process() -> None:
    before = cpu_ns(os.getpid())
    np.random.default_rng(0).standard_normal(100_000).sum()
    assert cpu_ns(os.getpid()) > before
    assert cpu_ns(os.getppid()) >= 0
