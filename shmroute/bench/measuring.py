"""How a figure comes about: contests of interleaved samples, and what is kept of them.

A figure alone says little on a machine whose clock moves and whose cores are shared; a *ratio* to something that was
measured at the same moment says more. So whatever is compared is measured together, in rounds:

- Contestants are sampled in turn, A B C, and in the next round backwards, C B A: a machine that slows down or speeds
  up meanwhile treats all alike.
- A ratio is taken within each round, and the median of those is reported, rather than a ratio of medians.
- A sample is a loop long enough for the clock. It is taken again if the process lost its core in it, which its CPU
  time betrays, and if that happens every time, the CPU time is what counts: what is measured is the code and not the
  scheduler. (Hand-overs, loads and whole processes wait by their nature, and are taken as they come.)
- Loops of routing are set up several times over in other memory (`contest_anew`).
- Processes are pinned, so that no sample is split between cores; the garbage collector is off in loops.
- Before the first round the core is kept busy until its clock has risen (`warm_up`), and each contestant runs once
  unmeasured. A *yardstick*, plain arithmetic that no change of this package can touch, is measured in the same way;
  two runs whose yardsticks differ were not on equally fast machines.

Reported are the median over rounds and the quartiles.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shmroute.shared.kernel import collection_paused

TAKES = 4
"""How often a sample is taken at most before its CPU time has to do."""

SETUPS = 3
"""See `contest_anew`."""

LOST_CORE = 1.03
"""A sample whose duration exceeds its CPU time by this factor was interrupted."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes
    ----------
    quick : bool
    rounds : int
        Of a contest of loops.
    loop_seconds : float
        Length of one sample of a loop.
    calls : int
        Calls timed one by one, per round and contestant, for percentiles.
    """

    quick: bool
    rounds: int
    loop_seconds: float
    calls: int

    @property
    def few_rounds(self) -> int:
        """Rounds of contests whose samples take tens of milliseconds or more."""
        return max(self.rounds // 2, 3)


QUICK = Scale(quick=True, rounds=7, loop_seconds=0.0012, calls=1500)
FULL = Scale(quick=False, rounds=25, loop_seconds=0.008, calls=8000)


@dataclass(frozen=True)
class Summary:
    """What is kept of some samples.

    Attributes
    ----------
    median, p25, p75 : float
    samples : int
    """

    median: float
    p25: float
    p75: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise at least one value."""
        p25, median, p75 = (float(value) for value in np.percentile(values, (25, 50, 75)))
        return cls(median, p25, p75, len(values))


@dataclass(frozen=True)
class Contestant:
    """One side of a contest.

    Attributes
    ----------
    name : str
    sample : callable
        Gives one value, in the contest's unit.
    details : callable
        Gives further values of all samples together, by name, when the contest is over.
    """

    name: str
    sample: Callable[[], float]
    details: Callable[[], dict[str, float]] = field(default=dict)


@dataclass(frozen=True)
class Result:
    """What a contest says of one contestant.

    Attributes
    ----------
    name : str
    summary : Summary
    ratio : Summary
        Its value over the first contestant's, round by round.
    details : dict
    """

    name: str
    summary: Summary
    ratio: Summary
    details: dict[str, float]


def contest(contestants: Sequence[Contestant], rounds: int, *, warm: bool = True) -> list[Result]:
    """Sample all contestants in turn, there and back; the first is the one that the others are compared with.

    Without `warm` the first samples count too: for what happens once only, and takes long.
    """
    return _results(contestants, _sample(contestants, rounds, warm))


