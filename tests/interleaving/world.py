"""A world: simulated processes, what they do, and what must hold; and one run of it."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from shmroute.shared.atomic import interpreted_by

from .machine import Memory
from .schedules import encode
from .simulation import Simulation, Strategy


class World(ABC):
    """One scenario. An object is one run of it.

    Attributes
    ----------
    title : str
        What it is about, in a line.
    deaths : int
        How many of its processes may die in a run.
    memory : type
        The machine that the kernels run on.
    lock_free : bool
        Whether everything in it ends though all others stand still.
    elastic : bool
        Whether waits may time out while others could go on.
    """

    title: ClassVar[str]
    deaths: ClassVar[int] = 1
    memory: ClassVar[type[Memory]] = Memory
    step_bound: ClassVar[int] = 3_000
    lock_free: ClassVar[bool] = False
    elastic: ClassVar[bool] = False

    @abstractmethod
    def populate(self, simulation: Simulation) -> None:
        """Make the processes, over shared memory in its first state."""

    @abstractmethod
    def check(self, simulation: Simulation) -> None:
        """Raise `Violation` unless all that must hold at the end of a run does."""

    def install(self, simulation: Simulation) -> Callable[[], None]:
        """Put simulated surroundings in place; returns what takes them away."""
        return lambda: None


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    schedule: str
    decisions: tuple[str, ...]
    steps: int
    timeouts: int
    deaths: int
    failure: BaseException | None
    details: str


def run(make: type[World], strategy: Strategy) -> Outcome:
    """Make one run of a world."""
    simulation = Simulation(strategy, step_bound=make.step_bound, deaths=make.deaths)
    failure: BaseException | None = None
    details = ""
    world = make()
    machine = make.memory(simulation)
    remove = world.install(simulation)
    try:
        with interpreted_by(machine):
            try:
                world.populate(simulation)
                simulation.run()
                world.check(simulation)
            except Exception as error:  # noqa: BLE001 - whatever fails in a run is its finding
                failure = error
                details = "".join(traceback.format_exception(error))
            finally:
                simulation.unwind()
    finally:
        remove()
    decisions = tuple(simulation.decisions)
    return Outcome(
        encode(list(decisions)), decisions, simulation.steps, simulation.timeouts,
        make.deaths - simulation.deaths_left, failure, details,
    )  # fmt: skip
