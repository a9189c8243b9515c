"""Who decides: exhaustive search, random walks, PCT, a script, a replayed string."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from .simulation import SimProcess, SimThread, Simulation

Choice = SimThread | SimProcess | str

FLUSH = 0.05
"""How likely PCT lets a buffered store reach memory at a point."""


def alternatives(simulation: Simulation, current: SimThread | None, enabled: list[SimThread]) -> list[Choice]:
    """All that may happen at a switch point, the undisturbed course first: the current thread goes on, or the first."""
    first = current if current in enabled else enabled[0]
    choices: list[Choice] = [first, *(thread for thread in enabled if thread is not first)]
    choices += simulation.mortals()
    if simulation.buffers is not None:
        choices += [f"~{thread.letter}" for thread in simulation.buffers.pending()]
    return choices


class Undisturbed:
    """Everybody goes on until it waits or ends."""

    def choose(self, simulation: Simulation, current: SimThread | None, enabled: list[SimThread]) -> Choice:
        return current if current in enabled else enabled[0]  # type: ignore[return-value]


class Replay:
    """The decisions of a schedule; after its end, undisturbed.

    Parameters
    ----------
    decisions : sequence of str
    strict : bool
        Whether a decision that is not possible is an error; else it is passed over.
    timeouts : bool
        Whether waits may time out while others could go on, if the schedule says so.
    """

    def __init__(self, decisions: Sequence[str], *, strict: bool = True, timeouts: bool = True) -> None:
        self._decisions = decisions
        self._strict, self._timeouts = strict, timeouts
        self._passed_over = 0

    def choose(self, simulation: Simulation, current: SimThread | None, enabled: list[SimThread]) -> Choice:
        while (position := len(simulation.decisions) + self._passed_over) < len(self._decisions):
            wanted = self._decisions[position]
            sleepers = simulation.sleepers() if self._timeouts else []
            for choice in (*alternatives(simulation, current, enabled), *sleepers):
                if (choice if isinstance(choice, str) else choice.letter) == wanted:
                    return choice
            if self._strict:
                raise ValueError(f"the schedule does not fit: step {position} by {wanted!r} is not possible")
            self._passed_over += 1
        return Undisturbed().choose(simulation, current, enabled)


class Scripted:
    """Undisturbed, but for some deviations: after so many more switch points, the n-th alternative.

    Parameters
    ----------
    deviations : sequence of (int, int)
        Points to let pass, and the number of the alternative, counted round.
    """

    def __init__(self, deviations: Sequence[tuple[int, int]]) -> None:
        self._deviations = list(reversed(deviations))
        self._gap = self._deviations[-1][0] if self._deviations else -1

    def choose(self, simulation: Simulation, current: SimThread | None, enabled: list[SimThread]) -> Choice:
        if not self._deviations or self._gap > 0:
            self._gap -= 1
            return current if current in enabled else enabled[0]  # type: ignore[return-value]
        _, number = self._deviations.pop()
        self._gap = self._deviations[-1][0] if self._deviations else -1
        choices = alternatives(simulation, current, enabled)
        return choices[number % len(choices)]


class RandomWalk:
    """At every point any thread, each as likely; now and then a death, a timeout, a store that reaches memory.

    Parameters
    ----------
    seed : int
    stay : float
        How likely the current thread simply goes on, before anything is drawn.
    death, timeout, flush : float
        How likely each of these is at a point, if it is possible.
    """

    def __init__(
        self, seed: int, *, stay: float = 0.0, death: float = 0.01, timeout: float = 0.0, flush: float = 0.1
    ) -> None:
        self._random = random.Random(seed)
        self._stay, self._death, self._timeout, self._flush = stay, death, timeout, flush

    def choose(self, simulation: Simulation, current: SimThread | None, enabled: list[SimThread]) -> Choice:
        draw = self._random.random
        if draw() < self._death and (mortals := simulation.mortals()):
            return self._random.choice(mortals)
        if self._timeout and draw() < self._timeout and (sleepers := simulation.sleepers()):
            return self._random.choice(sleepers)
        if simulation.buffers is not None and draw() < self._flush and (pending := simulation.buffers.pending()):
            return f"~{self._random.choice(pending).letter}"
        if current is not None and draw() < self._stay and current in enabled:
            return current
        return enabled[int(draw() * len(enabled))]


class PCT:
    """Probabilistic concurrency testing: random priorities, the highest runs, and at `depth` - 1 random points the
    running thread falls below all others. A bug that takes `depth` orderings is found with a probability of at least
    1 / (n k^(depth-1)) for n threads and k steps (Burckhardt et al., ASPLOS 2010).

    Parameters
    ----------
    seed : int
    depth : int
    steps : int
        How long a run may be, about.
    deaths : int
        How many of the points are deaths instead.
    """

    def __init__(self, seed: int, *, depth: int = 3, steps: int = 100, deaths: int = 1) -> None:
        self._random = random.Random(seed)
        points = [self._random.randrange(max(steps, 1)) for _ in range(depth - 1 + deaths)]
        self._changes = set(points[: depth - 1])
        self._deaths = set(points[depth - 1 :])
        self._priorities: dict[str, float] = {}
        self._lowest = 0.0

    def choose(self, simulation: Simulation, current: SimThread | None, enabled: list[SimThread]) -> Choice:
        if simulation.steps in self._deaths:
            self._deaths.discard(simulation.steps)
            if mortals := simulation.mortals():
                return self._random.choice(mortals)
        flushes = simulation.buffers is not None and self._random.random() < FLUSH
        if flushes and (pending := simulation.buffers.pending()):  # type: ignore[union-attr]
            return f"~{self._random.choice(pending).letter}"
        for thread in enabled:
            if thread.letter not in self._priorities:
                self._priorities[thread.letter] = self._random.random() + 1
        chosen = max(enabled, key=lambda thread: self._priorities[thread.letter])
        if simulation.steps in self._changes:
            self._changes.discard(simulation.steps)
            self._lowest -= 1
            self._priorities[chosen.letter] = self._lowest
            chosen = max(enabled, key=lambda thread: self._priorities[thread.letter])
        elif current is not None and current not in enabled and current.letter in self._priorities:
            self._lowest -= 1  # it has been spinning
            self._priorities[current.letter] = self._lowest
        return chosen


class Solo:
    """Another strategy up to a point; from there on one thread alone, while all others stand still.

    What is lock-free ends all the same.

    Parameters
    ----------
    strategy : RandomWalk
    after : int
        Steps.
    number : int
        Which of the enabled threads, counted round.
    """

    def __init__(self, strategy: RandomWalk, after: int, number: int) -> None:
        self._strategy, self._after, self._number = strategy, after, number
        self._thread: SimThread | None = None

    def choose(self, simulation: Simulation, current: SimThread | None, enabled: list[SimThread]) -> Choice:
        if simulation.steps < self._after:
            return self._strategy.choose(simulation, current, enabled)
        if self._thread is None:
            self._thread = enabled[self._number % len(enabled)]
            simulation.step_bound = simulation.steps + SOLO_STEPS
        return self._thread if self._thread in enabled else enabled[0]


SOLO_STEPS = 400
"""Within which a thread alone, and then the others one after another, must be done."""


class Exhaustive:
    """All schedules with so many preemptions and deaths, by depth-first search: `strategies` yields one for each run.

    A preemption takes the turn from a thread that could go on; switching away from one that waits or has ended costs
    nothing (Musuvathi and Qadeer, PLDI 2007), unless `delays` are bounded: then every turn that goes to another than
    the first in line costs one (Emmi, Qadeer and Rakamaric, POPL 2011), which leaves few schedules of long runs. The
    next run is the last one with its deepest decision that has an untried alternative changed.

    Parameters
    ----------
    preemptions, deaths : int
    delays : bool

    Attributes
    ----------
    complete : bool
        Whether every such schedule has been run.
    """

    def __init__(self, preemptions: int, deaths: int, *, delays: bool = False) -> None:
        self._preemptions, self._deaths, self._delays = preemptions, deaths, delays
        self._path: list[list[int]] = []  # [which alternative, how many there are]
        self.complete = False

    def strategies(self) -> Iterator[_Branch]:
        """A strategy for each run; ask for the next after the run."""
        while True:
            yield _Branch(self._path, self._preemptions, self._deaths, self._delays)
            while self._path and self._path[-1][0] + 1 >= self._path[-1][1]:
                self._path.pop()
            if not self._path:
                self.complete = True
                return
            self._path[-1][0] += 1


class _Branch:
    """One run of an exhaustive search: the path so far, then undisturbed, noting what else was possible."""

    def __init__(self, path: list[list[int]], preemptions: int, deaths: int, delays: bool) -> None:
        self._path, self._preemptions, self._deaths, self._delays = path, preemptions, deaths, delays
        self._depth = 0

    def choose(self, simulation: Simulation, current: SimThread | None, enabled: list[SimThread]) -> Choice:
        first = current if current is not None and current in enabled else enabled[0]
        costs = first is current or self._delays
        choices: list[Choice] = [first]
        if not costs or self._preemptions > 0:
            choices += [thread for thread in enabled if thread is not first]
        if self._deaths > 0:
            choices += simulation.mortals()
        if simulation.buffers is not None:
            choices += [f"~{thread.letter}" for thread in simulation.buffers.pending()]
        if len(choices) == 1:
            return choices[0]
        if self._depth == len(self._path):
            self._path.append([0, len(choices)])
        number = self._path[self._depth][0]
        self._depth += 1
        choice = choices[number]
        if isinstance(choice, SimProcess):
            self._deaths -= 1
        elif isinstance(choice, SimThread) and costs and choice is not first:
            self._preemptions -= 1
        return choice
