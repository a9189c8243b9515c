"""A prefetch that the pager cancels, while a worker comes to demand the expert.

Checked: whoever comes first, what is demanded stays requested, at the demand's priority; and the worker pushes what
nobody has pushed at that priority.
"""

from __future__ import annotations

from shmroute.shared.experts import QUEUE, cancel, request_expert_word
from shmroute.shared.words import PREFETCH, REQUESTED, URGENT, pack_expert

from ..ground import ground
from ..simulation import Simulation, require
from ..world import World
from .paging import settings


class Cancellation(World):
    title = "a prefetch that is cancelled and demanded"
    config = settings(experts=1, slots=1, workers=1)
    lock_free = True

    def populate(self, simulation: Simulation) -> None:
        segment = self._segment = ground(self.config)
        self._word = segment.address + segment.layout.experts
        self._failure = segment.address + segment.layout.failures
        self._code: int | None = None
        segment.write(segment.layout.experts, pack_expert(REQUESTED, PREFETCH, 0, 0))
        simulation.process("pager", self._cancel)
        simulation.process("worker", self._demand)

    def _cancel(self) -> None:
        cancel(self._word)

    def _demand(self) -> None:
        self._code = request_expert_word(self._word, self._failure, URGENT)

    def check(self, simulation: Simulation) -> None:
        if self._code is None:
            return  # it died before it had demanded anything
        require(self._code == QUEUE, f"the demand was not for the worker to push, but {self._code}")
        word = self._segment.read(self._segment.layout.experts)
        require(word == pack_expert(REQUESTED, URGENT, 0, 0), f"what was demanded is {word:#x}")