def contest_anew(set_up: Callable[[], AbstractContextManager[Sequence[Contestant]]], rounds: int) -> list[Result]:
    """A contest whose contestants are made `SETUPS` times, with memory of their own each time.

    Where arrays and scratch space happen to lie decides some tens of percent of a loop of 30 ns, and stays the same for
    as long as they do: within one set-up all rounds agree, and the next process disagrees with all of them.
    """
    values: list[list[float]] = []
    for _ in range(SETUPS):
        with set_up() as contestants:
            sampled = _sample(contestants, -(-rounds // SETUPS), warm=True)
            values = [own + more for own, more in zip(values or [[]] * len(sampled), sampled, strict=True)]
            made = contestants
    return _results(made, values)


def _sample(contestants: Sequence[Contestant], rounds: int, warm: bool) -> list[list[float]]:
    values: list[list[float]] = [[] for _ in contestants]
    if warm:
        for contestant in contestants:
            contestant.sample()
    for turn in range(rounds):
        order = range(len(contestants))
        for i in order if turn % 2 == 0 else reversed(order):
            values[i].append(contestants[i].sample())
    return values


def _results(contestants: Sequence[Contestant], values: list[list[float]]) -> list[Result]:
    return [
        Result(contestant.name, Summary.of(own), Summary.of(ratios(own, values[0])), contestant.details())
        for contestant, own in zip(contestants, values, strict=True)
    ]


def ratios(values: Sequence[float], of: Sequence[float]) -> list[float]:
    """Round by round, `values` over `of`; an idle process may have used no time at all."""
    return [value / other if other else float(value == other) for value, other in zip(values, of, strict=True)]


class Loop:
    """A sample of an operation that is too short for the clock: nanoseconds for each of many.

    Parameters
    ----------
    run : callable
        Takes a number n, and does the operation n times.
    seconds : float
        About how long a sample takes.
    per : int
        Operations in one of them, for what works in batches.
    waits : bool
        Whether the operation waits for somebody else, so that more than CPU time belongs to it.
    """

    def __init__(self, run: Callable[[int], object], seconds: float, per: int = 1, waits: bool = False) -> None:
        self._run, self._seconds, self._per, self._waits = run, seconds, per, waits
        self._count = 0

    def __call__(self) -> float:
        if not self._count:
            self._calibrate()
        for _ in range(TAKES):
            wall, cpu = self._time(self._count)
            if self._waits or wall <= cpu * LOST_CORE:
                return wall / (self._count * self._per)
        return cpu / (self._count * self._per)

    def _calibrate(self) -> None:
        """Find how many operations make a sample, which also warms up what they use."""
        count = 1
        while True:
            wall, _ = self._time(count)
            if wall >= self._seconds * 2.5e8:  # a quarter: short enough, long enough to extrapolate from
                self._count = max(round(count * self._seconds * 1e9 / wall), 1)
                return
            count *= 2

    def _time(self, count: int) -> tuple[int, int]:
        with collection_paused():
            cpu = time.thread_time_ns()
            began = time.perf_counter_ns()
            self._run(count)
            wall = time.perf_counter_ns() - began
            return wall, max(time.thread_time_ns() - cpu, 1)


class Latencies:
    """Durations of single calls: a `Contestant`'s sample (their median, in ns) and its details (the tail).

    Each contains one reading of the clock, some tens of nanoseconds.

    Parameters
    ----------
    call : callable
        Gets one of `arguments` after the other.
    count : int
        Calls in a sample.
    """

    def __init__(self, call: Callable[[npt.NDArray[np.float32]], object], arguments: Sequence[object], count: int):
        self._call = call
        self._arguments = [arguments[i % len(arguments)] for i in range(count)]
        self._all: list[npt.NDArray[np.int64]] = []

    def __call__(self) -> float:
        durations = [0] * len(self._arguments)
        clock, call = time.perf_counter_ns, self._call
        with collection_paused():
            for i, argument in enumerate(self._arguments):
                began = clock()
                call(argument)  # type: ignore[arg-type]
                durations[i] = clock() - began
        self._all.append(np.array(durations))
        return float(np.median(self._all[-1]))

    def details(self) -> dict[str, float]:
        """p50, p99, p99.9 and max of all calls but the first sample's, which warmed up."""
        return tail(np.concatenate(self._all[1:] or self._all))


def tail(values: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> dict[str, float]:
    """The percentiles that are shown of durations."""
    p50, p99, p999 = (float(value) for value in np.percentile(values, (50, 99, 99.9)))
    return {"p50": p50, "p99": p99, "p99.9": p999, "max": float(values.max())}


# ---------------------------------------------------------- the machine


def cpus() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


@contextlib.contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Keep the calling thread on one core for the length of a block."""
    former = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, former)


@contextlib.contextmanager
def unpinned() -> Iterator[None]:
    """Let the calling thread, and the processes that it starts, use all cores for the length of a block."""
    former = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    try:
        yield
    finally:
        os.sched_setaffinity(0, former)


def yardstick(count: int) -> int:
    """Arithmetic in plain Python, the same for all versions of this package."""
    value = 1
    for _ in range(count):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return value


def warm_up(seconds: float) -> None:
    """Keep the core busy until its clock has risen."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yardstick(10_000)


def cpu_ns(pid: int) -> int:
    """CPU time that a process has used, in nanoseconds: the kernel's clock of that process, without a library."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def bytes_read(pid: int) -> int:
    """Bytes that a process has asked files for, from ``/proc/PID/io``.

    Raises
    ------
    OSError
        If the kernel does not tell.
    """
    with open(f"/proc/{pid}/io", encoding="ascii") as file:
        return int(file.readline().split()[1])
