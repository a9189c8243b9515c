"""Many runs of one world: what they found, made as short as it gets."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .mutation import Mutant
from .schedules import decode, encode
from .simulation import NOT_DONE, Strategy
from .strategies import PCT, Exhaustive, RandomWalk, Replay, Solo, Undisturbed
from .world import Outcome, World, run

FEW = 400
"""Random schedules that a thorough search begins with."""


@dataclass(frozen=True)
class Found:
    """A schedule under which something does not hold."""

    world: str
    schedule: str
    failure: BaseException
    runs: int

    def __str__(self) -> str:
        return (
            f"{type(self.failure).__name__}: {self.failure}\n"
            f"after {self.runs} schedules; the same again:\n"
            f"  python -m tests.interleaving replay {self.world} '{self.schedule}'"
        )


@dataclass
class Report:
    """What a search did."""

    runs: int = 0
    steps: int = 0
    deaths: int = 0
    timeouts: int = 0
    seconds: float = 0.0
    complete: bool = False
    found: Found | None = None

    def add(self, outcome: Outcome) -> None:
        """Count one run."""
        self.runs += 1
        self.steps += outcome.steps
        self.deaths += outcome.deaths
        self.timeouts += outcome.timeouts


class Walks:
    """Strategies without end: uniform random walks, lazier ones, PCT, and ones that leave somebody alone.

    PCT puts its points where a run is: it goes by how long the runs so far were.

    Parameters
    ----------
    world : type
    seed : int
        Of the first; the others follow.
    """

    def __init__(self, world: type[World], seed: int) -> None:
        self._world, self._seed = world, seed
        self._steps = float(run(world, Undisturbed()).steps)

    def observe(self, outcome: Outcome) -> None:
        """Learn how long runs are."""
        self._steps += (outcome.steps - self._steps) / 16

    def __iter__(self) -> Iterator[Strategy]:
        world = self._world
        for number in itertools.count(self._seed):
            steps = int(self._steps)
            yield RandomWalk(number, death=2 / (steps + 1) if number % 2 else 0.0)
            yield PCT(number, depth=2 + number % 4, steps=steps, deaths=number // 2 % (world.deaths + 1))
            timeout = 0.02 if world.elastic else 0.0
            yield RandomWalk(number, stay=1 - 8 / (steps + 8), death=1 / (steps + 1), timeout=timeout)
            yield PCT(number, depth=3 + number % 3, steps=steps, deaths=0)
            if world.lock_free:
                yield Solo(RandomWalk(number, death=0.0), self._seed + number * 7 % steps, number)


def search(
    name: str,
    world: type[World],
    strategies: Iterable[Strategy],
    *,
    runs: int,
    progress: Callable[[Report], None] | None = None,
    shorten: bool = True,
) -> Report:
    """Run a world under one strategy after another, until something is found, or `runs` are done."""
    report = Report()
    began = time.perf_counter()
    for strategy in itertools.islice(strategies, runs):
        outcome = run(world, strategy)
        report.add(outcome)
        if isinstance(strategies, Walks):
            strategies.observe(outcome)
        if outcome.failure is not None:
            found = shortest(world, outcome) if shorten else outcome
            assert found.failure is not None
            report.found = Found(name, found.schedule, found.failure, report.runs)
            break
        if progress is not None and report.runs % 100 == 0:
            report.seconds = time.perf_counter() - began
            progress(report)
    report.seconds = time.perf_counter() - began
    return report


def exhaust(
    name: str,
    world: type[World],
    *,
    preemptions: int,
    deaths: int,
    runs: int,
    delays: bool = False,
    progress: Callable[[Report], None] | None = None,
    shorten: bool = True,
) -> Report:
    """All schedules of a world within a bound (see `Exhaustive`), or the first `runs` of them."""
    exhaustive = Exhaustive(preemptions, deaths, delays=delays)
    report = search(name, world, exhaustive.strategies(), runs=runs, progress=progress, shorten=shorten)
    report.complete = exhaustive.complete
    return report


def thorough(name: str, world: type[World], *, runs: int, seed: int = 0, shorten: bool = True) -> Iterator[Report]:
    """What a world is searched with: some random schedules, one death anywhere, one delay anywhere, then the rest of
    `runs` random ones.
    """
    some = min(runs, FEW)
    yield search(name, world, Walks(world, seed), runs=some, shorten=shorten)
    yield exhaust(name, world, preemptions=0, deaths=1, runs=runs, delays=True, shorten=shorten)
    yield exhaust(name, world, preemptions=1, deaths=0, runs=runs, delays=True, shorten=shorten)
    if runs > some:
        yield search(name, world, Walks(world, seed + some), runs=runs - some, shorten=shorten)


def replay(world: type[World], schedule: str) -> Outcome:
    """Make the run that a schedule tells.

    Raises
    ------
    ValueError
        If it is no schedule, or does not fit the world.
    """
    outcome = run(world, Replay(decode(schedule)))
    if isinstance(outcome.failure, ValueError) and "does not fit" in str(outcome.failure):
        raise outcome.failure
    return outcome


def shortest(world: type[World], outcome: Outcome, tries: int = 400) -> Outcome:
    """A run that fails in the same way with fewer switches: stretches of the schedule are left out, while it fails.

    A run that does not end is left as it is: a shorter one might only not be fair.
    """
    if str(outcome.failure).startswith(NOT_DONE):
        return outcome
    best = outcome
    size = max(len(_stretches(best)) // 2, 1)
    while size > 0 and tries > 0:
        position = 0
        while position < len(stretches := _stretches(best)) and tries > 0:
            tries -= 1
            kept = stretches[:position] + stretches[position + size :]
            again = run(world, Replay([d for stretch in kept for d in stretch], strict=False, timeouts=world.elastic))
            if _kind(again) == _kind(best) and _weight(again) < _weight(best):
                best = again
            else:
                position += size
        size //= 2
    return best


def _stretches(outcome: Outcome) -> list[list[str]]:
    return [list(group) for _, group in itertools.groupby(outcome.decisions)]


def _kind(outcome: Outcome) -> tuple[type, str]:
    """What failed, whatever the numbers."""
    return type(outcome.failure), re.sub(r"0x[0-9a-f]+|[\d.]+", "", str(outcome.failure))[:60]


def _weight(outcome: Outcome) -> tuple[int, int]:
    return len(_stretches(outcome)), len(encode(list(outcome.decisions)))


@dataclass(frozen=True)
class Kill:
    """What became of a mutant."""

    mutant: Mutant
    world: str | None
    runs: int
    schedule: str
    failure: str

    @property
    def shown(self) -> str:
        """The schedule, if it is short enough for a table."""
        return self.schedule if len(self.schedule) <= 40 else f"{self.schedule[:37]}…"

    def as_dict(self) -> dict[str, object]:
        """JSON types only."""
        return {
            "mutant": self.mutant.name, "rule": self.mutant.rule, "world": self.world, "schedules": self.runs,
            "schedule": self.schedule, "failure": self.failure,
        }  # fmt: skip


def hunt(mutant: Mutant, worlds: dict[str, type[World]], *, runs: int, seed: int = 0, shorten: bool = True) -> Kill:
    """Search the worlds of a mutant until one finds that something does not hold."""
    needed = 0
    with mutant.applied():
        for name in mutant.worlds:
            for report in thorough(name, worlds[name], runs=runs, seed=seed, shorten=shorten):
                needed += report.runs
                if report.found is not None:
                    return Kill(mutant, name, needed, report.found.schedule, str(report.found.failure).splitlines()[0])
    return Kill(mutant, None, needed, "", "")
