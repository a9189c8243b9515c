"""The bell: ringers that make work visible and ring, a sleeper that arms, looks, sleeps and serves.

Checked: once a ringer has come to the end of its ring, the sleeper does not sleep on until its timeout with that work
undone. A ringer that died before its post has promised nothing; one that rings after it must be heard all the same.

Also with store buffers: the sleeper's arming must not stay behind its look at the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from shmroute.shared.bell import Semaphore, arm, disarm, ring
from shmroute.shared.layout import HEADER_BELL
from shmroute.shared.ring import EMPTY, ring_has_work, ring_pop, ring_push

from ..ground import ground
from ..host import Host
from ..machine import StoreBuffers
from ..simulation import SimProcess, Simulation, require
from ..world import World
from .ring import CONFIG

TIMEOUT = 1.0


class Bell(World):
    """Each ringer pushes and rings as often as `rings` says."""

    title = "two ringers and a sleeper"
    rings: ClassVar[tuple[int, ...]] = (1, 2)

    def install(self, simulation: Simulation) -> Callable[[], None]:
        return Host(simulation).install()

    def populate(self, simulation: Simulation) -> None:
        segment = ground(CONFIG)
        self._simulation = simulation
        self._ring, self._bits = segment.address + segment.layout.ring, segment.layout.ring_bits
        self._bell = segment.address + HEADER_BELL
        self._promised: set[int] = set()
        self._served: set[int] = set()
        self._ringers: list[SimProcess] = [
            simulation.process(f"ringer {number}", partial(self._ringing, number, times))
            for number, times in enumerate(self.rings)
        ]
        simulation.process("sleeper", self._sleeping, mortal=False)

    def _ringing(self, number: int, times: int) -> None:
        semaphore = Semaphore("bell")
        for i in range(times):
            request = 10 * number + i
            ring_push(self._ring, self._bits, request)
            ring(self._bell, semaphore)
            self._promised.add(request)

    def _sleeping(self) -> None:
        semaphore = Semaphore("bell")
        while True:
            arm(self._bell, 0)
            if not ring_has_work(self._ring, self._bits) and not semaphore.sleep(TIMEOUT):
                missed = self._promised - self._served
                require(not missed, f"slept on although {sorted(missed)} had been rung for")
                if all(ringer.done for ringer in self._ringers):
                    return
            disarm(self._bell)
            semaphore.drain()
            while (request := ring_pop(self._ring, self._bits)) != EMPTY:
                self._served.add(request)

    def check(self, simulation: Simulation) -> None:
        require(self._promised <= self._served, f"never served: {sorted(self._promised - self._served)}")


class BellBuffered(Bell):
    title = "two ringers and a sleeper, with store buffers"
    memory = StoreBuffers
